"""A model folder in use: recordings in, text out.

    sparqle = SparQLe.from_pretrained("runs/mine/stage2")  # or without a folder: the miniature
    sparqle.transcribe("talk.mp3")
    sparqle.translate(["a.wav", "b.flac"], "German")
    sparqle.generate((waveform, 44_100), "How many people speak?")

A model folder holds `config.json`, which says where the frozen towers are, and `adapter.safetensors`.
Training writes one; `sparqle import` makes one of the published checkpoint.
"""

import contextlib
import dataclasses
import difflib
import functools
import numbers
import os
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from sparqle_jax import assemble, audio, hosts, pretrained, prompts
from sparqle_jax.compat import Compat
from sparqle_jax.generate import GenerationConfig, generate, stream
from sparqle_jax.llms import lora
from sparqle_jax.model import SpeechLLM, min_samples
from sparqle_jax.sharding import batch_parts, batch_sharding
from sparqle_jax.tasks import TRANSCRIBE, instructions

MINIATURE = Path(__file__).parent / "demo" / "models" / "sparqle"
BATCH_SIZE = 32
RENAMED = {"listen": "run", "listening": "attention"}
RUN_OPTIONS = ("batch_size", "heard")  # options of `run` that are not of generation
OVERLAPPING = 8  # words, more than there are in an overlap
LENGTHS = 4  # waveforms are padded to one of so many lengths, and to a power of two of them

# A file, or a waveform [S] or [S, channels] and its sample rate; the latter also as Hugging Face's data sets
# have it, {"array": ..., "sampling_rate": ...}.
Recording = str | os.PathLike | tuple[np.ndarray, int] | Mapping[str, Any]


class Tower(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Where a frozen tower is: its folder, seen from the model's; its name on the Hugging Face hub, if it has
    one, and its commit there."""

    folder: Path
    name: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, folder: Path) -> "Tower":
        """With the name and the commit that `hf download` and transformers leave in a folder."""
        return cls(folder=folder, name=pretrained.hub_name(folder), revision=pretrained.hub_revision(folder))


class ModelConfig(pydantic.BaseModel, frozen=True, extra="forbid", populate_by_name=True):
    """The contents of a model folder's `config.json`.

    max_seconds: the longest waveform that the model hears at once. max_new_tokens: of an answer to one.
    speech_pad: seconds of silence that are left before and after speech (see `audio.cut`).
    dtype: of matrix products and of the towers. compat, system: see `Prompter`. generation: settings of
    `GenerationConfig` that are not its defaults. ancestry: the runs whose state it was trained from, the
    latest first. trained_on: folders of the data sets that the last of its runs was trained on.
    """

    encoder: Tower
    llm: Tower
    max_seconds: float
    max_new_tokens: int
    speech_pad: float = pydantic.Field(0.25, validation_alias=pydantic.AliasChoices("speech_pad", "margin"))
    dtype: Literal["float32", "bfloat16"]
    compat: Compat = None
    system: str | None = None
    generation: dict[str, Any] = {}
    ancestry: tuple[str, ...] = ()
    trained_on: tuple[str, ...] = ()


CARD_TITLE = "# A model that listens"


def model_card(model: SpeechLLM, config: ModelConfig) -> str:
    """What a model folder is, in Markdown: its parts, what it was trained on, and from which runs' state."""
    adapter = model.adapter.config
    trained = jax.tree.leaves((nnx.state(model.adapter), nnx.state(model.projection)))
    count = sum(x.size for x in trained) / 1e6
    towers = {
        name: " ".join(filter(None, (tower.name or tower.folder.name, tower.revision)))
        for name, tower in (("Encoder", config.encoder), ("LLM", config.llm))
    }
    lines = [
        CARD_TITLE,
        "",
        "Made by sparqle_jax: `SparQLe.from_pretrained(FOLDER)`, `sparqle transcribe --model FOLDER`.",
        "",
        *(f"- {name}, frozen: {tower}" for name, tower in towers.items()),
        f"- Adapter: {adapter.kind}, {count:.4g} million parameters with its projection",
        *(["- LoRA on the LLM"] if model.llm.lora is not None else []),
        *(f"- Trained on: {folder}" for folder in config.trained_on),
        *(f"- Trained from the state of {run}" for run in config.ancestry),
    ]
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Segment:
    """The answer to what is said from start to end, in seconds. complete: not cut at max_new_tokens."""

    start: float
    end: float
    text: str
    complete: bool = True


@dataclasses.dataclass(frozen=True)
class Transcript:
    """The answer to a recording, in segments where it is longer than the model hears at once."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)

    def __getattr__(self, name: str) -> Any:
        if name == "pieces":
            raise AttributeError("Transcript.pieces is now Transcript.segments.")
        raise AttributeError(name)

    @property
    def complete(self) -> bool:
        """Whether no answer was cut at max_new_tokens."""
        return all(segment.complete for segment in self.segments)

    def __str__(self) -> str:
        return self.text


class SparQLe:
    """A model with all that it needs to answer.

    mesh: over which its parameters lie, if over any: batches are split over it as well.
    """

    def __init__(
        self,
        model: SpeechLLM,
        prompter: prompts.Prompter,
        config: ModelConfig,
        mesh: Mesh | None = None,
    ):
        self.model, self.prompter, self.config = model, prompter, config
        self.mesh = mesh

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike = MINIATURE,
        *,
        encoder: str | os.PathLike | None = None,
        llm: str | os.PathLike | None = None,
        mesh: Mesh | None = None,
    ) -> "SparQLe":
        """A model folder; its towers from where it says, from the Hugging Face hub, or from folders here.

        Raises FileNotFoundError for what is no model folder, ValueError for one that is not right.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} is no model folder: it has no config.json. Give the folder of a stage 2 that "
                "training has finished, such as runs/tiny/stage2."
            )
        try:
            config = ModelConfig.model_validate_json((folder / "config.json").read_text())
        except pydantic.ValidationError as error:
            raise ValueError(f"{folder / 'config.json'} is not a model's: {error}") from error
        towers = {
            "encoder": _find(folder, "encoder", config.encoder, encoder),
            "llm": _find(folder, "llm", config.llm, llm),
        }
        config = config.model_copy(update=towers)
        options: dict[str, Any] = dict(dtype=jnp.dtype(config.dtype), mesh=mesh)
        file = folder / "adapter.safetensors"
        encoder = assemble.load_encoder(
            config.encoder.folder, assemble.read_parts(file), compat=config.compat, **options
        )
        llm = pretrained.load_llm(config.llm.folder, **options)
        model = assemble.load_speech_llm(file, encoder, llm, compat=config.compat, **options)
        return cls.of(model, config, mesh)

    @classmethod
    def of(cls, model: SpeechLLM, config: ModelConfig, mesh: Mesh | None = None) -> "SparQLe":
        """A model that is loaded, with the prompts of its LLM's folder."""
        prompter = prompts.Prompter.from_folder(
            config.llm.folder, model.llm.config.vocab_size, compat=config.compat, system=config.system
        )
        return cls(model, prompter, config, mesh)

    def save_pretrained(
        self, folder: str | os.PathLike, *, towers: bool = False, merge: bool = False
    ) -> None:
        """Writes a model folder; with its towers in it, if so wanted. Of several hosts, which call this
        together, the first writes.

        merge: with its towers, LoRA folded into the LLM.
        """
        folder, model = epath.Path(folder), self.model
        folder.mkdir(parents=True, exist_ok=True)
        if merge:
            llm = lora.merge(model.llm)
            model = SpeechLLM(model.encoder, model.adapter, model.projection, llm, compat=model.compat)
        assemble.save(model, folder / "adapter.safetensors")
        if not hosts.is_first():
            return
        places = {}
        for name in ("encoder", "llm"):
            tower: Tower = getattr(self.config, name)
            place = tower.folder.resolve()
            if towers:
                shutil.copytree(place, folder / name, dirs_exist_ok=True)
                if merge and name == "llm":
                    pretrained.replace_weights(model.llm, folder / name)
                place = Path(name)
            elif "://" not in str(folder):
                place = Path(os.path.relpath(place, folder.resolve()))
            places[name] = tower.model_copy(update={"folder": place})
        settings = self.config.model_copy(update=places)
        (folder / "config.json").write_text(settings.model_dump_json(indent=2, exclude_defaults=True) + "\n")
        card = folder / "README.md"
        if not card.exists() or card.read_text().startswith(CARD_TITLE):  # else it is somebody's own
            card.write_text(model_card(model, self.config))

    # --- What users call ---------------------------------------------------------------------------------

    @overload
    def transcribe(self, recordings: Recording, **options: Any) -> Transcript: ...

    @overload
    def transcribe(self, recordings: Iterable[Recording], **options: Any) -> list[Transcript]: ...

    def transcribe(self, recordings: Any, **options: Any) -> Transcript | list[Transcript]:
        """Transcribes: a Transcript, or for any sequence of recordings a list of them.

        (waveform, sample rate) is one recording. Options are those of `run`.
        Raises ValueError and FileNotFoundError for the first that can't be heard, naming it.
        """
        return self._all(recordings, instructions(TRANSCRIBE)[0], options)

    @overload
    def translate(self, recordings: Recording, language: str, **options: Any) -> Transcript: ...

    @overload
    def translate(
        self, recordings: Iterable[Recording], language: str, **options: Any
    ) -> list[Transcript]: ...

    def translate(self, recordings: Any, language: str, **options: Any) -> Transcript | list[Transcript]:
        """The same in another language, given as its name or code: "German", "de"."""
        return self._all(recordings, instructions(language)[0], options)

    @overload
    def generate(self, recordings: Recording, prompt: str, **options: Any) -> Transcript: ...

    @overload
    def generate(self, recordings: Iterable[Recording], prompt: str, **options: Any) -> list[Transcript]: ...

    def generate(self, recordings: Any, prompt: str, **options: Any) -> Transcript | list[Transcript]:
        """The answers to a prompt of your own, in which `<SpeechHere>` stands for the speech; or else it
        comes first."""
        return self._all(recordings, with_speech(prompt), options)

    def run(
        self,
        recordings: Iterable[Recording],
        instruction: str,
        *,
        batch_size: int = BATCH_SIZE,
        heard: Callable[[float], None] = lambda seconds: None,
        **settings,
    ) -> Iterator[Transcript | Exception]:
        """Yields each recording's Transcript, or why it can't be heard, in order, as they become ready.

        Long recordings are read and answered a window at a time, and never held as a whole; windows of one
        batch may be of several recordings. heard: is told how many seconds more are done. settings: of
        `GenerationConfig`. Raises ValueError for settings that are not valid.
        """
        config = self.generation_config(**settings)
        if self.config.compat == "published":
            batch_size = 1  # whose mask is inverted
        waiting: deque[_Job] = deque()
        batch: list[tuple[_Job, audio.Window]] = []

        def answer() -> None:
            windows = [window for _, window in batch]
            for (job, window), answered in zip(
                batch, self._answers(windows, instruction, config), strict=True
            ):
                job.add(window, answered)
            heard(sum(len(window.waveform) for window in windows) / audio.SAMPLE_RATE)
            batch.clear()

        for recording in recordings:
            waiting.append(job := _Job())
            try:
                for window in self.windows(recording):
                    job.open += 1
                    batch.append((job, window))
                    if len(batch) == batch_size:
                        answer()
            except Exception as error:  # whatever it is, it is this recording's alone
                job.error = error
            job.whole = True
            while waiting and waiting[0].ready:
                yield waiting.popleft().result()
        if batch:
            answer()
        for job in waiting:
            yield job.result()

    def stream(self, recording: Recording, instruction: str, **settings) -> Iterator[Transcript]:
        """The answer so far, as it grows. Raises as `transcribe` does."""
        config = self.generation_config(**settings)
        whole = _Job()
        for window in self.windows(recording):
            whole.open += 1
            frames = self.encode([window.waveform])
            with self._on_mesh():
                for rows in stream(self.model, self._asked(instruction, frames), config):
                    row = hosts.all_gather(rows)[0]
                    text = self.prompter.decode(row)
                    yield Transcript((*whole.segments, Segment(*window.seconds, text)))
            whole.add(window, (text, _has_end(row, config)))
        yield whole.transcript()

    def windows(self, recording: Recording) -> Iterator[audio.Window]:
        """The parts of a recording that are answered at once. Raises UnusableAudio and FileNotFoundError."""
        yield from audio.cut(
            _blocks(recording),
            self.max_samples,
            speech_pad=self.config.speech_pad,
            min_samples=self._min_samples,
        )

    # --- What those, and training and evaluation, are made of ----------------------------------------------

    def generation_config(self, **settings) -> GenerationConfig:
        """The model's own settings, and these in place of some. Raises ValueError for what is not valid."""
        names = {field.name for field in dataclasses.fields(GenerationConfig)}
        if unknown := sorted(settings.keys() - names):
            raise ValueError(f"{', '.join(unknown)}: no settings of generation; there are {sorted(names)}.")
        end = self.prompter.end_id
        ours = dict(max_new_tokens=self.config.max_new_tokens, eos_token_ids=(end,), pad_token_id=end)
        given = {name: value for name, value in settings.items() if value is not None}
        return GenerationConfig(**{**ours, **self.config.generation, **given})

    @property
    def max_samples(self) -> int:
        """The longest waveform that is heard at once, in samples."""
        window = self.model.encoder.config.max_samples
        most = round(self.config.max_seconds * audio.SAMPLE_RATE)
        return most if window is None else min(most, window)

    @property
    def max_speech_tokens(self) -> int:
        """The most tokens that the LLM reads in place of speech."""
        frames = self.model.encoder.config.num_frames(self.max_samples)
        return self.model.adapter.config.num_tokens(frames)

    def check(self, waveform: np.ndarray) -> None:
        """Raises UnusableAudio, saying what is the matter, for a waveform float [S] in which no speech can be
        heard, or more than at once."""
        audio.check(waveform, min_samples=self._min_samples, max_samples=self.max_samples)

    def encode(self, waveforms: Sequence[np.ndarray]) -> dict[str, jax.Array]:
        """frames [B, T, D] and frames_mask bool [B, T] of waveforms float [S] at 16 kHz that pass `check`.

        So that few programs are compiled, B is a power of two, and T one of LENGTHS.
        """
        longest = max(map(len, waveforms))
        length = next(n for n in self._lengths if n >= longest)
        if self.config.compat == "published":  # which hears padding as well
            length = longest
        waveform, mask = audio.pad(self._filled(list(waveforms)), length)
        with self._on_mesh():
            frames, frames_mask = _encode(*nnx.split(self.model.encoder), *self._split((waveform, mask)))
        return {"frames": frames, "frames_mask": frames_mask}

    def answer(
        self, frames: dict[str, jax.Array], num: int, instruction: str, config: GenerationConfig
    ) -> list[str]:
        """The answers to the first `num` rows of what `encode` has given.

        Warns of answers that are cut because they have `max_new_tokens` tokens and no end.
        """
        return self._texts(self._asked(instruction, frames), num, config)

    def answer_text(self, texts: Sequence[str], instruction: str, config: GenerationConfig) -> list[str]:
        """The LLM's own answers to the same instructions with the written text in place of the speech."""
        # The text is tokenised apart from what is around it, as the speech stands apart.
        before, after = self.prompter.prompt(instruction)
        asked = [(before + self.prompter.answer(text)[:-1], after) for text in texts]
        return self._texts(self._prompts(self._filled(asked)), len(asked), config)

    @property
    def has_attention(self) -> bool:
        """Whether the adapter's tokens attend to frames, so that it can be shown to which."""
        return hasattr(self.model.adapter, "attention")

    def attention(self, recording: Recording) -> np.ndarray:
        """Attention weights of the tokens to the frames of a recording, no longer than is heard at once.

        float32 [Q, T], the mean of the cross-attentions; each token's weights have the sum 1. Raises
        ValueError for an adapter without attention.
        """
        if not self.has_attention:
            raise ValueError(f"the adapter of kind={self.model.adapter.config.kind!r} attends to no frames.")
        (window, *more) = self.windows(recording)
        if more:
            raise ValueError(f"only {self.config.max_seconds:g} s can be shown at once.")
        heard = self.encode([window.waveform])
        weights = _attention(*nnx.split(self.model.adapter), heard["frames"], heard["frames_mask"])
        return np.asarray(weights)[:, : int(heard["frames_mask"][0].sum())]

    def __getattr__(self, name: str) -> Any:
        """Says under which names methods of former versions are."""
        if name in RENAMED:
            raise AttributeError(f"SparQLe.{name} is now SparQLe.{RENAMED[name]}.")
        raise AttributeError(f"SparQLe has no attribute {name!r}.")

    # --- Inside ------------------------------------------------------------------------------------------

    @property
    def _min_samples(self) -> int:
        return min_samples(self.model.encoder.config, self.model.adapter.config)

    @property
    def _lengths(self) -> list[int]:
        return [-(-self.max_samples * (i + 1) // LENGTHS) for i in range(LENGTHS)]

    def _all(self, recordings: Any, instruction: str, options: dict[str, Any]) -> Any:
        if _is_one(recordings):
            return self._all([recordings], instruction, options)[0]
        results = list(self.run(recordings, instruction, **options))
        for i, result in enumerate(results):
            if isinstance(result, audio.UnusableAudio):
                raise ValueError(f"recording {i}: {result}") from result
            if isinstance(result, Exception):
                raise result
        if cut := sum(not result.complete for result in results):
            config = self.generation_config(**{k: v for k, v in options.items() if k not in RUN_OPTIONS})
            warnings.warn(
                f"{cut} of {len(results)} answers have no end within max_new_tokens={config.max_new_tokens} "
                "tokens: they are cut there (see Transcript.complete).",
                stacklevel=3,
            )
        return results

    def _answers(
        self, windows: Sequence[audio.Window], instruction: str, config: GenerationConfig
    ) -> list[tuple[str, bool] | Exception]:
        """Yields for each window its answer and whether that has its end, or why there is none."""
        try:
            frames = self.encode([window.waveform for window in windows])
            return self._generate(self._asked(instruction, frames), len(windows), config)
        except Exception as error:
            if len(windows) == 1:
                return [error]
        # One of them is at fault: the others get their answers.
        return [self._answers([window], instruction, config)[0] for window in windows]

    def _asked(self, instruction: str, frames: dict[str, jax.Array]) -> dict[str, Any]:
        asked = self.prompter.prompt(instruction)
        return self._prompts([asked] * len(frames["frames"])) | frames

    def _prompts(self, asked: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
        # To multiples of 16 tokens, so that instructions of about the same length share a program.
        before, after = (-(-max(len(pair[i]) for pair in asked) // 16) * 16 for i in range(2))
        vocab_size = self.model.llm.config.vocab_size
        batch = prompts.collate(asked, vocab_size=vocab_size, before_length=before, after_length=after)
        return self._split(batch)

    def _generate(self, batch: dict[str, Any], num: int, config: GenerationConfig) -> list[tuple[str, bool]]:
        """The texts of the first `num` answers, and whether each has its end."""
        with self._on_mesh():
            rows = hosts.all_gather(generate(self.model, batch, config))[:num]
        return [(self.prompter.decode(row), _has_end(row, config)) for row in rows]

    def _texts(self, batch: dict[str, Any], num: int, config: GenerationConfig) -> list[str]:
        answers = self._generate(batch, num, config)
        if cut := sum(not complete for _, complete in answers):
            warnings.warn(
                f"{cut} of {num} answers have no end within max_new_tokens={config.max_new_tokens} tokens: "
                "they are cut there.",
                stacklevel=3,
            )
        return [text for text, _ in answers]

    def _filled(self, rows: list) -> list:
        """With the first repeated at the end: a power of two times the parts that the mesh makes of it."""
        parts = 1 if self.mesh is None else batch_parts(self.mesh)
        number = parts * 2 ** (-(-len(rows) // parts) - 1).bit_length()
        return [*rows, *rows[:1] * (number - len(rows))]

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _split(self, batch: Any) -> Any:
        """Host arrays that all hosts have whole, split over the devices of the mesh."""
        if self.mesh is None:
            return batch
        where = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), batch
        )


@dataclasses.dataclass
class _Job:
    """A recording while it is heard. open: its windows that are not answered yet; whole: it has no more."""

    segments: list[Segment] = dataclasses.field(default_factory=list)
    open: int = 0
    whole: bool = False
    error: Exception | None = None

    @property
    def ready(self) -> bool:
        return self.whole and not self.open

    def add(self, window: audio.Window, answered: tuple[str, bool] | Exception) -> None:
        """The answer to the next window, and whether it has its end; or why there is none."""
        self.open -= 1
        if isinstance(answered, Exception):
            self.error = self.error or answered
            return
        text, complete = answered
        start, end = window.seconds
        if window.overlaps and self.segments:
            before = self.segments[-1]
            former, text = merge_overlap(before.text, text)
            self.segments[-1] = dataclasses.replace(before, text=former)
            start = min(before.end, end)
        self.segments.append(Segment(round(start, 3), round(end, 3), text, complete))

    def transcript(self) -> Transcript:
        return Transcript(tuple(self.segments))

    def result(self) -> Transcript | Exception:
        return self.transcript() if self.error is None else self.error


def merge_overlap(before: str, after: str) -> tuple[str, str]:
    """Two texts of which the second begins with what the first ends with, without what is there twice.

    Looks for the longest run of words that both have, near the end of one and the start of the other; a word
    that the cut has spoiled stands between it and the edge. Without one, both stay whole.
    """
    first, second = before.split(), after.split()
    tail, head = (list(map(_plain, words)) for words in (first[-OVERLAPPING:], second[:OVERLAPPING]))
    match = difflib.SequenceMatcher(None, tail, head, autojunk=False).find_longest_match()
    if not match.size or match.b > 2 or match.a + match.size < len(tail) - 2:
        return before, after
    kept = len(first) - len(tail) + match.a + match.size
    return " ".join(first[:kept]), " ".join(second[match.b + match.size :])


def _plain(word: str) -> str:
    return re.sub(r"\W", "", word).lower() or word


def _is_one(recordings: Any) -> bool:
    """Whether this is one recording (a file, (waveform, sample rate), a mapping) or a sequence of them."""
    if isinstance(recordings, str | os.PathLike | Mapping) or not isinstance(recordings, Iterable):
        return True
    if isinstance(recordings, np.ndarray):
        return recordings.dtype.kind not in "OUS"  # an array of paths
    is_pair = isinstance(recordings, tuple | list) and len(recordings) == 2
    return is_pair and isinstance(recordings[1], numbers.Real)


def _has_end(row: np.ndarray, config: GenerationConfig) -> bool:
    return bool(np.isin(row, config.eos_token_ids).any())


def with_speech(prompt: str) -> str:
    """A prompt with a place for the speech: at its start, when it has none."""
    return prompt if prompts.SPEECH in prompt else f"<Speech>{prompts.SPEECH}</Speech> {prompt}"


def _blocks(recording: Recording) -> Iterator[np.ndarray]:
    """A recording as float32 [S] at 16 kHz, block by block. Raises UnusableAudio for what is none."""
    if isinstance(recording, str | os.PathLike):
        return audio.read_blocks(recording)
    if isinstance(recording, Mapping) and {"array", "sampling_rate"} <= recording.keys():
        recording = (recording["array"], recording["sampling_rate"])  # as in Hugging Face's data sets
    if not (isinstance(recording, tuple | list) and len(recording) == 2):
        raise audio.UnusableAudio(
            "unreadable",
            f"a {type(recording).__name__} is no recording: give a file, or (waveform, sample rate).",
        )
    waveform, rate = np.asarray(recording[0]), int(recording[1])
    if waveform.ndim == 1:
        waveform = waveform[:, None]
    if waveform.ndim != 2 or waveform.shape[1] > 64 or rate < 1:
        raise audio.UnusableAudio(
            "unreadable",
            f"a waveform of shape {np.shape(recording[0])} at {rate} Hz: give [S] or [S, channels], and its "
            "rate.",
        )
    if np.issubdtype(waveform.dtype, np.integer):
        waveform = waveform / -float(np.iinfo(waveform.dtype).min)
    return iter([audio.resample(waveform.astype(np.float32), rate)])


def _find(folder: Path, what: str, tower: Tower, instead: str | os.PathLike | None) -> Tower:
    """The tower of a model folder, with the folder in which it is here."""
    if instead is not None:
        return Tower.of(Path(instead))
    there = folder / tower.folder
    if there.is_dir():
        return tower.model_copy(update={"folder": there})
    if tower.name is None:
        raise FileNotFoundError(
            f"the {what} of {folder} is not at {there}, and its name on the Hugging Face hub is not known: "
            f"give its folder, with --{what} FOLDER, or in Python {what}=."
        )
    downloaded = huggingface_hub.snapshot_download(tower.name, revision=tower.revision)
    return tower.model_copy(update={"folder": Path(downloaded)})


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state: nnx.State, waveform: jax.Array, mask: jax.Array):
    return nnx.merge(graph, state)(waveform, mask)


@functools.partial(jax.jit, static_argnums=0)
def _attention(graph: nnx.GraphDef, state: nnx.State, frames: jax.Array, mask: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).attention(frames, mask).mean(0)[0]
