"""Controls and ablations of the miniature: the same training with one thing changed.

    python -m sparqle_jax.demo.study --list
    python -m sparqle_jax.demo.study full translations random-encoder no-stage-1
    python -m sparqle_jax.demo.study --short full stc stm stg stc+stm stc+stg stm+stg

Each variant is a run of configs/tiny.py in its own folder, on the speech in data/tiny; a finished one
is not run again. Prints a table in Markdown, and writes the scores to results.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sparqle_jax import train
from sparqle_jax.config import read_config
from sparqle_jax.data.pipeline import TRANSCRIBE
from sparqle_jax.demo import encoder
from sparqle_jax.demo.__main__ import CONFIG, LANGUAGES, SETS
from sparqle_jax.demo.world import make_world

SHORT = ("stage1.steps=300", "stage2.steps=1500")
TASKS = json.dumps({TRANSCRIBE: 0.4, **dict.fromkeys(LANGUAGES, 0.2)})
# What each variant changes in configs/tiny.py.
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "translations": (f"stage2.tasks={TASKS}",),
    "random-encoder": ("encoder=FOLDER/random-hubert",),
    "no-stage-1": ("stage1=null",),
    **{
        name: (f"stage1.losses={json.dumps(name.split('+'))}",)
        for name in ("stc", "stm", "stg", "stc+stm", "stc+stg", "stm+stg")
    },
    **{f"{num}-queries": (f"adapter.sizes.num_queries={num}",) for num in (8, 16, 24)},
}


def run_variant(name: str, folder: Path, data: Path, changes: list[str]) -> dict[str, Any]:
    """The scores of a variant, by test set and task; its run lies in `folder`/`name`."""
    if name == "random-encoder" and not (folder / "random-hubert" / "config.json").is_file():
        encoder.main([str(data / "heard"), str(folder / "random-hubert"), "--steps", "0", "0"])
    tests = {test: str(data / test) for test in SETS}
    config = read_config(
        CONFIG,
        [
            f"run={folder / name}",
            f"data.train={data / 'train'}",
            f"data.test={json.dumps(tests)}",
            *(change for change in changes if name != "no-stage-1" or not change.startswith("stage1.")),
            *(change.replace("FOLDER", str(folder)) for change in VARIANTS[name]),
        ],
    )
    print(f"--- {name}")
    return train.run(config)["stage2"]


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sparqle_jax.demo.study", description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", choices=[*VARIANTS, []], metavar="VARIANT")
    parser.add_argument("--list", action="store_true", help="the variants, and what each changes")
    parser.add_argument("--short", action="store_true", help=f"each with {' and '.join(SHORT)}")
    parser.add_argument("--folder", type=Path, help="of the runs (runs/study or runs/study-short)")
    parser.add_argument("--data", type=Path, default=Path("data/tiny"))
    parser.add_argument("--train", type=int, default=20_000, help="sentences to train on")
    parser.add_argument("--test", type=int, default=512, help="sentences of each test set")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for all, as of train"
    )
    args = parser.parse_args(argv)
    if args.list or not args.variants:
        for name, changes in VARIANTS.items():
            print(f"{name:<16}{' '.join(changes)}")
        return
    folder = args.folder or Path("runs/study-short" if args.short else "runs/study")
    make_world(args.data, train=args.train, test=args.test, seed=0)
    results = {}
    try:
        for name in args.variants:
            changes = [*(SHORT if args.short else ()), *args.set]
            results[name] = run_variant(name, folder, args.data, changes)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except train.Stopped as stopped:
        print(f"{stopped}; the same command goes on from there.")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
