"""Recordings in, text out: transcripts, translations, or answers to a prompt of your own.

    sparqle transcribe talk.mp3
    sparqle transcribe recordings/ "more/*.flac" --translate German --format srt --output subtitles/
    arecord -f S16_LE -r 16000 -d 5 | sparqle transcribe -

Recordings longer than the model hears at once are cut at pauses. With --output, what is there already is
left alone, so the same command goes on where it was stopped. Exit status: 0 all are done; 1 some could not
be heard, each with its reason; 2 a mistake in the command, and nothing was done.
"""

import argparse
import csv
import glob
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import jax
import tqdm

from sparqle_jax import audio, commands
from sparqle_jax.sparqle import BATCH_SIZE, MINIATURE, Segment, SparQLe, Transcript, with_speech
from sparqle_jax.tasks import TRANSCRIBE, instructions

ENDINGS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aiff", ".aif", ".au", *audio.FFMPEG}


def find_recordings(names: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Short names and files of all recordings: files as given, of folders and globs all that are in them.

    Also a reason for each folder or glob without any. A file that is given twice is there once.
    """
    found, problems = {}, []
    for name in names:
        if os.path.isdir(name):
            files = sorted(str(file) for file in Path(name).rglob("*") if file.suffix.lower() in ENDINGS)
            pairs = [(os.path.relpath(file, name), file) for file in files]
        elif glob.has_magic(name) and not os.path.exists(name):
            pairs = [(os.path.basename(file), file) for file in sorted(glob.glob(name, recursive=True))]
        else:
            pairs = [("stdin" if name == "-" else os.path.basename(name), name)]
        if not pairs:
            problems.append(f"{name} has no recordings: looked for {', '.join(sorted(ENDINGS))}.")
        for short, file in pairs:
            found.setdefault(file, short)
    return [(short, file) for file, short in found.items()], problems


def output_names(recordings: list[tuple[str, str]]) -> dict[str, str]:
    """Files by what their output is to be called: their names, with the ending where it tells two apart.

    Raises ValueError for two files of one name.
    """
    stems = Counter(os.path.splitext(short)[0] for short, _ in recordings)
    named: dict[str, str] = {}
    for short, file in recordings:
        stem = os.path.splitext(short)[0]
        name = stem if stems[stem] == 1 else short
        if named.setdefault(name, file) != file:
            raise ValueError(
                f"{named[name]} and {file} would both be called {name} in --output: give the folder around "
                "them, or one after the other."
            )
    return named


def _clock(seconds: float, mark: str) -> str:
    whole, thousandths = divmod(round(1000 * seconds), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{mark}{thousandths:03}"


def _spoken(transcript: Transcript) -> list[Segment]:
    return [segment for segment in transcript.segments if segment.text]


def as_text(transcript: Transcript) -> str:
    return transcript.text + "\n"


def as_json(transcript: Transcript) -> str:
    segments = [vars(segment) for segment in transcript.segments]
    answer = {"text": transcript.text, "complete": transcript.complete, "segments": segments}
    return json.dumps(answer, ensure_ascii=False) + "\n"


def as_srt(transcript: Transcript) -> str:
    blocks = [
        f"{i}\n{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}\n{segment.text}\n"
        for i, segment in enumerate(_spoken(transcript), 1)
    ]
    return "\n".join(blocks)


def as_vtt(transcript: Transcript) -> str:
    escaped = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    blocks = [
        f"\n{_clock(segment.start, '.')} --> {_clock(segment.end, '.')}\n{segment.text.translate(escaped)}\n"
        for segment in _spoken(transcript)
    ]
    return "WEBVTT\n" + "".join(blocks)


def as_tsv(transcript: Transcript) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["start", "end", "text"])
    writer.writerows((segment.start, segment.end, segment.text) for segment in _spoken(transcript))
    return text.getvalue()


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "text": as_text,
    "json": as_json,
    "srt": as_srt,
    "vtt": as_vtt,
    "tsv": as_tsv,
}


def _seconds(file: str) -> float:
    """The length of a recording, or 0 if it can't be told: why is said when it is heard."""
    try:
        return audio.count_samples(file) / audio.SAMPLE_RATE
    except (audio.UnusableAudio, OSError):
        return 0.0


def make_parser() -> argparse.ArgumentParser:
    parser = commands.make_parser("transcribe", __doc__)
    parser.add_argument("recordings", nargs="+", help="files, folders, globs, or - for stdin")
    parser.add_argument("--model", type=Path, default=MINIATURE, help="a model folder; else the miniature")
    commands.add_tower_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--translate", metavar="LANGUAGE", help="into German, say, or de")
    what.add_argument("--prompt", help="your own, with <SpeechHere> where the speech is to be")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a file for each, in place of stdout")
    parser.add_argument("--overwrite", action="store_true", help="also what --output has already")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"windows ({BATCH_SIZE})")
    commands.add_generation_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.batch_size < 1:
            raise ValueError(f"--batch-size {args.batch_size}: at least 1.")
        instruction = (
            with_speech(args.prompt) if args.prompt else instructions(args.translate or TRANSCRIBE)[0]
        )
        found, problems = find_recordings(args.recordings)
        if not found:
            raise ValueError(" ".join(problems))
        # Without --output there is nothing to be called the same.
        recordings = {file: file for _, file in found} if args.output is None else output_names(found)
        if args.output is None and args.format in ("srt", "vtt", "tsv") and len(recordings) > 1:
            raise ValueError(f"--format {args.format} of several recordings needs --output DIR.")
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
        sparqle = SparQLe.from_pretrained(args.model, encoder=args.encoder, llm=args.llm)
        settings = commands.generation_settings(args)
        sparqle.generation_config(**settings)
        sparqle.prompter.prompt(instruction)
    except (ValueError, OSError) as error:
        parser.error(str(error))  # with status 2
    ending = {"text": ".txt"}.get(args.format, f".{args.format}")
    if args.output is not None and not args.overwrite:
        there = [name for name in recordings if (args.output / (name + ending)).is_file()]
        recordings = {name: file for name, file in recordings.items() if name not in there}
        if there:
            print(f"{len(there)} are done already, {len(recordings)} are left.", file=sys.stderr)
    with ExitStack() as stack:
        if "-" in recordings.values():
            kept = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".wav"))
            shutil.copyfileobj(sys.stdin.buffer, kept)
            kept.flush()
            recordings = {name: kept.name if file == "-" else file for name, file in recordings.items()}
        return _transcribe(sparqle, recordings, problems, instruction, settings, args, ending)


def _transcribe(
    sparqle: SparQLe,
    recordings: dict[str, str],
    problems: list[str],
    instruction: str,
    settings: dict[str, float],
    args: argparse.Namespace,
    ending: str,
) -> int:
    lengths = {name: _seconds(file) for name, file in recordings.items()}
    order = sorted(recordings, key=lengths.__getitem__) if args.output is not None else list(recordings)
    progress = tqdm.tqdm(
        total=round(sum(lengths.values()), 1),
        unit="s of audio",
        desc=f"{len(order)} recordings",
        disable=None if len(order) > 1 or sum(lengths.values()) > 60 else True,
    )
    failed, compiling, began = len(problems), [0.0], time.monotonic()
    for problem in problems:
        print(problem, file=sys.stderr)

    def compiled(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            compiling[0] += seconds

    most = sparqle.generation_config(**settings).max_new_tokens
    jax.monitoring.register_event_duration_secs_listener(compiled)
    with progress, warnings.catch_warnings():
        warnings.simplefilter("always")
        results: Iterator = sparqle.run(
            (recordings[name] for name in order),
            instruction,
            batch_size=args.batch_size,
            heard=lambda seconds: progress.update(round(seconds, 1)),
            **settings,
        )
        for name, result in zip(order, results, strict=True):
            if isinstance(result, Exception):
                failed += 1
                with progress.external_write_mode(sys.stderr):
                    print(_reason(recordings[name], result), file=sys.stderr)
                continue
            if not result.complete:
                with progress.external_write_mode(sys.stderr):
                    print(
                        f"{recordings[name]}: an answer has no end within max_new_tokens={most} tokens and "
                        "is cut there: --max-new-tokens allows more.",
                        file=sys.stderr,
                    )
            text = FORMATS[args.format](result)
            if args.output is not None:
                file = args.output / (name + ending)
                file.parent.mkdir(parents=True, exist_ok=True)
                commands.write_text(file, text)
                continue
            with progress.external_write_mode():
                several = len(order) > 1
                if several and args.format == "json":
                    text = (
                        json.dumps({"file": recordings[name], **json.loads(text)}, ensure_ascii=False) + "\n"
                    )
                elif several:
                    text = f"{recordings[name]}\t{text}"
                print(text, end="", flush=True)
    jax.monitoring.unregister_event_duration_listener(compiled)
    took = time.monotonic() - began - compiling[0]
    print(
        f"{sum(lengths.values()):.1f} s of audio in {took:.1f} s, and {compiling[0]:.1f} s to compile.",
        file=sys.stderr,
    )
    if failed and len(order) + len(problems) > 1:
        print(f"{failed} of {len(order) + len(problems)} could not be heard.", file=sys.stderr)
    return 1 if failed else 0


def _reason(file: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if file in text else f"{file}: {text}"


if __name__ == "__main__":
    sys.exit(main())
