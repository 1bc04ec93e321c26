"""Sources of data sets: the records of LibriSpeech, CoVoST 2, MuST-C, and of one's own manifests.

A source lists its records in the order of its files, and what can't be used of them with the reason; and it
counts the rows of these files apart from that, so that `prepare` notices a record that was swallowed. It
opens no recording: that is done in parallel, later.
"""

import codecs
import csv
import dataclasses
import io
import itertools
import json
import re
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
Rows = Iterator[tuple[str, dict[str, str] | Rejection]]  # of a table, each with where it is
BLANK = " \t\r\n\v\f"  # a line of nothing else is no record: what `bytes.strip` strips
BROKEN = re.compile(r"\0|\r(?!\n)")  # in a row without its end
CONTROL = "control character", "a NUL, or a carriage return that ends no line"
_FIELD = r'(?:"[^"]*(?:""[^"]*)*"|[^",\n]*)'
CSV_ROW = re.compile(f"{_FIELD}(?:,{_FIELD})*")


class Source(Protocol):
    """languages: into which some of its records are translated."""

    @property
    def languages(self) -> tuple[str, ...]: ...

    def records(self) -> Listed: ...

    def count_rows(self) -> int:
        """The number of records and rejections that there must be, from the lines of the files."""


def checked(
    records: Iterable[Record | Rejection],
    languages: Iterable[str],
    *,
    require: Iterable[str] = (),
    allow_empty: bool = False,
) -> Listed:
    """The same records, but for those that have no text, repeat an id, or lack a translation: rejections.

    Of their translations those into `languages` are kept that are not empty. require: languages into which
    there must be one. allow_empty: an empty text says that nobody speaks; nothing is required of it then.
    """
    seen = set()
    for record in records:
        if isinstance(record, Rejection):
            yield record
            continue
        given = {code: record.translations.get(code, "").strip() for code in languages}
        translations = {code: text for code, text in given.items() if text}
        text = record.text.strip()
        lacking = [code for code in require if code not in translations]
        if not _is_utf8(record.id, record.text, record.speaker, record.language, *translations.values()):
            yield Rejection(record.line, _printable(record.id), "text is not UTF-8")
        elif not text and not allow_empty:
            detail = "--allow-empty takes it as a recording in which nobody speaks"
            yield Rejection(record.line, record.id, "no text", detail)
        elif not text and translations:
            yield Rejection(record.line, record.id, "no text", "but it has a translation")
        elif text and lacking:
            yield Rejection(record.line, record.id, f"no translation into {lacking[0]}")
        elif record.id in seen:
            yield Rejection(record.line, record.id, "duplicate id")
        else:
            seen.add(record.id)
            yield record.model_copy(update={"text": text, "translations": translations})


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
            for file in self._files(subset):
                with _open_text(file) as lines:
                    for number, line in enumerate(lines, 1):
                        if not line.strip(BLANK):
                            continue
                        name, _, text = line.strip(BLANK).partition(" ")
                        yield _record(
                            f"{subset}/{file.name}:{number}",
                            id=name,
                            audio=str(file.parent / f"{name}.flac"),
                            text=text,
                            speaker=name.split("-")[0],
                        )

    def count_rows(self) -> int:
        return sum(sum(_filled_lines(file)) for subset in self.subsets for file in self._files(subset))

    def _files(self, subset: str) -> list[epath.Path]:
        folder = epath.Path(self.folder) / subset
        files = sorted(folder.glob("*/*/*.trans.txt"))
        if not files:
            raise FileNotFoundError(f"{folder} has no */*/*.trans.txt: it is no subset of LibriSpeech.")
        return files


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
        # As in CoVoST's own script, a backslash goes before a quotation mark.
        clips = _tsv(folder / "validated.tsv", ("path", "sentence"), escaped=True)
        spoken = {row["path"]: row for _, row in clips if not isinstance(row, Rejection) and row["path"]}
        for line, row in _tsv(self._file, ("path", "translation", "split"), escaped=True):
            if isinstance(row, Rejection):
                yield row
                continue
            if row["split"] not in self._splits:
                continue
            if row["path"] not in spoken:
                detail = "or its line there has another number of columns than the header"
                yield Rejection(line, _printable(row["path"]), "not in validated.tsv", detail)
                continue
            clip = spoken[row["path"]]
            yield _record(
                line,
                id=row["path"].rpartition(".")[0] or row["path"],
                audio=str(folder / "clips" / row["path"]),
                text=clip["sentence"],
                translations={self.target: row["translation"]},
                language=self.source,
                speaker=clip.get("client_id", ""),
            )

    def count_rows(self) -> int:
        wanted = {split.encode() for split in self._splits}
        with self._file.open("rb") as lines:
            header = next(lines).rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8).split(b"\t")
            place = header.index(b"split")
            rows = (line.rstrip(b"\r\n") for line in lines if line.strip())
            return sum(
                row.count(b"\t") != len(header) - 1
                or (b"\r" in row or b"\0" in row)
                or row.split(b"\t")[place] in wanted
                for row in rows
            )

    @property
    def _file(self) -> epath.Path:
        return epath.Path(self.folder) / f"covost_v2.{self.source}_{self.target}.tsv"

    @property
    def _splits(self) -> tuple[str, str]:
        """With the recordings that CoVoST has added to the split, as its own script takes them."""
        return self.split, f"{self.split}_covost"


class MustC(Translated):
    """MuST-C's folder of a language pair, en-de: data/SPLIT/wav, data/SPLIT/txt/SPLIT.yaml, .en and .de."""

    def records(self) -> Listed:
        # Here, because only preparing MuST-C needs it.
        import yaml

        folder = epath.Path(self.folder) / "data" / self.split
        files = {name: self._text(name) for name in ("yaml", self.source, self.target)}
        try:
            with _open_text(files["yaml"]) as file:
                segments = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or []
        except yaml.YAMLError as error:
            raise ValueError(f"{files['yaml']} is no YAML: {error}") from error
        texts = {}
        for code in (self.source, self.target):
            with _open_text(files[code]) as file:
                texts[code] = [line.rstrip("\r\n") for line in file]
            if len(texts[code]) != len(segments):
                raise ValueError(
                    f"{files[code]} has {len(texts[code])} lines, but {files['yaml'].name} has "
                    f"{len(segments)} segments: they do not belong together."
                )
        for number, segment in enumerate(segments):
            line = f"{files['yaml'].name}:{number + 1}"
            if not isinstance(segment, dict):
                yield Rejection(line, "", "wrong value", f"a segment is needed, not {str(segment)[:40]!r}")
                continue
            name = str(segment.get("wav", ""))
            yield _record(
                line,
                id=f"{name.removesuffix('.wav')}_{number}",
                audio=str(folder / "wav" / name) if name else "",
                text=texts[self.source][number],
                translations={self.target: texts[self.target][number]},
                language=self.source,
                speaker=str(segment.get("speaker_id", "")),
                offset=segment.get("offset"),
                seconds=segment.get("duration"),
            )

    def count_rows(self) -> int:
        with self._text(self.source).open("rb") as lines:
            return sum(1 for _ in lines)

    def _text(self, name: str) -> epath.Path:
        return epath.Path(self.folder) / "data" / self.split / "txt" / f"{self.split}.{name}"


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
    columns translation_de. In TSV a line is a record, and a quotation mark is a character as any other; in
    CSV it quotes a field. wanted: the languages of translations to take; None takes all that occur.
    """

    file: str
    language: str = "en"
    wanted: tuple[str, ...] | None = None

    @property
    def languages(self) -> tuple[str, ...]:
        if self.wanted is not None:
            return self.wanted
        records = (record for record in self.records() if isinstance(record, Record))
        return tuple(
            sorted({code for record in records for code, text in record.translations.items() if text.strip()})
        )

    def records(self) -> Listed:
        file, form = epath.Path(self.file), self._form
        if form == "jsonl":
            yield from self._jsonl(file)
        elif form == "pair":
            yield from self._pair(file)
        else:
            yield from self._table(_csv(file) if form == "csv" else _tsv(file))

    def count_rows(self) -> int:
        filled = _filled_lines(epath.Path(self.file))
        if self._form == "jsonl":
            return sum(filled)
        if self._form == "csv":
            # A row ends with each line up to which the quotation marks are even in number.
            with epath.Path(self.file).open("rb") as lines:
                marks = itertools.accumulate(line.count(b'"') for line in lines)
                filled = [some and not count % 2 for some, count in zip(filled, marks, strict=True)]
            return sum(filled) - 1
        return sum(filled[1:])  # beneath the header, or the pair's root

    @property
    def _form(self) -> str:
        """ "jsonl", "csv", "tsv" or, where a TSV's first line has no tab, "pair". Raises ValueError."""
        file = epath.Path(self.file)
        forms = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}
        if file.suffix not in forms:
            raise ValueError(f"{file} is no manifest: give .jsonl, .tsv or .csv.")
        with _open_text(file) as lines:
            first = next(lines, "")
        return "pair" if file.suffix == ".tsv" and "\t" not in first else forms[file.suffix]

    def _jsonl(self, file: epath.Path) -> Listed:
        with _open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file.name}:{number}"
                if not line.strip(BLANK):
                    continue
                try:
                    fields = json.loads(line)
                except json.JSONDecodeError as error:
                    yield Rejection(where, "", "not JSON", str(error))
                    continue
                if not isinstance(fields, dict):
                    yield Rejection(where, "", "not JSON", f"an object is needed, not {line.strip()[:40]!r}")
                    continue
                translations = fields.get("translations") or {}
                if isinstance(translations, dict):
                    translations = {code: text for code, text in translations.items() if text is not None}
                yield self._utterance(where, fields, translations)

    def _table(self, rows: Rows) -> Listed:
        for where, row in rows:
            if isinstance(row, Rejection):
                yield row
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
            # An empty cell says nothing, but for the text's, which may say that nobody speaks.
            fields = {name: cell for name, cell in row.items() if cell or name in ALIASES["text"]}
            yield self._utterance(where, fields | numbers, translations)

    def _utterance(self, where: str, fields: dict[str, Any], translations: Any) -> Record | Rejection:
        values = {}
        for name, aliases in ALIASES.items():
            given = [fields[alias] for alias in aliases if fields.get(alias) is not None]
            if given:
                values[name] = next((value for value in given if value != ""), "")
        for name in ("audio", "text"):
            if name not in values or values["audio"] == "":
                return Rejection(where, _printable(str(fields.get("id", ""))), f"no {name}")
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
                where, cells = f"{file.name}:{number}", line.rstrip("\r\n").split("\t")
                text = next(answers, None)
                task = cells[2].strip() if len(cells) > 2 else "transcription"
                if not line.strip(BLANK):
                    if text is not None and text.strip():
                        raise ValueError(
                            f"line {number} of {file} is empty, but line {number - 1} of {texts.name} is "
                            "not: they do not belong together."
                        )
                elif BROKEN.search(line.rstrip("\r\n")):
                    yield Rejection(where, "", *CONTROL)
                elif text is None:
                    yield Rejection(where, _printable(cells[0]), "no text", f"{texts.name} has fewer lines")
                elif len(cells) < 2 or not re.fullmatch("[0-9]+", cells[1].strip()):
                    detail = "path, samples, task are needed"
                    yield Rejection(where, _printable(cells[0]), "wrong value", detail)
                elif task != "transcription":
                    detail = _printable(f"the text of a {task!r}")
                    yield Rejection(where, _printable(cells[0]), "no transcript", detail)
                else:
                    yield _record(
                        where,
                        id=cells[0],
                        audio=str(root / cells[0]),
                        text=text.rstrip("\r\n"),
                        language=self.language,
                        declared=int(cells[1]) / 16_000,
                    )
            if any(line.strip() for line in answers):
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


def _tsv(file: epath.Path, needed: tuple[str, ...] = (), *, escaped: bool = False) -> Rows:
    """The rows of a tab-separated table with a header, and where each is: a line is a row.

    escaped: a backslash is left out, and what follows it is kept. Raises ValueError for what is no header.
    """
    with _open_text(file) as lines:
        header = _header(file, next(lines, "").rstrip("\r\n").split("\t"), needed)
        for number, line in enumerate(lines, 2):
            if line.strip(BLANK):
                cells = line.rstrip("\r\n").split("\t")
                if escaped:
                    cells = [re.sub(r"\\(.)", r"\1", cell) for cell in cells]
                yield _row(f"{file.name}:{number}", header, cells, line)


def _csv(file: epath.Path) -> Rows:
    """The rows of a comma-separated table with a header, and where each begins.

    Raises ValueError, naming the line, for a quotation mark that does not begin or end a field, for one that
    is not closed, and for a quoted field that has another row in it.
    """
    with _open_text(file) as lines:
        header: list[str] = []
        numbered = enumerate(lines, 1)
        for number, line in numbered:
            row, marks, last = [line], line.count('"'), number
            while marks % 2:  # a quoted field goes on in the next line
                last, line = next(numbered, (last, None))
                if line is None:
                    raise ValueError(f"{file}, line {number}: a quotation mark is not closed in or after it.")
                row.append(line)
                marks += line.count('"')
            text = "".join(row)
            if not text.strip(BLANK):
                continue
            where = f"{file}, line {number}" + f" to {last}" * (last > number)
            if not CSV_ROW.fullmatch(text.rstrip("\r\n")):
                raise ValueError(
                    f"{where}: a stray quotation mark. A field with one must begin and end with one, and "
                    'have two for each in it: "she said ""yes"""; or give a .tsv, where nothing is quoted.'
                )
            if header and BROKEN.search(text.rstrip("\r\n")):
                yield where, Rejection(f"{file.name}:{number}", "", *CONTROL)
                continue
            try:
                (cells,) = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
            except csv.Error as error:
                raise ValueError(f"{where} can't be read: {error}.") from error
            if not header:
                header = _header(file, cells)
                continue
            for cell in cells:
                if any(part.count(",") >= len(header) - 1 for part in cell.split("\n")[1:]):
                    raise ValueError(
                        f"{where}: a quoted field has in it what could be another row. Is a quotation mark "
                        "missing or too many? If not, take the line break out of it."
                    )
            yield _row(f"{file.name}:{number}", header, cells, text)


def _header(file: epath.Path, names: list[str], needed: tuple[str, ...] = ()) -> list[str]:
    """The names of a table's columns. Raises ValueError for one that is missing or there twice."""
    if lacking := set(needed) - set(names):
        raise ValueError(f"{file} has no columns {sorted(lacking)}; it has {names}.")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{file} has the columns {twice} twice: which of them is meant?")
    return names


def _row(
    where: str, header: list[str], cells: list[str], text: str
) -> tuple[str, dict[str, str] | Rejection]:
    if len(cells) != len(header):
        detail = f"{len(cells)} columns, the header has {len(header)}"
        return where, Rejection(where, "", "wrong number of columns", detail)
    if BROKEN.search(text.rstrip("\r\n")):
        return where, Rejection(where, "", *CONTROL)
    return where, dict(zip(header, cells, strict=True))


def _filled_lines(file: epath.Path) -> list[bool]:
    """The numbers of the lines of a file that are not blank."""
    with file.open("rb") as lines:
        return [bool(line.strip()) for line in lines]


@contextmanager
def _open_text(file: epath.Path) -> Iterator[Iterator[str]]:
    """The lines of a text, which only line feeds end. Bytes that are not UTF-8 become surrogates, which
    `checked` finds. Raises ValueError for UTF-16, and for lines that end otherwise."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist.")
    with file.open("rb") as binary:
        if binary.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{file} is UTF-16: save it as UTF-8.")
        binary.seek(0)
        if re.search(rb"\r(?!\n)", binary.readline().rstrip(b"\r\n")):
            raise ValueError(f"{file}: its lines end with carriage returns alone: save it with line feeds.")
        binary.seek(0)
        yield io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _is_utf8(*texts: str) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
