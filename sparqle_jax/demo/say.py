"""Speaks an English sentence into a file, to be transcribed.

python -m sparqle_jax.demo.say "the train to vienna leaves at seven twenty" --output say.wav
"""

import argparse
from pathlib import Path

import soundfile

from sparqle_jax.audio import SAMPLE_RATE
from sparqle_jax.demo.speech import ACCENTS, Voice, synthesise


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sparqle_jax.demo.say", description=__doc__.split("\n")[0])
    parser.add_argument("text")
    parser.add_argument("--output", type=Path, default=Path("say.wav"))
    parser.add_argument("--accent", default="en-us", help=", ".join(ACCENTS))
    parser.add_argument("--voice", default="m3", help="a variant of espeak-ng: m1 to m8, f1 to f5, or a name")
    parser.add_argument("--rate", type=int, default=200, help="words per minute")
    args = parser.parse_args(argv)
    try:
        waveform = synthesise(args.text, Voice(args.accent, args.voice, args.rate))
    except ValueError as error:
        parser.error(str(error))
    soundfile.write(args.output, waveform, SAMPLE_RATE, subtype="PCM_16")
    print(f"{args.output}: {len(waveform) / SAMPLE_RATE:.1f} s")


if __name__ == "__main__":
    main()
