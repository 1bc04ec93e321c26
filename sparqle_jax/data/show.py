"""Shows a data set: how much, how long, how it would be cut into batches, what the tokenizer can't read.

    python -m sparqle_jax.data.show data/mine --tokenizer Meta-Llama-3-8B-Instruct

Prints it, and leaves a picture of the lengths and some examples to listen to in a folder.
"""

import argparse
import collections
import json
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import tqdm
from matplotlib.figure import Figure

from sparqle_jax import prompts
from sparqle_jax.audio import SAMPLE_RATE
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.data.plan import BatchPlan, choose_buckets
from sparqle_jax.tasks import TRANSCRIBE

CHUNK = 1000  # texts that are tokenised at once


def bucket_table(plan: BatchPlan) -> str:
    """A row for each bucket: its length, batches of how many, how many of them in an epoch, padding."""
    lines = [f"{'bucket':>10}{'batch of':>10}{'batches':>9}{'padding':>9}"]
    for i, (bucket, rows) in enumerate(zip(plan.buckets, plan.epoch(0), strict=True)):
        end = bucket.num_samples / SAMPLE_RATE
        lines.append(f"{end:>8.2f} s{bucket.batch_size:>10}{len(rows):>9}{plan.padding(i):>9.1%}")
    lines.append(f"{'all':>10}{'':>10}{plan.batches_per_epoch:>9}{plan.padding():>9.1%}")
    if plan.left_out:
        lines.append(f"{plan.left_out} recordings fill no batch; they come first in the next epoch.")
    return "\n".join(lines)


def token_report(data: DataSet, tokenizer: Any) -> str:
    """The lengths of the texts in tokens, and the characters that the tokenizer has never seen."""
    lines = []
    for task in (TRANSCRIBE, *data.languages):
        texts, longest, total, unread = list(data.texts(task)), 0, 0, 0
        characters, known = collections.Counter[str](), set[str]()
        chunks = tqdm.trange(0, len(texts), CHUNK, desc=f"tokens: {task}", disable=len(texts) < 10 * CHUNK)
        for start in chunks:
            some = texts[start : start + CHUNK]
            for text, ids in zip(some, tokenizer(some, add_special_tokens=False).input_ids, strict=True):
                longest, total = max(longest, len(ids)), total + len(ids)
                characters.update(text)
                if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                    unread += 1
                else:
                    known.update(text)
        lines.append(
            f"{task}: {len(texts)} texts, {total / len(texts):.1f} tokens on average, at most {longest}"
        )
        if unread:
            lines.append(f"  {unread} texts have words that the tokenizer does not know")
        if unseen := [c for c in characters if not c.isspace() and is_unseen(c, tokenizer, known)]:
            unseen.sort(key=lambda character: -characters[character])
            named = ", ".join(f"{c!r} ({characters[c]} times)" for c in unseen)
            lines.append(f"  characters that it has never seen: {named}")
    return "\n".join(lines)


def is_unseen(character: str, tokenizer: Any, known: Container[str]) -> bool:
    """Whether the tokenizer drops a character, or has no token for it. known: those in known texts."""
    ids = tokenizer(character, add_special_tokens=False).input_ids
    return not ids or (tokenizer.unk_token_id in ids and character not in known)


def draw_lengths(data: DataSet, plan: BatchPlan, file: Path) -> None:
    """A histogram of the lengths as PNG, with the ends of the buckets."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    seconds = data.num_samples / SAMPLE_RATE
    axes.hist(seconds, bins=min(100, max(10, len(data) // 10)), color="#3a7ca5")
    for bucket in plan.buckets:
        axes.axvline(bucket.num_samples / SAMPLE_RATE, color="#d1495b", linewidth=1, linestyle="--")
    axes.set_xlabel("seconds (dashed: where buckets end)")
    axes.set_ylabel("recordings")
    axes.set_title(f"{data.folder.name}: {len(data)} recordings, {seconds.sum() / 3600:.2f} hours")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.data.show", description=__doc__.split("\n")[0])
    parser.add_argument("data", help="a data set, local or gs://")
    parser.add_argument("--buckets", type=int, default=8, help="how many to choose")
    parser.add_argument("--batch-size", type=int, default=64, help="of the longest bucket")
    parser.add_argument("--tokenizer", type=Path, help="a folder with one, such as the LLM's")
    parser.add_argument("--examples", type=int, default=3, help="recordings to write out")
    parser.add_argument("--output", type=Path, help="where picture and recordings go (runs/show/NAME)")
    args = parser.parse_args(argv)
    try:
        data = DataSet(args.data)
        tokenizer = None if args.tokenizer is None else prompts.load_tokenizer(args.tokenizer)
        size = min(args.batch_size, len(data))
        plan = BatchPlan(data.num_samples, choose_buckets(data.num_samples, args.buckets), size, seed=0)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    output = args.output or Path("runs") / "show" / data.folder.name
    output.mkdir(parents=True, exist_ok=True)

    seconds = data.num_samples / SAMPLE_RATE
    print(f"{data.folder}: {len(data)} recordings, {seconds.sum() / 3600:.2f} hours")
    print(f"lengths: {seconds.min():.2f} to {seconds.max():.2f} s, mean {seconds.mean():.2f} s")
    print(f"languages: {', '.join(data.spoken)}; translated into: {', '.join(data.languages) or 'none'}")
    for code in data.languages:
        if number := int((~data.has(code)).sum()):
            print(f"without a translation into {code}: {number}")
    if number := int((~data.has_speech).sum()):
        print(f"nobody speaks in {number} of them (their text is empty)")
    rejected = [json.loads(line) for line in (data.folder / "rejected.jsonl").read_text().splitlines()]
    for reason, number in collections.Counter(line["reason"] for line in rejected).most_common():
        print(f"rejected, {reason}: {number}")
    print(f"\n{bucket_table(plan)}")
    ends = [bucket.num_samples / SAMPLE_RATE for bucket in plan.buckets]
    print(f"to fix these buckets: --set 'data.buckets={json.dumps(ends)}'\n")
    if tokenizer is not None:
        print(f"{token_report(data, tokenizer)}\n")
    draw_lengths(data, plan, output / "lengths.png")
    for i in np.random.default_rng(0).choice(len(data), min(args.examples, len(data)), replace=False):
        utterance, file = data[int(i)], output / f"{i}.wav"
        soundfile.write(file, data.waveform(int(i)), SAMPLE_RATE, subtype="PCM_16")
        print(f"{file}: {utterance.text or '(nobody speaks)'}")
        for code, text in utterance.translations.items():
            print(f"  {code}: {text}")
    print(f"{output / 'lengths.png'}: the lengths")
    return 0


if __name__ == "__main__":
    sys.exit(main())
