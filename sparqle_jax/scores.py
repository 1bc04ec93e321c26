"""Scores of answers: WER and CER of transcripts, BLEU and chrF of translations; and tables of them."""

import bisect
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jiwer
from sacrebleu.metrics import BLEU, CHRF

from sparqle_jax.tasks import TRANSCRIBE

LENGTHS = (2, 5, 10, 20, 30)  # where the buckets of lengths end, in seconds
WITHOUT_SPACES = {"zh", "yue", "ja", "th", "lo", "km", "my"}  # languages that are not written in words
APOSTROPHES = "'\u2018\u2019\u02bc"


def basic(text: str) -> str:
    """Lower case and NFKC, without punctuation (Unicode's P): apostrophes vanish, the rest parts words."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(character for character in text if character not in APOSTROPHES)
    return " ".join("".join(" " if unicodedata.category(c)[0] == "P" else c for c in text).split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"none": str, "basic": basic}


def score(
    task: str, references: Sequence[str], answers: Sequence[str], *, normalizer: str = "none"
) -> dict[str, float]:
    """Scores transcripts by wer and cer (jiwer), translations by bleu and chrf (sacrebleu, 0 to 100).

    Of both: exact, the share of answers that are the reference, letter for letter. normalizer: what is done
    to transcripts before their words are compared. Words in answers to an empty reference are insertions, and
    count as such in wer; where no reference has a word, wer and cer are the number of words and letters in
    the answers, as jiwer has it.
    """
    exact = sum(a == r for a, r in zip(answers, references, strict=True)) / len(references)
    if task == TRANSCRIBE:
        wanted, given = (list(map(NORMALIZERS[normalizer], texts)) for texts in (references, answers))
        return {
            "wer": float(jiwer.wer(wanted, given)),
            "cer": float(jiwer.cer(wanted, given)),
            "exact": exact,
        }
    scores = {name: m.corpus_score(answers, [references]).score for name, m in metrics(task).items()}
    return {**scores, "exact": exact}


def without_speech(answers: Sequence[str], seconds: float, *, normalizer: str = "none") -> dict[str, Any]:
    """Counts what a model invents: its answers to recordings in which nobody speaks, `seconds` in all.

    utterances, seconds; with_words: how many answers have any words; words, words_per_utterance and
    words_per_minute, as the WER counts insertions.
    """
    given = list(map(NORMALIZERS[normalizer], answers))
    words = jiwer.process_words([""] * len(given), given).insertions
    return {
        "utterances": len(given),
        "seconds": seconds,
        "with_words": sum(bool(text.strip()) for text in given),
        "words": words,
        "words_per_utterance": words / len(given),
        "words_per_minute": 60 * words / seconds,
    }


def silence_line(found: dict[str, Any]) -> str:
    """The counts of `without_speech`, as text."""
    return (
        f"nobody speaks in {found['utterances']} ({duration_text(found['seconds'])}): {found['with_words']} "
        f"got words, {found['words']} in all, {found['words_per_utterance']:.2f} a recording, "
        f"{found['words_per_minute']:.1f} a minute"
    )


def score_one(task: str, reference: str, answer: str, *, normalizer: str = "none") -> dict[str, float]:
    """Scores of one answer: wer and cer, or chrf."""
    if task == TRANSCRIBE:
        scores = score(task, [reference], [answer], normalizer=normalizer)
        return {"wer": scores["wer"], "cer": scores["cer"]}
    return {"chrf": CHRF().sentence_score(answer, [reference]).score}


def metrics(language: str) -> dict[str, BLEU | CHRF]:
    """sacrebleu's bleu and chrf, with its tokenizer for the language, or one that takes each character."""
    code = code_of(language)
    try:
        bleu = BLEU(tokenize="char") if code in WITHOUT_SPACES - {"zh", "ja"} else BLEU(trg_lang=code)
    except RuntimeError:  # Japanese and Korean need MeCab
        bleu = BLEU(tokenize="char")
    return {"bleu": bleu, "chrf": CHRF()}


def signatures(language: str) -> dict[str, str]:
    """The signatures of sacrebleu: how bleu and chrf are computed."""
    found = metrics(language)
    for metric in found.values():
        metric.corpus_score([""], [[""]])  # before, it does not know the number of references
    return {name: str(metric.get_signature()) for name, metric in found.items()}


def code_of(language: str) -> str:
    """Without what follows a language's code: "zh" of "zh_TW"."""
    return language.replace("-", "_").partition("_")[0].lower()


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Scores of several evaluations as text: a row for each, with its name. A task may have `n` beside its
    scores: the number of its references."""
    columns = columns_of(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    counted = {task for by_task in scores.values() for task in by_task if "n" in by_task[task]}
    columns = [column for column in columns if column[1] != "n" or column[0] in counted]
    width = max(map(len, scores))
    lines = [" " * width + "".join(f"{title:>10}" for *_, title in columns)]
    for name, by_task in scores.items():
        cells = [f"{cell_text(by_task, task, key):>10}" for task, key, _ in columns]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def columns_of(tasks: Iterable[str]) -> list[tuple[str, str, str]]:
    """Task, name and title of each score in a table."""
    return [
        (task, *column)
        for task in tasks
        for column in (
            [("wer", "WER"), ("cer", "CER")]
            if task == TRANSCRIBE
            else [("n", f"n {task}"), ("bleu", f"BLEU {task}"), ("chrf", f"chrF {task}")]
        )
    ]


def cell_text(by_task: dict[str, Any], task: str, key: str) -> str:
    """A score in a table; a dash where nothing could be scored."""
    value = by_task.get(task, {}).get(key)
    return "-" if value is None else number_text(key, value)


def shown_scores(scores: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The scores of the groups of a kind (see `group`) for tables: with the number of references to tasks for
    which not all utterances have one, and without a WER where nobody speaks."""
    counted = [task for task, n in scores["all"]["references"].items() if n < scores["all"]["utterances"]]
    shown = {}
    for key, one in ({"all": scores["all"]} if name == "all" else scores[name]).items():
        by_task = {task: dict(some) for task, some in one["scores"].items()}
        if one.get("without speech", {}).get("utterances") == one["utterances"]:
            by_task.pop(TRANSCRIBE)
        for task in counted:
            by_task.setdefault(task, {})["n"] = one["references"][task]
        shown[key] = by_task
    return shown


def number_text(name: str, value: float) -> str:
    """A number as a table has it: wer and cer in percent."""
    if name == "n":
        return str(value)
    return f"{value:.1f}" if name in ("bleu", "chrf") else f"{value:.1%}"


def length_name(seconds: float) -> str:
    """The bucket of a length: "0-2 s" up to 2 s, "2-5 s", ..., "over 30 s"."""
    place = bisect.bisect_left(LENGTHS, seconds)
    return f"over {LENGTHS[-1]} s" if place == len(LENGTHS) else f"{(0, *LENGTHS)[place]}-{LENGTHS[place]} s"


def group(rows: Sequence[dict[str, Any]], tasks: Sequence[str], normalizer: str) -> dict[str, Any]:
    """Scores of rows of answers.jsonl: of all, by spoken language and by length; each with its number of
    references by task, and with what `without_speech` finds if nobody speaks in some."""

    def scored(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        scores, references = {}, {}
        for task in tasks:
            both = [[row[task][what] for row in some if task in row] for what in ("reference", "answer")]
            references[task] = len(both[0])
            if both[0]:
                scores[task] = score(task, *both, normalizer=normalizer)
        silent = [row for row in some if not row[TRANSCRIBE]["reference"]]
        found = {
            "utterances": len(some),
            "seconds": math.fsum(row["seconds"] for row in some),
            "references": references,
            "scores": scores,
        }
        if silent:
            answers = [row[TRANSCRIBE]["answer"] for row in silent]
            seconds = math.fsum(row["seconds"] for row in silent)
            found["without speech"] = without_speech(answers, seconds, normalizer=normalizer)
        return found

    def by(name: Callable[[dict[str, Any]], str], order: Iterable[dict[str, Any]]) -> dict[str, Any]:
        names = dict.fromkeys(map(name, order))
        return {one: scored([row for row in rows if name(row) == one]) for one in names}

    return {
        "all": scored(rows),
        "by language": by(lambda row: row["language"], sorted(rows, key=lambda row: row["language"])),
        "by length": by(
            lambda row: length_name(row["seconds"]), sorted(rows, key=lambda row: row["seconds"])
        ),
    }


def duration_text(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02} h" if hours else f"{rest // 60}:{rest % 60:02} min"
