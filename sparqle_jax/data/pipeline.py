"""Makes batches of data sets: planned from the lengths, read, tokenised and padded by Grain.

Batch k is a function of the seed and of k alone, so training goes on anywhere without a saved state of the
input, and each host makes its own rows of it.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
import tqdm
from absl import flags

from sparqle_jax import audio, prompts
from sparqle_jax.data.dataset import Corpus, CorruptRecord, Utterance
from sparqle_jax.data.plan import Batch, BatchPlan
from sparqle_jax.tasks import TRANSCRIBE, answer_of, check_tasks, has_answer, instructions

Arrays = dict[str, np.ndarray]
CHUNK = 4096  # texts that are tokenised at once, to count their tokens
SKIPPED = "skipped"  # in a batch, bool [B]: which of its records could not be read


class Examples(Protocol):
    """Makes the rows of batches, by number."""

    def rows(self, batch: Batch, places: Sequence[int], seed: int) -> Arrays:
        """Some rows of a batch, those at `places` in it. What is random is drawn by seed, batch and place."""


@dataclasses.dataclass(frozen=True)
class HostBatches:
    """The plan as Grain takes it: the first `num_batches` batches, by number."""

    plan: BatchPlan
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> Batch:
        return self.plan.batch(int(number))


def batches(
    examples: Examples,
    plan: BatchPlan,
    *,
    seed: int,
    stop: int,
    start: int = 0,
    workers: int = 0,
    sharding: jax.sharding.Sharding | None = None,
) -> Iterator[Any]:
    """Batches number `start` up to `stop`.

    sharding: of arrays [B, ...] over the devices of all hosts: each host reads the rows that its devices
    hold, and brings them there, two batches ahead; None leaves all of a batch with the host.
    workers: processes that read; 0 reads in threads of this one.
    """

    sizes = {bucket.batch_size for bucket in plan.buckets}
    places = {size: range(size) if sharding is None else local_rows(sharding, size) for size in sizes}

    def load(batch: Batch) -> Arrays:
        return examples.rows(batch, places[len(batch.indices)], seed)

    dataset = grain.MapDataset.source(HostBatches(plan, stop)).slice(slice(start, None)).map(load)
    threads = 1 if workers else 4
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    inputs = dataset.to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain asks for its flags, which the main program has none of
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        inputs = inputs.mp_prefetch(options, worker_init_fn=_follow_the_main_process)
    if sharding is not None:
        inputs = inputs.map(functools.partial(on_devices, sharding))
        inputs = grain.experimental.ThreadPrefetchIterDataset(inputs, prefetch_buffer_size=2)
    return iter(inputs)


def local_rows(sharding: jax.sharding.Sharding, size: int) -> list[int]:
    """The rows of an array [size, ...] that this host's devices hold, ascending. Raises ValueError when the
    sharding can't split so many."""
    held = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for (rows,) in held for row in range(size)[rows]})


def on_devices(sharding: jax.sharding.Sharding, rows: Arrays) -> dict[str, jax.Array]:
    """A whole batch on the devices of all hosts, from the rows of each (see `local_rows`)."""
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in rows.items()}


def _follow_the_main_process(worker: int, num_workers: int) -> None:
    """A worker leaves signals, which come to all processes, to the main one, and ends when that does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


class Speech(Protocol):
    """The speech of a corpus as encoder or adapter take it: for some utterances, padded to one length."""

    def rows(self, indices: Sequence[int], num_samples: int) -> Arrays: ...


class Waveforms:
    """The recordings of a corpus, from -1 to 1.

    Raises ValueError, naming the first ten, for recordings shorter than `min_samples` (which give the LLM no
    token) or longer than `max_seconds`. Only their lengths are looked at for it.
    """

    def __init__(
        self,
        corpus: Corpus,
        max_seconds: float,
        *,
        min_samples: int = 400,
    ):
        self.corpus = corpus
        self.max_samples = round(max_seconds * audio.SAMPLE_RATE)
        lengths = corpus.num_samples
        unusable = np.flatnonzero((lengths > self.max_samples) | (lengths < min_samples))
        if len(unusable):
            named = ", ".join(f"{corpus[i].id} ({corpus[i].duration:.2f} s)" for i in unusable[:10])
            raise ValueError(
                f"{len(unusable)} recordings are shorter than {min_samples / audio.SAMPLE_RATE:g} s or "
                f"longer than data.max_seconds={max_seconds:g}: {named}{', ...' * (len(unusable) > 10)}. "
                "Prepare the data set with other --min-seconds and --max-seconds, or change data.max_seconds."
            )

    def __len__(self) -> int:
        return len(self.corpus)

    def rows(self, indices: Sequence[int], num_samples: int) -> Arrays:
        """waveform float32 [B, S] and waveform_mask bool [B, S]. Raises CorruptRecord."""
        waveform = np.zeros((len(indices), num_samples), np.float32)
        mask = np.zeros(waveform.shape, bool)
        for row, index in enumerate(indices):
            samples = self.corpus.samples(index)
            part = waveform[row, : len(samples)]
            np.multiply(samples, np.float32(1 / 32768), out=part)
            mask[row, : len(samples)] = True
        return {"waveform": waveform, "waveform_mask": mask}


class AlignmentExamples:
    """Stage 1: speech, the adapter's tokens of the text, and recording_id, equal for equal texts in a batch.

    To be planned with those in which somebody speaks: there is nothing else to align.
    speech: `Waveforms`, or the `Frames` of this corpus. Texts are padded to the longest that can be in the
    bucket, or to `max_tokens` where that is given; else all texts are tokenised here, once, to count. Raises
    ValueError for longer ones, naming one, and for tokens outside the vocabulary.
    """

    def __init__(
        self,
        corpus: Corpus,
        speech: Speech,
        tokenizer: Any,
        vocab_size: int,
        plan: BatchPlan,
        *,
        max_tokens: int | None = None,
        skip_corrupt: bool = False,
    ):
        self.corpus, self.speech, self.skip_corrupt = corpus, speech, skip_corrupt
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.lengths = text_lengths(
            corpus,
            plan,
            [[TRANSCRIBE]] * len(corpus.sizes),
            lambda texts: prompts.tokenize_texts(tokenizer, texts),
            max_tokens,
        )

    def rows(self, batch: Batch, places: Sequence[int], seed: int) -> Arrays:
        numbers: dict[str, int] = {}
        texts = [self.corpus[index].text for index in batch.indices]
        ids = np.array([numbers.setdefault(text, i) for i, text in enumerate(texts)], np.int32)
        speech, read, skipped = _read(self, batch, places, seed)
        tokens, length = (
            prompts.tokenize_texts(self.tokenizer, [texts[place] for place in read]),
            self.lengths[batch.bucket],
        )
        for place, row in zip(read, tokens, strict=True):
            _check_length(self.corpus[batch.indices[place]], row, length)
        text, mask = prompts.pad_tokens(tokens, length, name="text", vocab_size=self.vocab_size)
        return speech | {"text": text, "text_mask": mask, "recording_id": ids[read], SKIPPED: skipped}


class InstructionExamples:
    """Stage 2: speech, an instruction around it, and the answer.

    speech, max_tokens: as for AlignmentExamples. tasks: for each data set of the corpus "transcribe" and
    codes of languages, with the weights by which an utterance draws one of those that it has an answer to. To
    be planned with those that have any: `have_any`. Raises ValueError for data sets in which no utterance has
    one of the tasks.
    """

    def __init__(
        self,
        corpus: Corpus,
        speech: Speech,
        prompter: prompts.Prompter,
        vocab_size: int,
        tasks: Sequence[Mapping[str, float]],
        plan: BatchPlan,
        *,
        max_tokens: int | None = None,
        skip_corrupt: bool = False,
    ):
        self.corpus, self.speech, self.skip_corrupt = corpus, speech, skip_corrupt
        self.prompter, self.vocab_size = prompter, vocab_size
        for data_set, some in zip(corpus.data_sets, tasks, strict=True):
            check_tasks(data_set, some)
        self.tasks = [list(some) for some in tasks]
        self.weights = [np.array(list(some.values())) for some in tasks]
        asked = {task: [prompter.prompt(text) for text in instructions(task)] for task in set().union(*tasks)}
        self.asked = asked
        self.before, self.after = (max(len(p[i]) for ps in asked.values() for p in ps) for i in range(2))
        self.lengths = text_lengths(
            corpus, plan, self.tasks, lambda texts: map(prompter.answer, texts), max_tokens
        )

    def rows(self, batch: Batch, places: Sequence[int], seed: int) -> Arrays:
        speech, read, skipped = _read(self, batch, places, seed)
        asked, answers = [], []
        for place in read:
            rng = np.random.default_rng([seed, batch.number, place])
            number, _ = self.corpus.locate(batch.indices[place])
            utterance = self.corpus[batch.indices[place]]
            tasks = self.tasks[number]
            weights = self.weights[number] * [has_answer(utterance, task) for task in tasks]
            task = tasks[rng.choice(len(tasks), p=weights / weights.sum())]
            asked.append(self.asked[task][rng.integers(len(self.asked[task]))])
            answers.append(self.prompter.answer(answer_of(utterance, task)))
            _check_length(utterance, answers[-1], self.lengths[batch.bucket])
        texts = prompts.collate(
            asked,
            answers,
            vocab_size=self.vocab_size,
            before_length=self.before,
            after_length=self.after,
            answer_length=self.lengths[batch.bucket],
        )
        return speech | texts | {SKIPPED: skipped}


def _read(
    examples: AlignmentExamples | InstructionExamples, batch: Batch, places: Sequence[int], seed: int
) -> tuple[Arrays, list[int], np.ndarray]:
    """The speech at these places of a batch, the places that were read for it, and bool [B]: which were not.

    A record that can't be read is an error, or with `skip_corrupt` another of the whole batch takes its
    place: drawn by seed, batch and place, so that a host reads what any other would.
    """
    read = list(places)
    try:
        return examples.speech.rows(batch.indices[read], batch.num_samples), read, np.zeros(len(read), bool)
    except CorruptRecord as error:
        if not examples.skip_corrupt:
            raise CorruptRecord(
                f"{error} (batch {batch.number}; data.skip_corrupt=true goes on without)"
            ) from error
    tried: dict[int, CorruptRecord | None] = {}

    def can_be_read(place: int) -> bool:
        if place not in tried:
            try:
                examples.speech.rows(batch.indices[[place]], batch.num_samples)
                tried[place] = None
            except CorruptRecord as error:
                tried[place] = error
        return tried[place] is None

    filled = []
    for place in read:
        others = np.random.default_rng([seed, batch.number, place]).permutation(len(batch.indices)).tolist()
        filled.append(next(filter(can_be_read, [place, *others]), None))
        if filled[-1] is None:
            raise CorruptRecord(f"no record of batch {batch.number} can be read.")
    for place in read:
        if tried[place] is not None:
            print(f"skipped: {tried[place]}", file=sys.stderr, flush=True)
    speech = examples.speech.rows(batch.indices[filled], batch.num_samples)
    return speech, filled, np.not_equal(filled, read)


def _check_length(utterance: Utterance, tokens: Sequence[int], length: int) -> None:
    if len(tokens) > length:
        raise ValueError(
            f"a text of utterance {utterance.id} has {len(tokens)} tokens, more than data.max_text_tokens="
            f"{length}: make it larger, or null to have the tokens counted."
        )


def text_lengths(
    corpus: Corpus,
    plan: BatchPlan,
    tasks: Sequence[Sequence[str]],
    tokenize: Callable[[list[str]], Iterable[Sequence[int]]],
    max_tokens: int | None,
) -> list[int]:
    """To how many tokens the texts of each bucket are padded: as many as its longest has, or `max_tokens`."""
    if max_tokens is not None:
        return [max_tokens] * len(plan.buckets)
    ends = [bucket.num_samples for bucket in plan.buckets]
    lengths = np.zeros(len(ends), int)
    pairs = list(zip(corpus.data_sets, tasks, strict=True))
    total = sum(int(data_set.has(task).sum()) for data_set, some in pairs for task in some)
    with tqdm.tqdm(
        total=total, desc="texts", unit="text", dynamic_ncols=True, disable=total < 10 * CHUNK
    ) as bar:
        for data_set, some in pairs:
            buckets = np.searchsorted(ends, data_set.num_samples)
            for task in some:
                texts, start = iter(data_set.texts(task)), 0
                having = buckets[data_set.has(task)]
                while chunk := list(itertools.islice(texts, CHUNK)):
                    counts = [len(tokens) for tokens in tokenize(chunk)]
                    np.maximum.at(lengths, having[start : start + len(chunk)], counts)
                    start += len(chunk)
                    bar.update(len(chunk))
    # What fills no batch of its bucket is in one of a longer bucket.
    return np.maximum.accumulate(lengths).tolist()
