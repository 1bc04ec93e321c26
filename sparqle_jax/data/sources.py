"""What there is to be prepared: the records of LibriSpeech, CoVoST 2, MuST-C, and of one's own manifests.

A source lists its records in the order of its files, and what can't be used of them with the reason. It opens
no recording: that is done in parallel, later.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import pydantic
from etils import epath


class Record(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """An utterance to be read.

    line: where its source names it, "train.tsv:17". offset, seconds: the part of the recording, if not all of
    it. declared: how long the source says that it is, in seconds.
    """

    line: str
    id: Annotated[str, pydantic.Field(min_length=1)]
    audio: Annotated[str, pydantic.Field(min_length=1)]
    text: str
    translations: dict[str, str] = {}
    language: str = "en"
    speaker: str = ""
    offset: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0.0
    seconds: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None
    declared: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = None


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A record that can't be used. reason: the same for all of its kind; detail: of this one."""

    line: str
    id: str
    reason: str
    detail: str = ""


Listed = Iterator[Record | Rejection]


class Source(Protocol):
    """languages: into which its records are translated."""

    @property
    def languages(self) -> tuple[str, ...]: ...

    def records(self) -> Listed: ...


def checked(records: Iterable[Record | Rejection], languages: Iterable[str]) -> Listed:
    """The same records, those rejected that have no text, lack one of these translations, or repeat an id.

    Other translations than these are left out.
    """
    seen = set()
    for record in records:
        if isinstance(record, Rejection):
            yield record
            continue
        translations = {code: record.translations.get(code, "").strip() for code in languages}
        lacking = [code for code, text in translations.items() if not text]
        if not _is_utf8(record.id, record.text, record.speaker, record.language, *translations.values()):
            yield Rejection(record.line, _printable(record.id), "text is not UTF-8")
        elif not record.text.strip():
            yield Rejection(record.line, record.id, "no text")
        elif lacking:
            yield Rejection(record.line, record.id, f"no translation into {lacking[0]}")
        elif record.id in seen:
            yield Rejection(record.line, record.id, "duplicate id")
        else:
            seen.add(record.id)
            yield record.model_copy(update={"text": record.text.strip(), "translations": translations})


@dataclasses.dataclass(frozen=True)
class LibriSpeech:
    """The folders of LibriSpeech: SUBSET/SPEAKER/CHAPTER/*.flac with SPEAKER-CHAPTER.trans.txt.

    folder: that holds the subsets, "LibriSpeech" in the archives.
    """

    folder: str
    subsets: tuple[str, ...]
    languages: tuple[str, ...] = ()

    def records(self) -> Listed:
        for subset in self.subsets:
            folder = epath.Path(self.folder) / subset
            files = sorted(folder.glob("*/*/*.trans.txt"))
            if not files:
                raise FileNotFoundError(f"{folder} has no */*/*.trans.txt: it is no subset of LibriSpeech.")
            for file in files:
                with _open_text(file) as lines:
                    for number, line in enumerate(lines, 1):
                        name, _, text = line.strip().partition(" ")
                        yield _record(
                            f"{subset}/{file.name}:{number}",
                            id=name,
                            audio=str(file.parent / f"{name}.flac"),
                            text=text,
                            speaker=name.split("-")[0],
                        )


# How Common Voice's and CoVoST's tables are written: a quotation mark is a character as any other.
COVOST = dict(delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")


@dataclasses.dataclass(frozen=True)
class Translated:
    """A folder of speech in language `source` with translations into `target`."""

    folder: str
    source: str
    target: str
    split: str

    @property
    def languages(self) -> tuple[str, ...]:
        return (self.target,)


class Covost2(Translated):
    """Common Voice's folder (clips/, validated.tsv), and in it CoVoST 2's covost_v2.SOURCE_TARGET.tsv."""

    def records(self) -> Listed:
        folder = epath.Path(self.folder)
        file, validated = folder / f"covost_v2.{self.source}_{self.target}.tsv", folder / "validated.tsv"
        clips = _rows(validated, ("path", "sentence"), **COVOST)
        spoken = {row["path"]: row for _, row in clips if row["path"]}
        # As in CoVoST's own script: "train_covost" are recordings that were added to the split.
        for line, row in _rows(file, ("path", "translation", "split"), **COVOST):
            if None in row or None in row.values():
                yield Rejection(line, _printable(row["path"] or ""), "wrong number of columns")
                continue
            if row["split"] not in (self.split, f"{self.split}_covost"):
                continue
            if row["path"] not in spoken:
                yield Rejection(line, _printable(row["path"]), "not in validated.tsv")
                continue
            clip = spoken[row["path"]]
            yield _record(
                line,
                id=row["path"].rpartition(".")[0] or row["path"],
                audio=str(folder / "clips" / row["path"]),
                text=clip["sentence"] or "",
                translations={self.target: row["translation"]},
                language=self.source,
                speaker=clip.get("client_id") or "",
            )


class MustC(Translated):
    """MuST-C's folder of a language pair, en-de: data/SPLIT/wav, data/SPLIT/txt/SPLIT.yaml, .en and .de."""

    def records(self) -> Listed:
        # Here, because only preparing MuST-C needs it.
        import yaml

        folder = epath.Path(self.folder) / "data" / self.split
        files = {name: folder / "txt" / f"{self.split}.{name}" for name in ("yaml", self.source, self.target)}
        try:
            with _open_text(files["yaml"]) as file:
                segments = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or []
        except yaml.YAMLError as error:
            raise ValueError(f"{files['yaml']} is no YAML: {error}") from error
        texts = {}
        for code in (self.source, self.target):
            with _open_text(files[code]) as file:
                texts[code] = [line.rstrip("\n") for line in file]
            if len(texts[code]) != len(segments):
                raise ValueError(
                    f"{files[code]} has {len(texts[code])} lines, but {files['yaml'].name} has "
                    f"{len(segments)} segments: they do not belong together."
                )
        for number, segment in enumerate(segments):
            name = str(segment.get("wav", ""))
            yield _record(
                f"{files['yaml'].name}:{number + 1}",
                id=f"{name.removesuffix('.wav')}_{number}",
                audio=str(folder / "wav" / name) if name else "",
                text=texts[self.source][number],
                translations={self.target: texts[self.target][number]},
                language=self.source,
                speaker=str(segment.get("speaker_id", "")),
                offset=segment.get("offset"),
                seconds=segment.get("duration"),
            )


# Names of the same thing in manifests of this project, NeMo's and Common Voice's.
ALIASES = {
    "audio": ("audio", "audio_filepath", "path"),
    "text": ("text", "sentence"),
    "language": ("language", "lang", "source_lang"),
    "speaker": ("speaker", "speaker_id", "client_id"),
}
TRANSLATION = "translation_"  # + language code: a column of TSV and CSV


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One's own manifest: JSONL (NeMo's too), TSV or CSV with a header, or the reference's tsv + txt pair.

    file: paths in it are relative to its folder. Fields: audio, text; if known id, speaker, language, offset
    and duration in seconds; translations by language: in JSONL {"translations": {"de": ...}}, in TSV and CSV
    columns translation_de. wanted: the languages of translations to take; None takes all that occur.
    """

    file: str
    language: str = "en"
    wanted: tuple[str, ...] | None = None

    @property
    def languages(self) -> tuple[str, ...]:
        if self.wanted is not None:
            return self.wanted
        records = (record for record in self.records() if isinstance(record, Record))
        return tuple(sorted({code for record in records for code in record.translations}))

    def records(self) -> Listed:
        file = epath.Path(self.file)
        if file.suffix in (".jsonl", ".json"):
            yield from self._jsonl(file)
        elif file.suffix == ".csv":
            yield from self._table(file, delimiter=",")
        elif file.suffix == ".tsv":
            with _open_text(file) as lines:
                first = next(lines, "")
            yield from self._table(file, delimiter="\t") if "\t" in first else self._pair(file)
        else:
            raise ValueError(f"{file} is no manifest: give .jsonl, .tsv or .csv.")

    def _jsonl(self, file: epath.Path) -> Listed:
        with _open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file.name}:{number}"
                if not line.strip():
                    continue
                try:
                    fields = json.loads(line)
                except json.JSONDecodeError as error:
                    yield Rejection(where, "", "not JSON", str(error))
                    continue
                if not isinstance(fields, dict):
                    yield Rejection(where, "", "not JSON", f"an object is needed, not {line.strip()[:40]!r}")
                    continue
                yield self._utterance(where, fields, fields.get("translations") or {})

    def _table(self, file: epath.Path, delimiter: str) -> Listed:
        for where, row in _rows(file, delimiter=delimiter):
            if None in row or None in row.values():
                yield Rejection(where, "", "wrong number of columns")
                continue
            translations = {
                name.removeprefix(TRANSLATION): text
                for name, text in row.items()
                if name.startswith(TRANSLATION) and text
            }
            numbers: dict[str, Any] = {}
            try:
                numbers = {name: float(row[name]) for name in ("offset", "duration") if row.get(name)}
            except ValueError as error:
                yield Rejection(where, "", "wrong value", str(error))
                continue
            yield self._utterance(where, {k: v for k, v in row.items() if v} | numbers, translations)

    def _utterance(self, where: str, fields: dict[str, Any], translations: Any) -> Record | Rejection:
        values = {}
        for name, aliases in ALIASES.items():
            given = [fields[alias] for alias in aliases if fields.get(alias) is not None]
            if given:
                values[name] = given[0]
        for name in ("audio", "text"):
            if values.get(name) in (None, ""):
                return Rejection(where, str(fields.get("id", "")), f"no {name}")
        audio, offset, duration = values["audio"], fields.get("offset"), fields.get("duration")
        if fields.get("target_lang") not in (None, values.get("language", self.language)):
            return Rejection(where, str(fields.get("id", "")), "no transcript", "its text is a translation")
        for name in ("speaker", "id"):
            if isinstance(fields.get(name), int):
                values[name] = str(fields[name])
        if isinstance(audio, str) and "://" not in audio:
            values["audio"] = str(epath.Path(self.file).parent / audio)
        start = "" if offset is None else f"@{offset}"
        values.setdefault("language", self.language)
        length = {"declared" if offset is None else "seconds": duration}
        return _record(
            where,
            translations=translations,
            offset=0.0 if offset is None else offset,
            **{"id": fields.get("id") or f"{audio}{start}", **values, **length},
        )

    def _pair(self, file: epath.Path) -> Listed:
        """fairseq's manifest as the reference reads it: a root, then path, samples, task; texts in a .txt."""
        texts = file.with_suffix(".txt")
        if not texts.exists():
            raise FileNotFoundError(
                f"{file} has no header with tabs, so it is taken for the reference's tsv; but {texts}, its "
                "texts, does not exist."
            )
        with _open_text(file) as lines, _open_text(texts) as answers:
            root = file.parent / next(lines, "").strip()
            for number, line in enumerate(lines, 2):
                where, cells = f"{file.name}:{number}", line.rstrip("\n").split("\t")
                text = next(answers, None)
                task = cells[2].strip() if len(cells) > 2 else "transcription"
                if text is None:
                    yield Rejection(where, cells[0], "no text", f"{texts.name} has fewer lines")
                elif len(cells) < 2 or not cells[1].strip().isdigit():
                    yield Rejection(where, cells[0], "wrong value", "path, samples, task are needed")
                elif task != "transcription":
                    yield Rejection(where, cells[0], "no transcript", f"the text of a {task!r}")
                else:
                    yield _record(
                        where,
                        id=cells[0],
                        audio=str(root / cells[0]),
                        text=text,
                        language=self.language,
                        declared=int(cells[1]) / 16_000,
                    )
            if next(answers, "").strip():
                raise ValueError(f"{texts} has more lines than {file}: they do not belong together.")


def _record(line: str, **fields: Any) -> Record | Rejection:
    try:
        return Record(line=line, **{name: value for name, value in fields.items() if value is not None})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        name = fields.get("id")
        named = _printable(name) if isinstance(name, str) else ""
        return Rejection(line, named, "wrong value", f"{where}: {first['msg']}")


def _rows(
    file: epath.Path, needed: tuple[str, ...] = (), **dialect: Any
) -> Iterator[tuple[str, dict[str | None, Any]]]:
    """The rows of a table with a header, and where each is. Raises ValueError for a missing column, and for a
    quotation mark that is not closed."""
    with _open_text(file) as lines:
        reader = csv.DictReader(lines, strict=True, **dialect)
        try:
            if lacking := set(needed) - set(reader.fieldnames or ()):
                raise ValueError(f"{file} has no columns {sorted(lacking)}; it has {reader.fieldnames}.")
            for row in reader:
                yield f"{file.name}:{reader.line_num}", row
        except csv.Error as error:
            raise ValueError(
                f"{file} is not a table, at or before line {reader.reader.line_num}: {error}."
            ) from error


@contextmanager
def _open_text(file: epath.Path) -> Iterator[Iterator[str]]:
    """The lines of a text. Bytes that are not UTF-8 become surrogates, which `checked` finds."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist.")
    with file.open("rb") as binary:
        yield io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _is_utf8(*texts: str) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
