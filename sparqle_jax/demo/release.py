"""Puts what a run from scratch has trained into the package, in float16, with its provenance.

python -m sparqle_jax.demo.release runs/from-scratch --study runs/study
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sparqle_jax.demo.__main__ import MODELS

CURVE_POINTS = 200
PROVENANCE = """# The miniature's weights

Made by `python -m sparqle_jax.demo --from-scratch --seed {seed}{changes}`,
and put here in float16 by `python -m sparqle_jax.demo.release`. `hubert` and `llm` are the frozen towers,
`words` the tokenizer of stage 1, `stage1.safetensors` the adapter after stage 1, `sparqle` a model folder:
the adapter after stage 2. `results.json` has that run's scores as `yours`, those of the LLM that reads the
written sentences as `from text`, and those of the controls and ablations of `python -m
sparqle_jax.demo.study controls ablations` under their names.

| file | bytes | SHA-256 |
|---|---|---|
{rows}
"""


def to_float16(source: Path, target: Path) -> None:
    """Copies a safetensors file, float32 tensors as float16."""
    with safe_open(source, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    halves = {n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in tensors.items()}
    save_file(halves, target, metadata)


def release_model(stage: Path, name: str) -> None:
    """A model folder with the curve of its training, thinned out."""
    folder = MODELS / name
    folder.mkdir(parents=True, exist_ok=True)
    to_float16(stage / "adapter.safetensors", folder / "adapter.safetensors")
    settings = json.loads((stage / "config.json").read_text())
    towers = {"encoder": {"folder": "../hubert"}, "llm": {"folder": "../llm"}}
    (folder / "config.json").write_text(json.dumps(settings | towers, indent=2) + "\n")
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if "loss" in json.loads(line)]
    kept = lines[:: max(1, len(lines) // CURVE_POINTS)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sparqle_jax.demo.release", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--study", type=Path, help="the folder of demo.study, for results.json")
    args = parser.parse_args(argv)
    run, study = args.run, args.study
    MODELS.mkdir(exist_ok=True)
    for name in ("hubert", "llm", "words"):
        shutil.copytree(run / "models" / name, MODELS / name, dirs_exist_ok=True)
    to_float16(run / "stage1" / "adapter.safetensors", MODELS / "stage1.safetensors")
    release_model(run / "stage2", "sparqle")
    results = json.loads((run / "results.json").read_text())
    if study is not None:
        results |= json.loads((study / "results.json").read_text())
    (MODELS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_provenance(json.loads((run / "config.json").read_text()))


def write_provenance(config: dict[str, Any]) -> None:
    """models/README.md: how every file was made, and its hash. config: of the run, as in its config.json."""
    changes = "" if config["data"].get("frames") else " --set data.frames=null"
    files = sorted(path for path in MODELS.rglob("*") if path.is_file() and path.name != "README.md")
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    rows = [f"| {path.relative_to(MODELS)} | {path.stat().st_size:,} | {hashes[path]} |" for path in files]
    text = PROVENANCE.format(seed=config["seed"], changes=changes, rows="\n".join(rows))
    (MODELS / "README.md").write_text(text)


if __name__ == "__main__":
    main()
