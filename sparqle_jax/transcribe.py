"""Recordings in, text out: transcripts, or translations.

    python -m sparqle_jax.transcribe RECORDING... [--model FOLDER] [--translate German]

A model folder holds `model.json`, which names the folders of the frozen towers, and `adapter.safetensors`.
Training writes one; without --model it is the miniature that comes with the package.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparqle_jax import audio, pretrained, prompts
from sparqle_jax.data.pipeline import TRANSCRIBE, instructions
from sparqle_jax.generate import GenerationConfig, generate
from sparqle_jax.model import SparQLe

MINIATURE = Path(__file__).parent / "demo" / "models" / "sparqle"
SILENCE = 1e-4  # -80 dB: no recording of speech is so quiet


def save_model(
    model: SparQLe, folder: str | Path, *, encoder: str | Path, llm: str | Path, max_seconds: float
) -> None:
    """Writes a model folder. encoder, llm: folders of the towers, which it names, relative to itself."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pretrained.save_published(model, folder / "adapter.safetensors")
    towers = {
        name: os.path.relpath(Path(tower).resolve(), folder.resolve())
        for name, tower in (("encoder", encoder), ("llm", llm))
    }
    (folder / "model.json").write_text(json.dumps(towers | {"max_seconds": max_seconds}, indent=2) + "\n")


class Listener:
    """A model with all that it needs to answer: its prompts, and how its encoder wants waveforms."""

    def __init__(
        self,
        model: SparQLe,
        prompter: prompts.Prompter,
        extractor: audio.FeatureExtractor,
        *,
        max_seconds: float,
    ):
        self.model, self.prompter, self.extractor = model, prompter, extractor
        self.max_seconds = max_seconds

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Listener":
        """Raises FileNotFoundError for what is no model folder."""
        folder = Path(folder)
        if not (folder / "model.json").is_file():
            raise FileNotFoundError(
                f"{folder} is no model folder: it has no model.json. Give the folder of a stage 2 that "
                "training has finished, such as runs/tiny/stage2."
            )
        settings = json.loads((folder / "model.json").read_text())
        encoder, llm = folder / settings["encoder"], folder / settings["llm"]
        model = pretrained.load_sparqle(
            folder / "adapter.safetensors", pretrained.load_hubert(encoder), pretrained.load_decoder(llm)
        )
        return cls(
            model,
            prompts.Prompter.from_folder(llm, model.llm.config.vocab_size),
            audio.FeatureExtractor.from_folder(encoder),
            max_seconds=settings["max_seconds"],
        )

    def check(self, waveform: np.ndarray) -> None:
        """Raises ValueError, saying what is the matter, for a waveform in which no speech can be heard."""
        seconds = len(waveform) / audio.SAMPLE_RATE
        shortest = self.model.encoder.config.min_samples
        if len(waveform) < shortest:
            raise ValueError(f"it has {len(waveform)} samples at 16 kHz; at least {shortest} are needed.")
        if not np.isfinite(waveform).all():
            raise ValueError("it has samples that are not finite (NaN or infinity).")
        if np.abs(waveform - waveform.mean()).max() < SILENCE:
            raise ValueError("it is silent.")
        if seconds > self.max_seconds:
            raise ValueError(
                f"it is {seconds:.1f} s long, but this model was trained on at most {self.max_seconds:g} s: "
                "cut it into pieces."
            )

    def answer(
        self,
        waveforms: Sequence[np.ndarray],
        task: str = TRANSCRIBE,
        *,
        batch_size: int = 32,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """What is said in waveforms float [S] at 16 kHz, as text or translated into a language ("fr").

        Raises ValueError as `check` does, naming the waveform by its number.
        """
        for i, waveform in enumerate(waveforms):
            try:
                self.check(waveform)
            except ValueError as error:
                raise ValueError(f"waveform {i}: {error}") from error
        asked = self.prompter.prompt(instructions(task)[0])
        length = round(self.max_seconds * audio.SAMPLE_RATE)
        texts = []
        for start in range(0, len(waveforms), batch_size):
            some = [self.extractor(waveform) for waveform in waveforms[start : start + batch_size]]
            # All batches have one shape, so that there is one program.
            waveform, mask = audio.pad([*some, *some[:1] * (batch_size - len(some))], length)
            batch = self._prompts([asked] * batch_size)
            batch |= {"waveform": waveform, "waveform_mask": mask}
            texts += self._generate(batch, max_new_tokens)[: len(some)]
        return texts

    def answer_text(
        self,
        texts: Sequence[str],
        task: str = TRANSCRIBE,
        *,
        batch_size: int = 32,
        max_new_tokens: int = 64,
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
            answers += self._generate(batch, max_new_tokens)[: len(some)]
        return answers

    def _prompts(self, asked: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
        # To multiples of 16 tokens, so that instructions of about the same length share a program.
        before, after = (-(-max(len(pair[i]) for pair in asked) // 16) * 16 for i in range(2))
        vocab_size = self.model.llm.config.vocab_size
        return prompts.collate(asked, vocab_size=vocab_size, before_length=before, after_length=after)

    def _generate(self, batch: dict[str, np.ndarray], max_new_tokens: int) -> list[str]:
        settings = GenerationConfig(max_new_tokens, eos_token_ids=(self.prompter.end_id,))
        return [self.prompter.decode(row) for row in np.asarray(generate(self.model, batch, settings))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.transcribe", description=__doc__.split("\n")[0])
    parser.add_argument("recordings", nargs="+", type=Path, help="wav, flac, mp3, ogg or opus")
    parser.add_argument("--model", type=Path, default=MINIATURE, help="a model folder")
    parser.add_argument("--translate", metavar="LANGUAGE", help="translate, into German or de, say")
    args = parser.parse_args(argv)
    try:
        listener = Listener.from_folder(args.model)
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
