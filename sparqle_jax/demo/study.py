"""Controls and ablations of the miniature: the same training with one thing changed.

    python -m sparqle_jax.demo.study              # lists them
    python -m sparqle_jax.demo.study controls     # or ablations, or single ones by name

Each is a run of configs/tiny.py in its own folder, on the speech in data/tiny; a finished one is not run
again. Prints the scores of all that are finished as tables in Markdown, and writes them to results.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sparqle_jax import loop, train
from sparqle_jax.config import read_config
from sparqle_jax.demo.__main__ import CONFIG, LANGUAGES, MODELS, SETS
from sparqle_jax.demo.datasets import make_world
from sparqle_jax.tasks import TRANSCRIBE

TASKS = json.dumps({TRANSCRIBE: 0.4, **dict.fromkeys(LANGUAGES, 0.2)})
SHORT = ("stage1.steps=200", "stage2.steps=500", "stage2.batch_size=16")
# What each changes in configs/tiny.py.
CONTROLS: dict[str, tuple[str, ...]] = {
    # From the stage 1 in the package: it knows nothing of translations.
    "translations": (
        "stage1=null",
        f"init_from={MODELS / 'stage1.safetensors'}",
        f"stage2.tasks={TASKS}",
        "stage2.steps=7500",
    ),
    "random-encoder": ("encoder.folder=FOLDER/random-hubert",),
    # A step of stage 1 takes as long as one of stage 2.
    "without-stage-1": ("stage1=null", "stage2.steps=5600"),
}
ABLATIONS: dict[str, tuple[str, ...]] = {
    "all-losses": SHORT,
    **{
        name: (*SHORT, f"stage1.losses={json.dumps(name.split('+'))}")
        for name in ("stc+stm", "stc+stg", "stm+stg", "stc", "stm", "stg")
    },
    # The time of stage 1 goes into more steps of stage 2.
    "no-stage-1": (*SHORT, "stage1=null", "stage2.steps=1200"),
    **{f"{num}-queries": (*SHORT, f"adapter.num_queries={num}") for num in (16, 8)},
}
GROUPS = {"controls": CONTROLS, "ablations": ABLATIONS}
VARIANTS = CONTROLS | ABLATIONS


def run_variant(name: str, folder: Path, data: Path, changes: list[str]) -> None:
    """Trains and evaluates a variant; its run lies in `folder`/`name`."""
    if name == "random-encoder" and not (folder / "random-hubert" / "config.json").is_file():
        # Here, because scikit-learn is not in the environment that `make demo` makes.
        from sparqle_jax.demo import encoder

        encoder.main([str(data / "seen"), str(folder / "random-hubert"), "--steps", "0", "0"])
    tests = {test: str(data / test) for test in SETS}
    config = read_config(
        CONFIG,
        [
            f"run={folder / name}",
            f"data.train={data / 'train'}",
            f"data.frames={data / 'frames'}",
            f"data.valid={json.dumps(tests)}",
            *(change.replace("FOLDER", str(folder)) for change in VARIANTS[name]),
            *changes,
        ],
    )
    print(f"--- {name}")
    train.Run(config).train()


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """A table with a row for each variant: WER, and the mean BLEU of the translations, on each test set."""
    lines = [
        "| variant | " + " | ".join(f"WER, {name} | BLEU, {name}" for name in SETS) + " |",
        "|---|" + "---:|---:|" * len(SETS),
    ]
    for variant, by_set in results.items():
        cells = []
        for name in SETS:
            scores = by_set[name]
            bleu = sum(scores[code]["bleu"] for code in LANGUAGES) / len(LANGUAGES)
            cells.append(f"{scores[TRANSCRIBE]['wer']:.1%} | {bleu:.1f}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.demo.study", description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="none: lists them")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/tiny"))
    parser.add_argument("--train", type=int, default=20_000, help="sentences to train on")
    parser.add_argument("--test", type=int, default=512, help="sentences of each test set")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of train, for all"
    )
    args = parser.parse_args(argv)
    if not args.variants:
        for group, variants in GROUPS.items():
            print(f"{group}:")
            for name, changes in variants.items():
                print(f"  {name:<16}{' '.join(changes)}")
        return 0
    if unknown := set(args.variants) - {*GROUPS, *VARIANTS}:
        parser.error(f"there is no {sorted(unknown)}; choose among {', '.join([*GROUPS, *VARIANTS])}.")
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        make_world(args.data, train=args.train, test=args.test, seed=0)
        for wanted in args.variants:
            for name in GROUPS.get(wanted, [wanted]):
                run_variant(name, args.folder, args.data, args.set)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except loop.Stopped as stopped:
        print(f"{stopped}; the same command goes on from there.", file=sys.stderr)
        return stopped.status
    results = {}
    for variants in GROUPS.values():
        files = {name: args.folder / name / "stage2" / "results.json" for name in variants}
        finished = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
        print(f"\n{markdown(finished)}")
        results |= finished
    (args.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
