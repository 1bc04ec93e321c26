"""Makes the miniature's data sets: sentences, spoken by synthesised voices.

    python -m sparqle_jax.demo.datasets FOLDER --train 20000

writes FOLDER/train, and for evaluation FOLDER/seen and FOLDER/unseen: sentences that are in no training
set, by voices that are in it and by voices that are not.
"""

import argparse
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import tqdm

from sparqle_jax.audio import SAMPLE_RATE
from sparqle_jax.data.builder import Limits, prepare
from sparqle_jax.data.sources import Manifest
from sparqle_jax.demo import grammar, speech

MAX_SECONDS = 3.0


def make_data_set(
    folder: str | Path, num: int, *, seed: int, voices: tuple[str, ...], test: bool = False, repeat: int = 1
) -> None:
    """Makes a data set of `num` sentences, each spoken by `repeat` voices at random.

    It comes about as any other: recordings and a manifest, which are then prepared.

    A folder appears only when it is whole. One that is there already is left as it is; raises ValueError when
    it was not made with the same arguments.
    """
    folder = Path(folder)
    made_with = {"num": num, "seed": seed, "voices": list(voices), "test": test, "repeat": repeat}
    if folder.exists():
        file = folder / "world.json"
        if not (file.is_file() and json.loads(file.read_text()) == made_with):
            raise ValueError(
                f"{folder} is there already, and is not the data set of {num} sentences and seed {seed} that "
                "is wanted: choose another folder, or delete that one."
            )
        return
    recordings, partial = (folder.with_name(f"{folder.name}.{name}") for name in ("recordings", "partial"))
    for left in (recordings, partial):
        shutil.rmtree(left, ignore_errors=True)
    recordings.mkdir(parents=True)
    sentences = grammar.sentences(num, seed, test=test)
    tasks = [
        (recordings, f"{i:06d}-{k}", sentence, voices, [seed, test, i, k])
        for k in range(repeat)
        for i, sentence in enumerate(sentences)
    ]
    manifest = recordings / "manifest.jsonl"
    # Spawned: espeak-ng does not survive a fork.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool, open(manifest, "w") as lines:
        results = pool.imap(_speak, tasks, chunksize=32)
        for line in tqdm.tqdm(results, f"speech: {folder.name}", len(tasks), unit="utterance"):
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    limits = Limits(max_seconds=MAX_SECONDS, max_rejected=0)
    # A test set is so small that starting processes for it would take longer.
    prepare(partial, Manifest(str(manifest)), limits, "runner=DirectRunner" if test else "")
    (partial / "world.json").write_text(json.dumps(made_with) + "\n")
    partial.rename(folder)
    shutil.rmtree(recordings)


def _speak(task: tuple[Path, str, dict[str, str], tuple[str, ...], list[int]]) -> dict[str, Any]:
    """Speaks a sentence into a file, and returns its line of the manifest."""
    folder, name, sentence, voices, seed = task
    rng = np.random.default_rng(seed)
    text = sentence["en"]
    while True:
        voice = speech.draw_voice(rng, voices)
        waveform = speech.synthesise(text, voice)
        if len(waveform) <= MAX_SECONDS * SAMPLE_RATE:
            break
    soundfile.write(folder / f"{name}.wav", waveform, SAMPLE_RATE, subtype="PCM_16")
    return {
        "id": name,
        "audio": f"{name}.wav",
        "text": text,
        "translations": {code: words for code, words in sentence.items() if code != "en"},
        "speaker": f"{voice.accent}+{voice.variant}",
        "duration": len(waveform) / SAMPLE_RATE,
    }


def make_world(folder: str | Path, *, train: int, test: int, seed: int, repeat: int = 1) -> None:
    """The three data sets of the miniature in `folder`: train, seen, unseen."""
    folder = Path(folder)
    make_data_set(folder / "train", train, seed=seed, voices=speech.SEEN, repeat=repeat)
    make_data_set(folder / "seen", test, seed=seed, voices=speech.SEEN, test=True)
    make_data_set(folder / "unseen", test, seed=seed, voices=speech.UNSEEN, test=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m sparqle_jax.demo.datasets", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=20_000, help="sentences to train on")
    parser.add_argument("--repeat", type=int, default=1, help="voices that speak each of them")
    parser.add_argument("--test", type=int, default=512, help="sentences in each set for evaluation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    make_world(args.folder, train=args.train, test=args.test, seed=args.seed, repeat=args.repeat)


if __name__ == "__main__":
    main()
