"""Scores a model on a data set: WER and CER of its transcripts, BLEU and chrF of its translations.

    sparqle evaluate runs/mine/stage2 data/test --translate fr de --output runs/mine/test
    sparqle evaluate miniature data/demo/unseen    # the model in the package; only prints the table

--output gets answers.jsonl (a line for every utterance, in the order in which they were answered, with its
`index` in the data set), results.json (scores of all, by spoken language and by length) and index.html (the
same, with plots, and the worst utterances to listen to), in a folder or on gs://. The same command goes on
where it was stopped; with another --normalizer it scores the answers that are there anew.

An utterance is translated into the languages in which it has a reference. Recordings in which nobody speaks
(`prepare --allow-empty`) are also counted apart: what is answered to them is invented.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from etils import epath

from sparqle_jax import checkpoint, commands, hosts, prompts, sharding
from sparqle_jax.audio import SAMPLE_RATE, UnusableAudio
from sparqle_jax.data.dataset import DataSet, overlap_line
from sparqle_jax.evaluation_page import page
from sparqle_jax.scores import (
    NORMALIZERS,
    group,
    score,
    score_one,
    shown_scores,
    signatures,
    silence_line,
    table,
)
from sparqle_jax.sparqle import BATCH_SIZE, MINIATURE, SparQLe
from sparqle_jax.tasks import TRANSCRIBE, answer_of, check_tasks, has_answer, instructions

ANSWERS, RESULTS, PAGE, IDENTITY = "answers.jsonl", "results.json", "index.html", "evaluation.json"
FAILED, INTERRUPTED = 1, 130
KEEP_EVERY = 30  # seconds after which answers are written anew where they can't be appended

# --- Answers -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation: the answers that are wanted. settings: of `GenerationConfig`.

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
        """All that the answers depend on, as JSON. model: its folder. All hosts must call this."""
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
            long = 0 if self.from_text else int((lengths[some] > self.sparqle.max_samples).sum())
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
            initial=max(0.0, round(seconds.sum() - sum(seconds[batch].sum() for batch in left), 1)),
            desc="evaluate" + " from text" * self.from_text,
            unit="s of audio",
            disable=not hosts.is_first(),
        )
        with progress:
            for batch in left:
                yield batch, self._answer(batch)
                # Rounded for the eye, they may come to more than their sum, of which tqdm would warn.
                progress.update(min(round(seconds[batch].sum(), 1), progress.total - progress.n))

    def _answer(self, batch: list[int]) -> dict[str, list[str]]:
        sparqle, config = self.sparqle, self.sparqle.generation_config(**self.settings)
        utterances = [self.data_set[index] for index in batch]
        asked = {task: instructions(task)[0] for task in self.tasks if has_answer(utterances[0], task)}
        if self.from_text:
            texts = [utterance.text for utterance in utterances]
            return {task: sparqle.answer_text(texts, asked[task], config) for task in asked}
        if self.data_set.num_samples[batch].max() > self.sparqle.max_samples:
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
            if len(waveform) <= self.sparqle.max_samples:
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
    """The contents of results.json."""
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


def overlap_with_training(sparqle: SparQLe, data_set: DataSet) -> dict[str, int] | None:
    """`DataSet.overlap` with the data that a model was trained on; None where these are not here."""
    training = []
    for folder in sparqle.config.trained_on:
        try:
            training.append(DataSet(folder))
        except (OSError, ValueError):
            return None
    return data_set.overlap(training) if training else None


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
        results["overlap"] = overlap_with_training(sparqle, data_set)
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
        for name, one in shown_scores(scores, kind).items()
    }
    print(table({f"{name} ({named[name]['utterances']})": one for name, one in shown.items()}))
    if "without speech" in scores["all"]:
        print(silence_line(scores["all"]["without speech"]))
    if results["overlap"] is None:
        print("overlap with the training data: not known, as they are not here")
    else:
        print(overlap_line(results["overlap"], len(data_set)))
    print(f"normalizer of transcripts: {args.normalizer}")
    for task, names in results["signatures"].items():
        print(*(f"{name} {task}: {signature}" for name, signature in names.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
