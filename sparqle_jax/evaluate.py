"""How good a model is on a data set: WER of its transcripts, BLEU and chrF of its translations.

python -m sparqle_jax.evaluate DATASET [--model FOLDER] [--translate fr de es] [--output results.json]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import sacrebleu
import tqdm

from sparqle_jax import hosts
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.data.pipeline import TRANSCRIBE, answer_of, check_tasks
from sparqle_jax.transcribe import MINIATURE, Listener

BATCH_SIZE = 32


def evaluate(
    listener: Listener,
    data_set: DataSet,
    languages: Sequence[str] = (),
    *,
    from_text: bool = False,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Scores by task, and for every utterance its answers by task.

    from_text: the LLM reads the written text instead of hearing it: what it could reach at best. Scores are
    those of `score`, for "transcribe" and each language. Raises ValueError for a language without references,
    and for a recording that can't be heard, naming the utterance.
    """
    check_tasks(data_set, languages)
    utterances, tasks = list(data_set), [TRANSCRIBE, *languages]
    references = {task: [answer_of(utterance, task) for utterance in utterances] for task in tasks}
    answers: dict[str, list[str]] = {task: [] for task in tasks}
    progress = tqdm.tqdm(
        total=len(utterances) * len(tasks),
        desc="evaluate" + " from text" * from_text,
        unit="answer",
        disable=not hosts.is_first(),
    )
    batch_size = min(BATCH_SIZE, len(utterances))
    for start in range(0, len(utterances), batch_size):
        some = utterances[start : start + batch_size]
        if not from_text:  # heard once, for all tasks
            waveforms = [_read(listener, data_set, start + i) for i in range(len(some))]
            frames = listener.encode(waveforms, batch_size)
        for task in tasks:
            if from_text:
                texts = [utterance.text for utterance in some]
                answers[task] += listener.answer_text(texts, task, batch_size=batch_size)
            else:
                answers[task] += listener.answer_frames(frames, len(some), task)
            progress.update(len(some))
    progress.close()
    scores = {task: score(task, references[task], answers[task]) for task in tasks}
    return scores, [{task: answers[task][i] for task in tasks} for i in range(len(utterances))]


def _read(listener: Listener, data_set: DataSet, index: int) -> np.ndarray:
    """Raises ValueError, naming the utterance, for a recording in which nothing can be heard."""
    waveform = data_set.waveform(index)
    try:
        listener.check(waveform)
    except ValueError as error:
        raise ValueError(f"utterance {data_set[index].id} of {data_set.folder}: {error}") from error
    return waveform


def score(task: str, references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Of transcripts: wer (jiwer, a fraction). Of translations: bleu and chrf (sacrebleu, 0 to 100).

    Of both: exact, the share of answers that are just the reference.
    """
    exact = sum(a == r for a, r in zip(answers, references, strict=True)) / len(references)
    if task == TRANSCRIBE:
        return {"wer": jiwer.wer(list(references), list(answers)), "exact": exact}
    return {
        "bleu": sacrebleu.corpus_bleu(answers, [references]).score,
        "chrf": sacrebleu.corpus_chrf(answers, [references]).score,
        "exact": exact,
    }


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Scores of several evaluations as text: a row for each, with its name."""
    tasks = list(next(iter(scores.values())))
    width = max(map(len, scores))
    lines = [" " * width + "".join(f"{'WER' if t == TRANSCRIBE else 'BLEU ' + t:>10}" for t in tasks)]
    for name, by_task in scores.items():
        cells = [
            f"{by_task[t]['wer']:>10.1%}" if t == TRANSCRIBE else f"{by_task[t]['bleu']:>10.1f}"
            for t in tasks
        ]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sparqle_jax.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("data", help="a data set that sparqle_jax.data.prepare has made")
    parser.add_argument("--model", type=Path, default=MINIATURE, help="a model folder")
    parser.add_argument(
        "--translate", nargs="*", default=[], metavar="CODE", help="languages, such as fr de es"
    )
    parser.add_argument("--from-text", action="store_true", help="the LLM reads the text: its upper bound")
    parser.add_argument("--output", type=Path, help="a JSON file for scores and all answers")
    args = parser.parse_args(argv)
    if args.output and not args.output.parent.is_dir():
        parser.error(f"{args.output.parent} is no folder: --output needs one that is there.")
    try:
        data_set, listener = DataSet(args.data), Listener.from_folder(args.model)
        scores, answers = evaluate(listener, data_set, args.translate, from_text=args.from_text)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(table({data_set.folder.name: scores}))
    if args.output:
        rows = [{"id": u.id, **texts} for u, texts in zip(data_set, answers, strict=True)]
        args.output.write_text(json.dumps({"scores": scores, "answers": rows}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
