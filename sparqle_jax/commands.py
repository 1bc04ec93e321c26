"""Descriptions, arguments, and files written atomically: what the commands share."""

import argparse
from pathlib import Path

from etils import epath


def make_parser(name: str, text: str) -> argparse.ArgumentParser:
    """A parser for `sparqle NAME`. text: a docstring; what follows its first paragraph ends --help."""
    description, _, rest = text.partition("\n\n")
    return argparse.ArgumentParser(
        f"sparqle {name}",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of generation that a command has, under the names of `GenerationConfig`."""
    group = parser.add_argument_group("generation (else as the model's config.json says)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of the answer to one window")
    group.add_argument("--min-new-tokens", type=int, metavar="N")
    group.add_argument(
        "--num-beams", type=int, metavar="N", help="beam search instead of the likeliest token"
    )
    group.add_argument("--length-penalty", type=float, metavar="X")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--no-repeat-ngram-size", type=int, metavar="N")
    group.add_argument("--temperature", type=float, metavar="X", help="sampling, from the softmax at it")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--top-p", type=float, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="of sampling")


def generation_settings(args: argparse.Namespace) -> dict[str, float]:
    """The settings given on the command line."""
    names = "max_new_tokens min_new_tokens num_beams length_penalty repetition_penalty no_repeat_ngram_size"
    given = {name: getattr(args, name) for name in f"{names} temperature top_k top_p seed".split()}
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() & {"temperature", "top_k", "top_p", "seed"}:
        given["do_sample"] = True
    return given


def add_tower_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for models whose towers have moved."""
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="where the model's encoder is here")
    parser.add_argument("--llm", type=Path, metavar="FOLDER", help="where the model's LLM is here")


def nearest(folder: Path | epath.Path) -> Path:
    """A local folder, or the nearest one above it that is there."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    return there


def can_append(file: Path | epath.Path) -> bool:
    """Whether a file can grow: objects in buckets can't."""
    return "://" not in str(file)


def write_text(file: Path | epath.Path, text: str) -> None:
    """Writes a file whole or not at all: whoever is stopped while writing leaves the old one."""
    if not can_append(file):  # an object in a bucket appears when it is whole
        file.write_text(text, encoding="utf-8")
        return
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
