"""How good a model is on a data set: WER and CER of its transcripts, BLEU and chrF of its translations.

    sparqle evaluate runs/mine/stage2 data/test --translate fr de --output runs/mine/test
    sparqle evaluate miniature data/demo/unheard    # the model in the package; only prints the table

--output gets answers.jsonl (a line for every utterance, in the order in which they were answered, with its
`index` in the data set), results.json (scores of all, by spoken language and by length) and index.html (the
same, with plots, and the worst utterances to listen to), in a folder or on gs://. The same command goes on
where it was stopped; with another --normalizer it scores the answers that are there anew.

An utterance is translated into the languages in which it has a reference. Recordings in which nobody speaks
(`prepare --allow-empty`) are also counted apart: what is answered to them is invented.
"""

import argparse
import bisect
import dataclasses
import itertools
import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jiwer
import numpy as np
import tqdm
from etils import epath
from sacrebleu.metrics import BLEU, CHRF

from sparqle_jax import checkpoint, commands, hosts, prompts, sharding
from sparqle_jax.audio import SAMPLE_RATE, UnusableAudio, as_wav
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.data.pipeline import (
    TRANSCRIBE,
    answer_of,
    check_tasks,
    has_answer,
    instructions,
    language_name,
)
from sparqle_jax.sparqle import BATCH_SIZE, MINIATURE, SparQLe

ANSWERS, RESULTS, PAGE, IDENTITY = "answers.jsonl", "results.json", "index.html", "evaluation.json"
TEMPLATE = Path(__file__).with_suffix(".html")
LENGTHS = (2, 5, 10, 20, 30)  # where the buckets of lengths end, in seconds
WITHOUT_SPACES = {"zh", "yue", "ja", "th", "lo", "km", "my"}  # languages that are not written in words
APOSTROPHES = "'\u2018\u2019\u02bc"
# On the page.
WORST = 50  # utterances for each task
MAX_AUDIO = 30_000_000  # characters of audio in all
MAX_POINTS = 2000
FAILED, INTERRUPTED = 1, 130
KEEP_EVERY = 30  # seconds after which answers are written anew where they can't be appended

# --- Scores --------------------------------------------------------------------------------------------


def basic(text: str) -> str:
    """Lower case and NFKC, without punctuation (Unicode's P): apostrophes vanish, the rest parts words."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(character for character in text if character not in APOSTROPHES)
    return " ".join("".join(" " if unicodedata.category(c)[0] == "P" else c for c in text).split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"none": str, "basic": basic}


def score(
    task: str, references: Sequence[str], answers: Sequence[str], *, normalizer: str = "none"
) -> dict[str, float]:
    """Of transcripts: wer and cer (jiwer, fractions). Of translations: bleu and chrf (sacrebleu, 0 to 100).

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
    """What a model invents: its answers to recordings in which nobody speaks, `seconds` in all.

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
    """What `without_speech` has found, as text."""
    return (
        f"nobody speaks in {found['utterances']} ({_duration(found['seconds'])}): {found['with_words']} got "
        f"words, {found['words']} in all, {found['words_per_utterance']:.2f} a recording, "
        f"{found['words_per_minute']:.1f} a minute"
    )


def score_one(task: str, reference: str, answer: str, *, normalizer: str = "none") -> dict[str, float]:
    """Of one answer: wer and cer, or chrf."""
    if task == TRANSCRIBE:
        scores = score(task, [reference], [answer], normalizer=normalizer)
        return {"wer": scores["wer"], "cer": scores["cer"]}
    return {"chrf": CHRF().sentence_score(answer, [reference]).score}


def metrics(language: str) -> dict[str, BLEU | CHRF]:
    """sacrebleu's bleu and chrf, with its tokenizer for the language, or one that takes each character."""
    code = _code(language)
    try:
        bleu = BLEU(tokenize="char") if code in WITHOUT_SPACES - {"zh", "ja"} else BLEU(trg_lang=code)
    except RuntimeError:  # Japanese and Korean need MeCab
        bleu = BLEU(tokenize="char")
    return {"bleu": bleu, "chrf": CHRF()}


def signatures(language: str) -> dict[str, str]:
    """What sacrebleu says of how bleu and chrf are computed."""
    found = metrics(language)
    for metric in found.values():
        metric.corpus_score([""], [[""]])  # before, it does not know the number of references
    return {name: str(metric.get_signature()) for name, metric in found.items()}


def _code(language: str) -> str:
    """Without what follows a language's code: "zh" of "zh_TW"."""
    return language.replace("-", "_").partition("_")[0].lower()


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Scores of several evaluations as text: a row for each, with its name. A task may have `n` beside its
    scores: the number of its references."""
    columns = _columns(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    counted = {task for by_task in scores.values() for task in by_task if "n" in by_task[task]}
    columns = [column for column in columns if column[1] != "n" or column[0] in counted]
    width = max(map(len, scores))
    lines = [" " * width + "".join(f"{title:>10}" for *_, title in columns)]
    for name, by_task in scores.items():
        cells = [f"{_cell(by_task, task, key):>10}" for task, key, _ in columns]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _columns(tasks: Iterable[str]) -> list[tuple[str, str, str]]:
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


def _cell(by_task: dict[str, Any], task: str, key: str) -> str:
    """A score in a table; a dash where nothing could be scored."""
    value = by_task.get(task, {}).get(key)
    return "-" if value is None else _number(key, value)


def _shown(scores: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
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


def _number(name: str, value: float) -> str:
    """As a table has it: wer and cer in percent."""
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


# --- Answers -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Which answers are wanted. settings: of `GenerationConfig`.

    Raises ValueError for a language without references, and for settings that are not valid.
    """

    sparqle: SparQLe
    data_set: DataSet
    languages: Sequence[str] = ()
    from_text: bool = False
    batch_size: int = BATCH_SIZE
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"a batch size of {self.batch_size}: at least 1.")
        check_tasks(self.data_set, self.languages)
        self.sparqle.generation_config(**self.settings)

    @property
    def tasks(self) -> list[str]:
        return [TRANSCRIBE, *dict.fromkeys(self.languages)]

    def identity(self, model: str) -> dict[str, Any]:
        """What makes the answers what they are, as JSON. model: its folder. All hosts must call this."""
        config = self.sparqle.config.model_dump(include={"max_seconds", "dtype", "compat", "system"})
        identity = {
            "model": {"hash": checkpoint.fingerprint(self.sparqle.model), "folder": model},
            "tokenizer": prompts.fingerprint(self.sparqle.prompter.tokenizer),
            "config": config,
            "data set": {"hash": self.data_set.fingerprint, "folder": os.fspath(self.data_set.folder)},
            "tasks": self.tasks,
            "from text": self.from_text,
            "generation": dataclasses.asdict(self.sparqle.generation_config(**self.settings)),
        }
        return json.loads(json.dumps(identity))

    def batches(self) -> list[list[int]]:
        """The utterances of each batch, by number: the longest first, which need the most memory.

        All of a batch have references for the same tasks. What is too long to be heard at once is in batches
        of its own.
        """
        lengths = self.data_set.num_samples
        order = np.argsort(-lengths, kind="stable")
        having = sum(self.data_set.has(task).astype(int) << i for i, task in enumerate(self.tasks))[order]
        size = 1 if self.sparqle.config.compat == "published" else self.batch_size  # whose mask is inverted
        batches = []
        for same in dict.fromkeys(having.tolist()):
            some = order[having == same]
            long = 0 if self.from_text else int((lengths[some] > self._at_once).sum())
            for part in (some[:long].tolist(), some[long:].tolist()):
                batches += [part[i : i + size] for i in range(0, len(part), size)]
        return batches

    def answers(self, done: int = 0) -> Iterator[tuple[list[int], dict[str, list[str]]]]:
        """Batches, and by task the answers to them; batches among the first `done` utterances are left out.

        The answer to a silent recording in which nobody speaks is empty, without the model: nothing can be
        heard. Raises ValueError for others that can't be heard, naming the utterance. All hosts must call
        this.
        """
        seconds = self.data_set.num_samples / SAMPLE_RATE
        batches = self.batches()
        ends = np.cumsum([len(batch) for batch in batches])
        left = batches[int(np.searchsorted(ends, done, side="right")) :]
        if left and not self.from_text:
            self._heard([int(seconds.argmin())])  # what is too short is said before the work begins
        progress = tqdm.tqdm(
            total=round(seconds.sum(), 1),
            initial=round(seconds.sum() - sum(seconds[batch].sum() for batch in left), 1),
            desc="evaluate" + " from text" * self.from_text,
            unit="s of audio",
            disable=not hosts.is_first(),
        )
        with progress:
            for batch in left:
                yield batch, self._answer(batch)
                progress.update(round(seconds[batch].sum(), 1))

    @property
    def _at_once(self) -> int:
        return round(self.sparqle.config.max_seconds * SAMPLE_RATE)

    def _answer(self, batch: list[int]) -> dict[str, list[str]]:
        sparqle, config = self.sparqle, self.sparqle.generation_config(**self.settings)
        utterances = [self.data_set[index] for index in batch]
        asked = {task: instructions(task)[0] for task in self.tasks if has_answer(utterances[0], task)}
        if self.from_text:
            texts = [utterance.text for utterance in utterances]
            return {task: sparqle.answer_text(texts, asked[task], config) for task in asked}
        if self.data_set.num_samples[batch].max() > self._at_once:
            return {task: self._listen(batch, asked[task]) for task in asked}
        waveforms = self._heard(batch)
        answers = {task: [""] * len(batch) for task in asked}
        if heard := [place for place, waveform in enumerate(waveforms) if waveform is not None]:
            frames = sparqle.encode([waveforms[place] for place in heard])  # once, for all tasks
            for task, texts in answers.items():
                given = sparqle.answer(frames, len(heard), asked[task], config)
                for place, text in zip(heard, given, strict=True):
                    texts[place] = text
        return answers

    def _heard(self, batch: list[int]) -> list[np.ndarray | None]:
        """The recordings of a batch; None for silence in which nobody speaks."""
        waveforms: list[np.ndarray | None] = [self.data_set.waveform(index) for index in batch]
        for place, (index, waveform) in enumerate(zip(batch, waveforms, strict=True)):
            if len(waveform) <= self._at_once:
                try:
                    self.sparqle.check(waveform)
                except UnusableAudio as error:
                    if not self._is_right(index, error):
                        raise self._named(index, error) from error
                    waveforms[place] = None
        return waveforms

    def _is_right(self, index: int, error: Exception) -> bool:
        """Whether nothing can be heard where nobody speaks."""
        return getattr(error, "reason", "") == "silent" and not self.data_set[index].text

    def _listen(self, batch: list[int], instruction: str) -> list[str]:
        """The answers to recordings that are heard window by window."""
        recordings = ((self.data_set.waveform(index), SAMPLE_RATE) for index in batch)
        texts = []
        heard = self.sparqle.run(recordings, instruction, batch_size=self.batch_size, **self.settings)
        for index, result in zip(batch, heard, strict=True):
            if isinstance(result, Exception) and not self._is_right(index, result):
                raise self._named(index, result) from result
            texts.append("" if isinstance(result, Exception) else result.text)
        return texts

    def _named(self, index: int, error: Exception) -> ValueError:
        return ValueError(f"utterance {self.data_set[index].id} of {self.data_set.folder}: {error}")


def evaluate(
    sparqle: SparQLe,
    data_set: DataSet,
    languages: Sequence[str] = (),
    *,
    from_text: bool = False,
    normalizer: str = "none",
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Scores by task, and for every utterance its answers to the tasks for which it has a reference.

    from_text: the LLM reads the written text instead of hearing it: what it could reach at best. Scores are
    those of `score`, for "transcribe" and each language. Raises ValueError for a language without references,
    and for a recording that can't be heard, naming the utterance.
    """
    evaluation = Evaluation(sparqle, data_set, languages, from_text)
    answers: list[dict[str, str]] = [{} for _ in data_set]
    for batch, by_task in evaluation.answers():
        for task, texts in by_task.items():
            for index, text in zip(batch, texts, strict=True):
                answers[index][task] = text
    scores = {
        task: score(
            task,
            list(data_set.texts(task)),
            [row[task] for row in answers if task in row],
            normalizer=normalizer,
        )
        for task in evaluation.tasks
    }
    return scores, answers


# --- Files ---------------------------------------------------------------------------------------------


def rows_there(folder: epath.Path, identity: dict[str, Any], order: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of answers.jsonl that there are, whole ones; what was cut off behind them is deleted.

    A new folder gets the identity. Raises ValueError for answers of another evaluation, naming what differs,
    and for a file that is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, header = folder / ANSWERS, folder / IDENTITY
    if not file.exists():
        commands.write_text(header, json.dumps(identity, indent=1) + "\n")
        commands.write_text(file, "")
        return []
    there = json.loads(header.read_text()) if header.exists() else {}
    if found := checkpoint.differences(there, identity):
        raise ValueError(
            f"{folder} has answers of another evaluation:\n  " + "\n  ".join(found) + "\n"
            "Give another --output, or delete that one."
        )
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content) and commands.can_append(file):
        os.truncate(file, len(whole))
    rows = []
    for number, line in enumerate(whole.split(b"\n")[:-1]):
        try:
            rows.append(json.loads(line))
            wrong = rows[-1]["index"] != order[number]
        except (ValueError, LookupError, TypeError):
            wrong = True
        if wrong:
            raise ValueError(f"{file} is damaged in line {number + 1}: delete it to begin again.")
    return rows


def collect(
    evaluation: Evaluation, identity: dict[str, Any], output: epath.Path | None
) -> list[dict[str, Any]]:
    """A row for every utterance, in the order in which they are answered; on the first host all of them.

    With a folder, rows that are there are kept, and others added batch by batch; on gs://, where nothing can
    be appended, all are written anew every KEEP_EVERY seconds and in the end. Raises ValueError.
    """
    order = [index for batch in evaluation.batches() for index in batch]
    rows, failed = [], ""
    if output is not None and hosts.is_first():
        try:
            rows = rows_there(output, identity, order)
        except Exception as error:  # of the answers, of a disk, or of a bucket's library
            failed = str(error) or repr(error)
    done = hosts.broadcast(-1 if failed else len(rows))
    if done < 0:
        raise ValueError(failed or "the first host can't go on, and says why.")
    file = output / ANSWERS if output is not None and hosts.is_first() else None
    try:
        _add_rows(evaluation, rows, done, file)
    finally:
        if file is not None and not commands.can_append(file):
            commands.write_text(file, "".join(map(_line, rows)))
    return rows


def _add_rows(evaluation: Evaluation, rows: list[dict[str, Any]], done: int, file: epath.Path | None) -> None:
    """Adds the rows that are lacking, and writes them to a file as they come. done: of the first host's."""
    written = time.monotonic()
    for batch, by_task in evaluation.answers(done):
        new = []
        for place, index in enumerate(batch):
            utterance = evaluation.data_set[index]
            row = {
                "index": index,
                "id": utterance.id,
                "seconds": utterance.duration,
                "language": utterance.language,
                "speaker": utterance.speaker,
            }
            for task, texts in by_task.items():
                row[task] = {"reference": answer_of(utterance, task), "answer": texts[place]}
            new.append(row)
        # Of a batch that was written in part all is answered anew, so that the answers are the same.
        known = {row["index"] for row in rows[-len(batch) :]}
        new = [row for row in new if row["index"] not in known]
        rows += new
        if file is not None and commands.can_append(file):
            with file.open("a", encoding="utf-8") as answers:
                answers.writelines(map(_line, new))
        elif file is not None and time.monotonic() - written > KEEP_EVERY:
            commands.write_text(file, "".join(map(_line, rows)))
            written = time.monotonic()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def summarize(identity: dict[str, Any], rows: Sequence[dict[str, Any]], normalizer: str) -> dict[str, Any]:
    """What results.json says."""
    return {
        **identity,
        "normalizer": normalizer,
        "signatures": {task: signatures(task) for task in identity["tasks"] if task != TRANSCRIBE},
        "scores": group(rows, identity["tasks"], normalizer),
    }


def write_results(
    folder: epath.Path, results: dict[str, Any], rows: Sequence[dict[str, Any]], data_set: DataSet
) -> None:
    """Writes results.json, index.html, and answers.jsonl anew, with the scores of every answer."""
    for row in rows:
        for task in results["tasks"]:
            if task not in row:
                continue
            text = row[task]
            text |= score_one(task, text["reference"], text["answer"], normalizer=results["normalizer"])
    commands.write_text(folder / ANSWERS, "".join(map(_line, rows)))
    commands.write_text(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    commands.write_text(folder / PAGE, page(results, rows, data_set))


# --- The page ------------------------------------------------------------------------------------------

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
    shown = {"": _shown(scores, "all")} | {
        name: _shown(scores, name) for name in ("by language", "by length")
    }
    counted = {task for task, some in shown[""]["all"].items() if "n" in some}
    spoken = [row for row in rows if row[TRANSCRIBE]["reference"]]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": _number, "language": _language}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{results['model']['folder']} on {data_set.folder.name}",
        duration=_duration,
        results=results,
        columns=[column for column in _columns(tasks) if column[1] != "n" or column[0] in counted],
        groups={
            "": {"all": scores["all"]},
            "by language": scores["by language"],
            "by length": scores["by length"],
        },
        shown=shown,
        cell=_cell,
        silence_line=silence_line,
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
    """How many are 0, up to 10 %, ..., up to 100 %, and more."""
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
    by_character = _code(language) in WITHOUT_SPACES
    normalizer = normalizer if task == TRANSCRIBE else "none"
    titles = {"wer": "WER", "cer": "CER", "chrf": "chrF"}
    scores = [(titles[name], _number(name, text[name])) for name in titles if name in text]
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


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02} h" if hours else f"{rest // 60}:{rest % 60:02} min"


# --- The command ---------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = commands.make_parser("evaluate", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder, or: miniature")
    parser.add_argument("data", metavar="DATASET", help="a data set that `sparqle prepare` has made")
    commands.add_tower_arguments(parser)
    parser.add_argument(
        "--translate", nargs="*", default=[], metavar="CODE", help="languages, such as fr de es"
    )
    parser.add_argument("--from-text", action="store_true", help="the LLM reads the text: its upper bound")
    parser.add_argument(
        "--normalizer",
        choices=NORMALIZERS,
        default="basic",
        help="of transcripts, before their words are compared: none, or basic: lower case, no punctuation",
    )
    parser.add_argument("--output", type=epath.Path, metavar="DIR", help="for what it finds; also gs://")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"({BATCH_SIZE})")
    parser.add_argument(
        "--mesh",
        type=int,
        nargs=3,
        metavar=("DATA", "FSDP", "MODEL"),
        help="split the model and its batches over devices; one of them may be -1: what is left",
    )
    parser.add_argument(
        "--distributed",
        nargs="*",
        metavar="WHERE",
        help="one of several hosts (--mesh -1 1 1), as for `train`",
    )
    commands.add_generation_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """0 for done, FAILED, or INTERRUPTED; exits with 2 for a mistake in the command."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.distributed is not None:
            hosts.join(args.distributed)
        data_set = DataSet(args.data)
        sizes = args.mesh or ((-1, 1, 1) if args.distributed is not None else None)
        mesh = None if sizes is None else sharding.make_mesh(tuple(sizes))
        folder = MINIATURE if str(args.model) == "miniature" else args.model
        sparqle = SparQLe.from_pretrained(folder, encoder=args.encoder, llm=args.llm, mesh=mesh)
        evaluation = Evaluation(
            sparqle,
            data_set,
            args.translate,
            args.from_text,
            args.batch_size,
            commands.generation_settings(args),
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))  # with status 2
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        identity = evaluation.identity(str(args.model))
        rows = collect(evaluation, identity, args.output)
        if not hosts.is_first():
            return 0
        results = summarize(identity, rows, args.normalizer)
        if args.output is not None:
            write_results(args.output, results, rows, data_set)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        if args.output is not None:
            hosts.print_once("stopped; the same command goes on from there.")
        return INTERRUPTED
    scores = results["scores"]
    named = {"all": scores["all"], **scores["by language"], **scores["by length"]}
    shown = {
        name: one
        for kind in ("all", "by language", "by length")
        for name, one in _shown(scores, kind).items()
    }
    print(table({f"{name} ({named[name]['utterances']})": one for name, one in shown.items()}))
    if "without speech" in scores["all"]:
        print(silence_line(scores["all"]["without speech"]))
    print(f"normalizer of transcripts: {args.normalizer}")
    for task, names in results["signatures"].items():
        print(*(f"{name} {task}: {signature}" for name, signature in names.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
