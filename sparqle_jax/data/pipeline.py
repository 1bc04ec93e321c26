"""From a data set to batches: shuffled, read and padded by Grain.

Batch k is a function of the seed and of k alone, so training goes on anywhere without a saved state of the
input. All texts are tokenised at the start: what is wrong with one is found before the first step.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from babel import Locale, UnknownLocaleError

from sparqle_jax import audio, prompts
from sparqle_jax.data.manifest import Utterance, raise_all

Arrays = dict[str, np.ndarray]
TRANSCRIBE = "transcribe"  # the name of this task; a translation is named by its language's code


class Examples(Protocol):
    """What `batches` is made from: rows of arrays, drawn by number."""

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator) -> Arrays:
        """One row. What is random in it (the instruction, say) comes from `rng`."""


def batches(examples: Examples, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Arrays]:
    """Endless batches from number `start` on: every example once per epoch, in an order of its own.

    Raises ValueError when there are fewer examples than fill a batch.
    """
    if len(examples) < batch_size:
        raise ValueError(
            f"the data set has {len(examples)} examples, fewer than a batch of {batch_size}: "
            "make batch_size smaller."
        )
    dataset = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(lambda index, rng: examples.example(int(index), rng))
    dataset = dataset.batch(batch_size)
    dataset = dataset.slice(slice(start, None))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)))


class Speech(Protocol):
    """The speech of a data set: for each utterance, by number, what an encoder or an adapter takes of it."""

    def __getitem__(self, index: int) -> Arrays: ...


class Waveforms:
    """The recordings of a data set, as the encoder wants them, padded to one length.

    Raises ValueError, naming the first ten, for files that are no recordings, and for recordings shorter than
    `min_samples` (one frame of the encoder) or longer than `max_seconds`. Only their headers are read for it.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        extractor: audio.FeatureExtractor,
        max_seconds: float,
        *,
        min_samples: int = 400,
    ):
        self.utterances, self.extractor, self.min_samples = utterances, extractor, min_samples
        self.num_samples = round(max_seconds * audio.SAMPLE_RATE)
        problems = []
        for utterance in utterances:
            try:
                num_samples = audio.count_samples(utterance.audio)
            except ValueError as error:
                problems.append(f"{utterance.id}: {error}")
                continue
            seconds = num_samples / audio.SAMPLE_RATE
            if num_samples > self.num_samples:
                problems.append(
                    f"{utterance.id}: {seconds:.2f} s, longer than data.max_seconds={max_seconds}"
                )
            elif num_samples < min_samples:
                problems.append(f"{utterance.id}: {num_samples} samples, fewer than a frame's {min_samples}")
        raise_all(ValueError, "recordings that can't be used; cut, mend or leave them out", problems)

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> Arrays:
        """waveform float32 [S] and waveform_mask bool [S]. Raises ValueError naming the utterance."""
        utterance = self.utterances[index]
        try:
            waveform = self.extractor(audio.read(utterance.audio))
            padded, mask = audio.pad([waveform], self.num_samples, min_samples=self.min_samples)
        except ValueError as error:
            raise ValueError(f"utterance {utterance.id} ({utterance.audio}): {error}") from error
        return {"waveform": padded[0], "waveform_mask": mask[0]}


class AlignmentExamples:
    """Stage 1: speech, the adapter's tokens of the text, and recording_id, equal for equal texts.

    speech: `Waveforms`, or the `Frames` of these utterances.
    """

    def __init__(self, utterances: Sequence[Utterance], speech: Speech, tokenizer: Any, vocab_size: int):
        texts = [utterance.text for utterance in utterances]
        self.speech = speech
        self.texts = prompts.collate_texts(tokenizer, texts, vocab_size=vocab_size)
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.recording_ids = np.array([number[text] for text in texts], np.int32)

    def __len__(self) -> int:
        return len(self.recording_ids)

    def example(self, index: int, rng: np.random.Generator) -> Arrays:
        texts = {name: rows[index] for name, rows in self.texts.items()}
        return self.speech[index] | texts | {"recording_id": self.recording_ids[index]}


class InstructionExamples:
    """Stage 2: speech, an instruction around it, and the answer.

    speech: `Waveforms`, or the `Frames` of these utterances. tasks: "transcribe" and codes of languages, with
    the weights by which they are drawn. Raises ValueError for utterances that have no translation into one
    of them, naming them.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        speech: Speech,
        prompter: prompts.Prompter,
        vocab_size: int,
        tasks: Mapping[str, float],
    ):
        self.speech, self.num = speech, len(utterances)
        self.tasks = list(tasks)
        self.shares = np.array(list(tasks.values())) / sum(tasks.values())
        answers = [prompter.answer(answer_of(u, task)) for task in self.tasks for u in utterances]
        asked = [[prompter.prompt(text) for text in instructions(task)] for task in self.tasks]
        self.numbers = np.split(np.arange(sum(map(len, asked))), np.cumsum([len(a) for a in asked])[:-1])
        self.asked = prompts.collate([pair for pairs in asked for pair in pairs], vocab_size=vocab_size)
        answer, mask = prompts.pad_tokens(answers, name="answer", vocab_size=vocab_size)
        self.answers = {"answer": answer, "answer_mask": mask}

    def __len__(self) -> int:
        return self.num

    def example(self, index: int, rng: np.random.Generator) -> Arrays:
        task = rng.choice(len(self.tasks), p=self.shares)
        number = rng.choice(self.numbers[task])
        asked = {name: rows[number] for name, rows in self.asked.items()}
        answer = {name: rows[task * self.num + index] for name, rows in self.answers.items()}
        return self.speech[index] | asked | answer


def instructions(task: str) -> list[str]:
    """All ways to ask for a task, with a place for the speech."""
    if task == TRANSCRIBE:
        return [prompts.instruction(template) for template in prompts.TRANSCRIBE]
    return [prompts.instruction(template, language_name(task)) for template in prompts.TRANSLATE]


def language_name(language: str) -> str:
    """The English name of a language, "French" for "fr" or "french". Raises ValueError for what is none."""
    # Codes first: "ga" is Irish, and also the name of another language.
    try:
        return Locale.parse(language.replace("-", "_")).english_name
    except (UnknownLocaleError, ValueError) as error:
        if language.title() in Locale("en").languages.values():
            return language.title()
        raise ValueError(f"{language!r} is neither a language's name nor its code (German, de).") from error


def answer_of(utterance: Utterance, task: str) -> str:
    """The right answer to a task. Raises ValueError when the utterance has no such translation."""
    if task == TRANSCRIBE:
        return utterance.text
    if task not in utterance.translations:
        raise ValueError(
            f"utterance {utterance.id} has no translation into {task!r}; it has "
            f"{sorted(utterance.translations)}: complete the data set, or leave out the task."
        )
    return utterance.translations[task]
