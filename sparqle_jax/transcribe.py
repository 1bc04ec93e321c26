"""Recordings in, text out: transcripts, or translations.

    python -m sparqle_jax.transcribe RECORDING... [--model FOLDER] [--translate German]

A model folder holds `model.json`, which names the folders of the frozen towers, and `adapter.safetensors`.
Training writes one; without --model it is the miniature that comes with the package.
"""

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from etils import epath
from flax import nnx

from sparqle_jax import audio, hosts, pretrained, prompts
from sparqle_jax.data.pipeline import TRANSCRIBE, instructions
from sparqle_jax.generate import GenerationConfig, generate
from sparqle_jax.model import SpeechLLM

MINIATURE = Path(__file__).parent / "demo" / "models" / "sparqle"


class ModelSettings(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What `model.json` says of a model, beside its weights.

    encoder, llm: folders of the towers, in the file relative to it. dtype: of matrix products and of the
    towers. max_seconds: the longest recording; max_new_tokens: the longest answer.
    """

    encoder: Path
    llm: Path
    max_seconds: float
    max_new_tokens: int
    dtype: Literal["float32", "bfloat16"]


def save_model(model: SpeechLLM, folder: str | epath.Path, settings: ModelSettings) -> None:
    """Writes a model folder; of several hosts, which call this together, the first does."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pretrained.save_published(model, folder / "adapter.safetensors")
    if not hosts.is_first():
        return
    towers = {name: getattr(settings, name).resolve() for name in ("encoder", "llm")}
    if "://" not in str(folder):
        towers = {name: Path(os.path.relpath(path, folder.resolve())) for name, path in towers.items()}
    (folder / "model.json").write_text(settings.model_copy(update=towers).model_dump_json(indent=2) + "\n")


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state: nnx.State, waveform: jax.Array, mask: jax.Array):
    return nnx.merge(graph, state)(waveform, mask)


class Listener:
    """A model with all that it needs to answer: its prompts, and how its encoder wants waveforms."""

    def __init__(
        self,
        model: SpeechLLM,
        prompter: prompts.Prompter,
        extractor: audio.FeatureExtractor,
        settings: ModelSettings,
    ):
        self.model, self.prompter, self.extractor = model, prompter, extractor
        self.max_seconds, self.max_new_tokens = settings.max_seconds, settings.max_new_tokens

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Listener":
        """Raises FileNotFoundError for what is no model folder, ValueError for one that is not right."""
        folder = Path(folder)
        if not (folder / "model.json").is_file():
            raise FileNotFoundError(
                f"{folder} is no model folder: it has no model.json. Give the folder of a stage 2 that "
                "training has finished, such as runs/tiny/stage2."
            )
        settings = ModelSettings.model_validate_json((folder / "model.json").read_text())
        encoder, llm, dtype = folder / settings.encoder, folder / settings.llm, jnp.dtype(settings.dtype)
        model = pretrained.load_sparqle(
            folder / "adapter.safetensors",
            pretrained.load_hubert(encoder, dtype=dtype),
            pretrained.load_decoder(llm, dtype=dtype),
            dtype=dtype,
        )
        return cls(
            model,
            prompts.Prompter.from_folder(llm, model.llm.config.vocab_size),
            audio.FeatureExtractor.from_folder(encoder),
            settings,
        )

    def check(self, waveform: np.ndarray) -> None:
        """Raises ValueError, saying what is the matter, for a waveform in which no speech can be heard."""
        longest = round(self.max_seconds * audio.SAMPLE_RATE)
        audio.check(waveform, min_samples=self.model.encoder.config.min_samples, max_samples=longest)

    def answer(
        self, waveforms: Sequence[np.ndarray], task: str = TRANSCRIBE, *, batch_size: int = 32
    ) -> list[str]:
        """What is said in waveforms float [S] at 16 kHz, as text or translated into a language ("fr").

        Warns of answers that are cut because they have `max_new_tokens` tokens and no end. Raises ValueError
        as `check` does, naming the waveform by its number.
        """
        for i, waveform in enumerate(waveforms):
            try:
                self.check(waveform)
            except ValueError as error:
                raise ValueError(f"waveform {i}: {error}") from error
        texts = []
        for start in range(0, len(waveforms), batch_size):
            some = waveforms[start : start + batch_size]
            texts += self.answer_frames(self.encode(some, batch_size), len(some), task)
        return texts

    def encode(self, waveforms: Sequence[np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """frames [B, T, D] and frames_mask bool [B, T] of up to `batch_size` waveforms that pass `check`."""
        some = [self.extractor(waveform) for waveform in waveforms]
        # All batches have one shape, so that there is one program.
        length = round(self.max_seconds * audio.SAMPLE_RATE)
        waveform, mask = audio.pad([*some, *some[:1] * (batch_size - len(some))], length)
        frames, frames_mask = _encode(*nnx.split(self.model.encoder), waveform, mask)
        return {"frames": frames, "frames_mask": frames_mask}

    def answer_frames(self, frames: dict[str, jax.Array], num: int, task: str = TRANSCRIBE) -> list[str]:
        """The answers to the first `num` rows of what `encode` has given."""
        asked = self.prompter.prompt(instructions(task)[0])
        return self._generate(self._prompts([asked] * len(frames["frames"])) | frames, num)

    def answer_text(
        self,
        texts: Sequence[str],
        task: str = TRANSCRIBE,
        *,
        batch_size: int = 32,
    ) -> list[str]:
        """The LLM's own answers to the same instructions with the written text in place of the speech."""
        template = instructions(task)[0]
        # The text is tokenised apart from what is around it, as the speech stands apart.
        before, after = self.prompter.prompt(template)
        rows = [(before + self.prompter.answer(text)[:-1], after) for text in texts]
        answers = []
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            batch = self._prompts([*some, *some[:1] * (batch_size - len(some))])
            answers += self._generate(batch, len(some))
        return answers

    def _prompts(self, asked: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
        # To multiples of 16 tokens, so that instructions of about the same length share a program.
        before, after = (-(-max(len(pair[i]) for pair in asked) // 16) * 16 for i in range(2))
        vocab_size = self.model.llm.config.vocab_size
        return prompts.collate(asked, vocab_size=vocab_size, before_length=before, after_length=after)

    def _generate(self, batch: dict[str, np.ndarray], num: int) -> list[str]:
        end = self.prompter.end_id
        settings = GenerationConfig(self.max_new_tokens, eos_token_ids=(end,))
        rows = hosts.whole(generate(self.model, batch, settings))[:num]
        if cut := int((rows != end).all(1).sum()):
            warnings.warn(
                f"{cut} of {num} answers have no end within max_new_tokens={self.max_new_tokens} tokens: "
                "they are cut there.",
                stacklevel=3,
            )
        return [self.prompter.decode(row) for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.transcribe", description=__doc__.split("\n")[0])
    parser.add_argument("recordings", nargs="+", type=Path, help="wav, flac, mp3, ogg or opus")
    parser.add_argument("--model", type=Path, default=MINIATURE, help="a model folder")
    parser.add_argument("--translate", metavar="LANGUAGE", help="translate, into German or de, say")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; else as the model was saved")
    args = parser.parse_args(argv)
    try:
        listener = Listener.from_folder(args.model)
        listener.max_new_tokens = args.max_new_tokens or listener.max_new_tokens
        instructions(args.translate or TRANSCRIBE)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    failed = False
    for recording in args.recordings:
        try:
            waveform = audio.read(recording)
            listener.check(waveform)
        except (ValueError, FileNotFoundError) as error:
            print(f"{recording}: {error}", file=sys.stderr)
            failed = True
            continue
        print(*listener.answer([waveform], args.translate or TRANSCRIBE, batch_size=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
