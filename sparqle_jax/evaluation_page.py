"""The page of an evaluation: tables, plots, and the worst utterances to listen to, in one file."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jiwer
import numpy as np

from sparqle_jax.audio import SAMPLE_RATE, as_wav
from sparqle_jax.data.dataset import DataSet, overlap_line
from sparqle_jax.scores import (
    NORMALIZERS,
    WITHOUT_SPACES,
    cell_text,
    code_of,
    columns_of,
    duration_text,
    number_text,
    shown_scores,
    silence_line,
)
from sparqle_jax.tasks import TRANSCRIBE, language_name

TEMPLATE = Path(__file__).with_name("evaluate.html")
WORST = 50  # utterances for each task
MAX_AUDIO = 30_000_000  # characters of audio in all
MAX_POINTS = 2000


Piece = tuple[str, str]  # "same", "sub", "del" or "ins", and words


def differences(
    reference: str, answer: str, normalizer: str = "none", *, by_character: bool = False
) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, as the words that are compared for the WER differ; or the characters.

    "del" is in the reference alone, "ins" in the answer alone, "sub" in both.
    """
    parted = [list(text) if by_character else text.split() for text in (reference, answer)]
    # Of each text the words that are compared, and from which part each comes.
    words: list[list[str]] = []
    parts: list[list[int]] = []
    for some in parted:
        found = [(word, i) for i, part in enumerate(some) for word in NORMALIZERS[normalizer](part).split()]
        words.append([word for word, _ in found])
        parts.append([i for _, i in found])
    (chunks,) = jiwer.process_words(*(" ".join(some) for some in words)).alignments
    kinds = [["same"] * len(some) for some in parted]
    for chunk in chunks:
        kind = {"equal": "same", "substitute": "sub", "delete": "del", "insert": "ins"}[chunk.type]
        ranges = ((chunk.ref_start_idx, chunk.ref_end_idx), (chunk.hyp_start_idx, chunk.hyp_end_idx))
        for side, (start, end) in enumerate(ranges):
            for i in parts[side][start:end]:
                if kind != "same":
                    kinds[side][i] = kind
    between = "" if by_character else " "
    both = []
    for some, kind in zip(parted, kinds, strict=True):
        runs = itertools.groupby(zip(kind, some, strict=True), key=lambda pair: pair[0])
        both.append([(name, between.join(part for _, part in run)) for name, run in runs])
    return both[0], both[1]


def page(results: dict[str, Any], rows: Sequence[dict[str, Any]], data_set: DataSet) -> str:
    """The HTML page of an evaluation, with all that it needs in it. rows: with the scores of every answer."""
    tasks = results["tasks"]
    worst = {task: worst_of(rows, task) for task in tasks}
    clips: dict[int, str] = {}
    room = MAX_AUDIO
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*worst.values()))  # the worst of each first
    for row in filter(None, in_turn):
        if row["index"] not in clips and row["seconds"] * SAMPLE_RATE * 8 / 3 < room:
            clips[row["index"]] = as_wav(data_set.samples(row["index"]))
            room -= len(clips[row["index"]])
    scores = results["scores"]
    shown = {"": shown_scores(scores, "all")} | {
        name: shown_scores(scores, name) for name in ("by language", "by length")
    }
    counted = {task for task, some in shown[""]["all"].items() if "n" in some}
    spoken = [row for row in rows if row[TRANSCRIBE]["reference"]]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number_text, "language": _language}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{results['model']['folder']} on {data_set.folder.name}",
        duration=duration_text,
        results=results,
        columns=[column for column in columns_of(tasks) if column[1] != "n" or column[0] in counted],
        groups={
            "": {"all": scores["all"]},
            "by language": scores["by language"],
            "by length": scores["by length"],
        },
        shown=shown,
        cell=cell_text,
        silence_line=silence_line,
        overlap_line=overlap_line,
        bars=histogram([row[TRANSCRIBE]["wer"] for row in spoken]) if spoken else [],
        num_spoken=len(spoken),
        points=[
            (row["seconds"], row[TRANSCRIBE]["wer"]) for row in spoken[:: -(-len(spoken) // MAX_POINTS) or 1]
        ],
        longest=(longest := max(row["seconds"] for row in rows)),
        marks=_marks(longest),
        worst={
            task: [_card(row, task, results["normalizer"]) for row in some] for task, some in worst.items()
        },
        clips=clips,
        max_megabytes=MAX_AUDIO // 1_000_000,
    )


def worst_of(rows: Iterable[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """The rows with the WORST answers to a task, the worst first; none that is right."""
    if task == TRANSCRIBE:
        wrong = [row for row in rows if row[task]["wer"]]
        return sorted(wrong, key=lambda row: (-row[task]["wer"], -row[task]["cer"], row["index"]))[:WORST]
    wrong = [row for row in rows if task in row and row[task]["answer"] != row[task]["reference"]]
    return sorted(wrong, key=lambda row: (row[task]["chrf"], row["index"]))[:WORST]


def histogram(wers: Sequence[float]) -> list[tuple[str, int]]:
    """The numbers that are 0, up to 10 %, ..., up to 100 %, and more."""
    counts = np.bincount([min(math.ceil(10 * wer - 1e-9), 11) for wer in wers], minlength=12).tolist()
    return list(zip(["0", *(f"\u2264{10 * i}" for i in range(1, 11)), ">100"], counts, strict=True))


def _marks(longest: float) -> list[float]:
    """Round numbers from 0 on, at most six."""
    power = 10.0 ** math.floor(math.log10(longest / 5))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= longest / 5)
    return [step * i for i in range(math.floor(longest / step) + 1)]


def _card(row: dict[str, Any], task: str, normalizer: str) -> dict[str, Any]:
    """An utterance as the page takes it: the task's language, the scores, both texts in pieces."""
    language, text = row["language"] if task == TRANSCRIBE else task, row[task]
    by_character = code_of(language) in WITHOUT_SPACES
    normalizer = normalizer if task == TRANSCRIBE else "none"
    titles = {"wer": "WER", "cer": "CER", "chrf": "chrF"}
    scores = [(titles[name], number_text(name, text[name])) for name in titles if name in text]
    if not text["reference"]:
        scores = [("nobody speaks, extra words", f"{text['wer']:.0f}")]
    return {
        "row": row,
        "lang": language,
        "scores": scores,
        "pieces": differences(text["reference"], text["answer"], normalizer, by_character=by_character),
        "between": "" if by_character else " ",
    }


def _language(code: str) -> str:
    try:
        return language_name(code)
    except ValueError:
        return code
