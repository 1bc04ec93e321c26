"""A data set: a folder with `manifest.jsonl`, one line of JSON for each utterance, and its recordings.

    {"id": "0001", "audio": "0001.wav", "text": "it is ten degrees in paris", "duration": 1.8,
     "translations": {"fr": "il fait dix degrés à paris"}, "speaker": "anna", "language": "en"}

`audio` is relative to the folder, in any format that `audio.read` knows; `duration` is in seconds;
`translations`, `speaker` and `language` may be left out.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import pydantic

MANIFEST = "manifest.jsonl"


class Utterance(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A recording and what is said in it."""

    id: Annotated[str, pydantic.Field(min_length=1)]
    audio: Path
    text: str
    duration: Annotated[float, pydantic.Field(gt=0)]
    translations: dict[str, str] = {}
    speaker: str = ""
    language: str = "en"


def read_manifest(folder: str | Path) -> list[Utterance]:
    """The utterances of a data set, the paths of their audio made whole.

    Raises FileNotFoundError for no data set or recordings that are not there, ValueError for lines that are
    not right and for ids that occur twice; each names the first ten.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no data set: it has no {MANIFEST} (see sparqle_jax/data/manifest.py)."
        )
    utterances, problems, seen = [], [], set()
    # Not splitlines: a text may have a line separator of Unicode in it, which JSON need not escape.
    for number, line in enumerate(io.StringIO(file.read_text(encoding="utf-8")), 1):
        try:
            utterance = Utterance.model_validate_json(line)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            problems.append(f"line {number}: {where}: {first['msg']}")
            continue
        if utterance.id in seen:
            problems.append(f"line {number}: the id {utterance.id!r} occurs twice")
        seen.add(utterance.id)
        utterances.append(utterance.model_copy(update={"audio": Path(folder) / utterance.audio}))
    raise_all(ValueError, f"{file} has lines that are not right", problems)
    absent = [f"{u.id}: {u.audio}" for u in utterances if not u.audio.is_file()]
    raise_all(FileNotFoundError, f"{file} names recordings that are not there", absent)
    if not utterances:
        raise ValueError(f"{file} is empty.")
    return utterances


def write_manifest(folder: str | Path, utterances: Iterable[Utterance]) -> None:
    """Writes the manifest of a data set; the audio of its utterances is relative to the folder."""
    lines = [utterance.model_dump_json() + "\n" for utterance in utterances]
    (Path(folder) / MANIFEST).write_text("".join(lines), encoding="utf-8")


def raise_all(error: type[Exception], what: str, problems: list[str]) -> None:
    """Raises one error for all problems, if there are any: the first ten by name, the others counted."""
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise error("\n  ".join([f"{what}:", *problems[:10], *more]))
