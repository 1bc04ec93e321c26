"""The miniature, from nothing to a page that shows what it has learned.

    python -m sparqle_jax.demo                  # minutes: stage 2 alone, from the models in the package
    python -m sparqle_jax.demo --from-scratch   # hours: the towers and stage 1 too, and much more speech

Run again after a stop, it goes on where it was.
"""

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sparqle_jax import audio, loop, train
from sparqle_jax.checkpoint import CheckpointError
from sparqle_jax.config import Config, read_config
from sparqle_jax.data.dataset import CorruptRecord, DataSet, Utterance
from sparqle_jax.demo import grammar
from sparqle_jax.demo.datasets import make_world
from sparqle_jax.demo.page import write_page
from sparqle_jax.evaluate import evaluate
from sparqle_jax.scores import table
from sparqle_jax.sparqle import SparQLe
from sparqle_jax.tasks import TRANSCRIBE

MODELS = Path(__file__).parent / "models"
CONFIG = Path(__file__).parents[2] / "configs" / "tiny.py"
SETS = {"seen": "speakers seen in training", "unseen": "unseen speakers"}
LANGUAGES = tuple(code for code in grammar.LANGUAGES if code != "en")
SUBTITLE = "The miniature SparQLe: a frozen speech encoder, a frozen LLM, and a small adapter between them."
ZERO_SHOT = (
    "The adapter was trained on English transcripts alone. Every translation is zero-shot: the language "
    "model translates what it hears although nobody has ever shown the adapter how."
)
SHIPPED = "the adapter in the package: 5000 steps of 32, on 20,000 sentences"
INTERRUPTED = 130
SHOWN = 6  # utterances of each set on the page
# Stage 2 of `make demo`: in minutes, small batches without dropout learn most.
MINUTES = (
    "stage1=null",
    f"init_from={MODELS / 'stage1.safetensors'}",
    "adapter.hidden_dropout_prob=0.0",
    "stage2.batch_size=8",
    "stage2.optim.lr=7e-4",
    "stage2.optim.warmup_steps=100",
    "stage2.save_every=200",
)


def what_next(run: Path, data: Path) -> list[tuple[str, str]]:
    """Commands to try after the demo: (what it does, command)."""
    say, python = "the concert is on friday the third of may", "python -m sparqle_jax"
    return [
        ("have a sentence of yours spoken", f'{python}.demo.say "{say}"'),
        ("transcribe it, with the adapter in the package", f"{python}.transcribe say.wav"),
        ("translate it", f"{python}.transcribe say.wav --translate German"),
        ("with the adapter of this run", f"{python}.transcribe say.wav --model {run}/stage2"),
        (
            "score it on unseen speakers",
            f"{python}.evaluate {run}/stage2 {data}/unseen --output {run}/unseen",
        ),
        (
            "train again, with something changed",
            f"{python}.train {run}/config.json --set run=runs/mine --set stage2.optim.lr=5e-4",
        ),
    ]


def make_models(folder: Path, data: Path, seed: int) -> None:
    """Trains both towers, and makes the adapter's tokenizer, where they are not there yet."""
    # Here, because scikit-learn is not in the environment that `make demo` makes.
    from sparqle_jax.demo import encoder, language_model, tokenizer

    arguments = [f"--seed={seed}"]
    if not (folder / "words" / "tokenizer.json").is_file():
        tokenizer.main([str(folder / "words")])
    if not (folder / "hubert" / "preprocessor_config.json").is_file():
        encoder.main([str(data / "train"), str(folder / "hubert"), *arguments])
    if not (folder / "llm" / "tokenizer.json").is_file():
        language_model.main([str(folder / "llm"), *arguments])


def overrides(args: argparse.Namespace, models: Path) -> list[str]:
    """The demo's changes of configs/tiny.py, as --set takes them."""
    changes = [
        f"run={args.run}",
        f"seed={args.seed}",
        f"encoder.folder={models / 'hubert'}",
        f"llm={models / 'llm'}",
        f"stage1.tokenizer={models / 'words'}",
        f"data.train={args.data / 'train'}",
        f"data.frames={args.data / 'frames'}",
        "data.valid={}",
        "stage2.evaluate=false",
    ]
    if not args.from_scratch:
        changes += [*MINUTES, f"stage2.steps={args.steps}"]
    return changes + args.set


def attention_of(sparqle: SparQLe, waveform: np.ndarray) -> dict[str, Any]:
    """The frames of a waveform float [S] at 16 kHz that each query reads, as the page takes them."""
    values = sparqle.attention((waveform, audio.SAMPLE_RATE))
    levels = np.round(255 * values / values.max()).astype(np.uint8)
    return {
        "queries": levels.shape[0],
        "frames": levels.shape[1],
        "weights": base64.b64encode(levels.tobytes()).decode(),
    }


def utterance_card(
    utterance: Utterance, waveform: np.ndarray, answers: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """One utterance as the page takes it: audio, outline, reference, and answers by model and task."""
    peaks = [float(np.abs(part).max()) for part in np.array_split(waveform, 300)]
    return {
        "id": utterance.id,
        "speaker": utterance.speaker,
        "seconds": utterance.duration,
        "audio": "data:audio/wav;base64," + audio.as_wav(waveform),
        "peaks": [round(peak / max(peaks), 3) for peak in peaks],
        "reference": {
            TRANSCRIBE: utterance.text,
            **{code: utterance.translations[code] for code in LANGUAGES},
        },
        "answers": [{"model": model, "texts": texts} for model, texts in answers.items()],
    }


def curve(file: Path) -> list[list[float]]:
    """Steps and losses of a metrics.jsonl."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [[row["step"], row["loss"]] for row in rows if "loss" in row]


def report(config: Config, data: Path, models: dict[str, tuple[Path, str]]) -> None:
    """Evaluates the models, and writes results.json and index.html into the run's folder.

    models: name -> (model folder, description); the first is the one that the page shows listening.
    """
    tests = {name: DataSet(data / name) for name in SETS}
    loaded = {name: SparQLe.from_pretrained(folder) for name, (folder, _) in models.items()}
    first = next(iter(loaded.values()))
    by_model: dict[str, Any] = {name: {} for name in models}
    answers = {}
    for set_name, test in tests.items():
        for name, sparqle in loaded.items():
            print(f"{name}, {SETS[set_name]}:")
            by_model[name][set_name], answers[name, set_name] = evaluate(sparqle, test, LANGUAGES)
    # The sets differ in their voices alone: their sentences are the same.
    from_text, _ = evaluate(first, next(iter(tests.values())), LANGUAGES, from_text=True)
    by_model["from text"] = dict.fromkeys(SETS, from_text)
    (config.run / "results.json").write_text(json.dumps(by_model, indent=1) + "\n")

    cards = []
    for set_name, test in tests.items():
        for i in range(min(len(test), SHOWN)):
            utterance, waveform = test[i], test.waveform(i)
            card = utterance_card(utterance, waveform, {name: answers[name, set_name][i] for name in models})
            cards.append(card | {"set": set_name, "attention": attention_of(first, waveform)})
    descriptions = {name: text for name, (_, text) in models.items()}
    descriptions["from text"] = "the LLM reads the written sentence: what it could reach at best"
    write_page(
        config.run / "index.html",
        {
            "title": "A language model that has learned to listen",
            "subtitle": SUBTITLE,
            "lead": ZERO_SHOT if set(config.stage2.tasks) == {TRANSCRIBE} else "",
            "languages": {TRANSCRIBE: "English", **{code: grammar.LANGUAGES[code] for code in LANGUAGES}},
            "sets": SETS,
            "models": [
                {"name": name, "description": descriptions[name], "scores": by_set}
                for name, by_set in by_model.items()
            ],
            "curves": [
                {"name": name, "points": curve(folder / "metrics.jsonl")}
                for name, (folder, _) in models.items()
            ],
            "utterances": cards,
            "commands": [{"say": say, "command": command} for say, command in what_next(config.run, data)],
        },
    )
    print()
    print(table({f"{name}, {set_name}": by_model[name][set_name] for name in by_model for set_name in SETS}))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--from-scratch", action="store_true", help="both towers and stage 1 as well")
    parser.add_argument("--run", type=Path, help="the run's folder (runs/demo or runs/from-scratch)")
    parser.add_argument("--data", type=Path, help="where the speech goes (data/demo or data/tiny)")
    parser.add_argument("--train", type=int, help="sentences to train on (3000 or 20000)")
    parser.add_argument("--test", type=int, help="sentences of each test set (128 or 512)")
    parser.add_argument("--steps", type=int, help="of stage 2, when not from scratch (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train")
    args = parser.parse_args(argv)
    if args.from_scratch:
        if args.steps is not None:
            parser.error(
                "--steps is for the short demo; from scratch, --set stage1.steps= and stage2.steps=."
            )
        defaults = dict(run=Path("runs/from-scratch"), data=Path("data/tiny"), train=20_000, test=512)
        models = (args.run or defaults["run"]) / "models"
        what, minutes = "a HuBERT, a language model, both stages", "two hours"
    else:
        defaults = dict(run=Path("runs/demo"), data=Path("data/demo"), train=3000, test=128, steps=2000)
        models = MODELS
        what, minutes = "stage 2 alone, from the towers and the stage 1 in the package", "five minutes"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    print(
        f"The miniature: {args.train} spoken sentences; {what}; a page that shows what was learned.\n"
        f"About {minutes} on 2 cores, into {args.data} and {args.run}. "
        "Ctrl-C stops; the same command goes on.",
        flush=True,
    )
    try:
        make_world(args.data, train=args.train, test=args.test, seed=args.seed)
        if args.from_scratch:
            make_models(models, args.data, args.seed)
        config = read_config(CONFIG, overrides(args, models))
        run = train.Run(config)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        run.train()
        stage2, steps = config.run / "stage2", config.stage2.steps
        shown = {
            "yours": (stage2, f"the adapter trained just now: {steps} steps of {config.stage2.batch_size}")
        }
        if not args.from_scratch:
            shown["shipped"] = (MODELS / "sparqle", SHIPPED)
        report(config, args.data, shown)
    except loop.Stopped as stopped:
        print(f"{stopped}; the same command goes on from there.", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except (FloatingPointError, CorruptRecord, CheckpointError) as error:
        print(error, file=sys.stderr)
        return train.FAILED
    print(f"\nThe page: {config.run / 'index.html'}   The numbers: {config.run / 'results.json'}")
    print("Try next (in the environment: . .venv/bin/activate):")
    for say, command in what_next(config.run, args.data):
        print(f"  {command}   # {say}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
