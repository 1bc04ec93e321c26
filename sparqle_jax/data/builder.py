"""Makes a data set: a TFDS builder whose work is a Beam pipeline over shards.

Its parts run in the workers, so they are not in the command's own module (prepare.py), unknown there.
"""

import collections
import dataclasses
import glob
import hashlib
import itertools
import json
import logging
import os
import shlex
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pyarrow
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from sparqle_jax import audio
from sparqle_jax.data import dataset
from sparqle_jax.data.sources import Record, Rejection, Source, checked

REJECTED = "rejected.jsonl"
WARNINGS = "warnings.json"
# By how much the length that a source declares may differ, in seconds: padding of mp3, rounding.
DECLARED_TOLERANCE = 0.5
QUIETEST = 6  # steps of 16 bits from the lowest to the highest sample: dither has as many


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of what is taken: lengths in seconds, and the share of the records that may be rejected.

    require: languages into which each text must be translated. allow_empty: a record whose text is empty is a
    recording in which nobody speaks, and may be silent.
    """

    min_seconds: float = 0.1
    max_seconds: float = 30.0
    max_rejected: float = 0.01
    require: tuple[str, ...] = ()
    allow_empty: bool = False


class LostRecords(Exception):
    """A record of the source is neither in the data set nor among the rejected: a mistake of this project."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to be written: its number, and where its records stand in the listing."""

    number: int
    start: int  # bytes
    num_records: int


def num_shards(num_records: int) -> int:
    """Enough for the progress bar to move and for all cores, not so many that they can't all be open."""
    return max(min(64, num_records // 32), min(512, num_records // 500), 1)


@dataclasses.dataclass(frozen=True)
class WriteShard:
    """Reads the recordings of a shard and writes what can be used of them.

    folder: of the data set. files: of its shards. Leaves, beside the shard, its part of the index, its
    rejections, and how often which warning was given; the index last, so that it marks a shard that is done.
    """

    folder: str
    listing: str
    files: tuple[str, ...]
    languages: tuple[str, ...]
    limits: Limits

    def __call__(self, shard: Shard) -> int:
        features = dataset.features(self.languages)
        serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        rows, rejections, warnings = [], [], collections.Counter()
        with self._local(self.files[shard.number]) as file:
            # Compressed, speech would be a fifth smaller, but reading it would take half as long again.
            writer = ArrayRecordWriter(file, "group_size:1,uncompressed")
            for record in self._records(shard):
                said: list[audio.AudioWarning] = []
                try:
                    samples = read_samples(record, self.limits, said.append)
                except audio.UnusableAudio as error:
                    rejections.append(Rejection(record.line, record.id, error.reason, str(error)))
                    continue
                warnings.update({warning.reason for warning in said})
                row = record.model_dump(include={"id", "text", "translations", "language", "speaker"})
                duration = np.float32(len(samples) / audio.SAMPLE_RATE)
                # TFDS knows no text that is not there; the index does.
                filled = {code: record.translations.get(code, "") for code in self.languages}
                fields = {"audio": samples, "duration": duration, "translations": filled}
                example = features.encode_example(row | fields)
                writer.write(serializer.serialize_example(example))
                digest = hashlib.blake2b(samples.tobytes(), digest_size=8).digest()
                rows.append(row | {"num_samples": len(samples), "samples_hash": digest})
            writer.close()
        (epath.Path(self.folder) / f"{REJECTED}-{shard.number}").write_text(_lines(rejections))
        (epath.Path(self.folder) / f"{WARNINGS}-{shard.number}").write_text(json.dumps(warnings))
        table = pyarrow.Table.from_pylist(rows, dataset.index_schema(self.languages))
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
        (epath.Path(self.folder) / f"{dataset.INDEX}-{shard.number}").write_bytes(
            sink.getvalue().to_pybytes()
        )
        return shard.num_records

    def _records(self, shard: Shard) -> Iterator[Record]:
        with epath.Path(self.listing).open("rb") as lines:
            lines.seek(shard.start)
            for _ in range(shard.num_records):
                yield Record.model_validate(json.loads(lines.readline()))

    @contextmanager
    def _local(self, file: str) -> Iterator[str]:
        """A local file that becomes `file` when it is whole. ArrayRecord does not write to gs://."""
        if "://" not in file:
            # A name of its own, since a cluster may try a shard again while the first try is still running.
            partial = f"{file}.{os.getpid()}.partial"
            yield partial
            os.replace(partial, file)
            return
        with tempfile.TemporaryDirectory() as folder:
            local = epath.Path(folder) / "shard"
            yield str(local)
            local.copy(file, overwrite=True)


def read_samples(record: Record, limits: Limits, warn: Callable[[audio.AudioWarning], object]) -> np.ndarray:
    """The recording of a record as int16 [S] at 16 kHz. Raises UnusableAudio with the reason."""
    max_samples = round(limits.max_seconds * audio.SAMPLE_RATE)
    try:
        if record.seconds is None:  # before hours of it are decoded
            audio.check_length(audio.count_samples(record.audio), max_samples)
        waveform = audio.read(record.audio, record.offset, record.seconds, warn)
    except audio.UnusableAudio:
        raise
    except FileNotFoundError as error:
        raise audio.UnusableAudio("no such file", str(error)) from error
    except Exception as error:  # what the decoders raise depends on what is broken
        raise audio.UnusableAudio("unreadable", f"{type(error).__name__}: {error}") from error
    seconds = len(waveform) / audio.SAMPLE_RATE
    min_samples = round(limits.min_seconds * audio.SAMPLE_RATE)
    nobody_speaks = not record.text  # and silence is as good as any noise
    try:
        audio.check(waveform, min_samples=min_samples, max_samples=max_samples)
    except audio.UnusableAudio as error:
        if error.reason != "silent" or not nobody_speaks:
            raise
        audio.check_length(len(waveform), max_samples)
    if record.declared is not None and abs(record.declared - seconds) > DECLARED_TOLERANCE:
        raise audio.UnusableAudio(
            "not as long as declared", f"declared {record.declared:.2f} s, it has {seconds:.2f} s"
        )
    samples = np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)
    if int(samples.max()) - int(samples.min()) <= QUIETEST and not nobody_speaks:
        raise audio.UnusableAudio(
            "silent",
            "it is so quiet that 16 bits, in which data sets are kept, hold nothing of it: amplify it.",
        )
    return samples


class SpeechBuilder(FileReaderBuilder):
    """The TFDS builder of all sources. Its data set is the folder itself, without name and version below it.

    Its examples are written shard by shard, each by one worker, so that no machine holds more than one
    recording, and stay in the order of the source: training shuffles them anew in every epoch.
    """

    name = "speech"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, folder: str | os.PathLike, source: Source, limits: Limits):
        self.folder, self.source, self.limits = epath.Path(folder), source, limits
        self.languages = source.languages
        super().__init__(data_dir=os.fspath(self.folder.parent), file_format="array_record")

    def _build_data_dir(self, given_data_dir: str | None) -> tuple[str, str]:
        return os.fspath(self.folder.parent), os.fspath(self.folder)

    def _log_download_bytes(self) -> None:
        """Nothing: nothing is downloaded here."""

    _log_download_done = _log_download_bytes

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=dataset.features(self.languages),
            description=f"Speech at 16 kHz, made by sparqle_jax.data.prepare from {self.source}",
        )

    def _download_and_prepare(
        self, dl_manager: tfds.download.DownloadManager, download_config: tfds.download.DownloadConfig
    ) -> None:
        folder = epath.Path(self.data_dir)  # TFDS renames it to self.folder in the end
        rejections: list[Rejection] = []
        shards = self._list(folder / "listing.jsonl", rejections)
        num_listed = sum(shard.num_records for shard in shards)
        template = self._get_filename_template(split_name=dataset.SPLIT)
        files = [template.sharded_filepath(shard_index=i, num_shards=len(shards)) for i in range(len(shards))]
        write = WriteShard(
            os.fspath(folder),
            os.fspath(folder / "listing.jsonl"),
            tuple(map(os.fspath, files)),
            self.languages,
            self.limits,
        )
        beam = _import_beam()
        with _progress(folder, shards):
            pipeline = beam.Pipeline(runner=download_config.beam_runner, options=download_config.beam_options)
            _ = pipeline | beam.Create(shards) | beam.Reshuffle() | beam.Map(write)
            pipeline.run().wait_until_finish()
        (folder / "listing.jsonl").unlink()
        lengths = _merge_indices(folder, self.languages, len(shards))
        self._reject(folder, rejections, len(shards), num_listed + len(rejections), sum(lengths))
        split = tfds.core.SplitInfo(
            name=dataset.SPLIT,
            shard_lengths=lengths,
            num_bytes=sum(file.stat().length for file in files),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.splits.SplitDict([split]))

    def _list(self, listing: epath.Path, rejections: list[Rejection]) -> list[Shard]:
        """Writes the records of the source that may be used, and cuts them into shards."""
        starts, place = [], 0
        with listing.open("wb") as out:
            records = checked(
                self.source.records(),
                self.languages,
                require=self.limits.require,
                allow_empty=self.limits.allow_empty,
            )
            for record in tqdm.tqdm(records, "list", unit="record", dynamic_ncols=True):
                if isinstance(record, Rejection):
                    rejections.append(record)
                    continue
                line = json.dumps(record.model_dump()).encode() + b"\n"
                starts.append(place)
                place += out.write(line)
        if not starts and not rejections:
            raise ValueError(f"{self.source} has no records.")
        if (rows := self.source.count_rows()) != len(starts) + len(rejections):
            raise LostRecords(
                f"{self.source} has {rows} rows, but {len(starts)} records and {len(rejections)} rejections "
                "were made of them"
            )
        if not starts:
            return []
        ends = np.linspace(0, len(starts), num_shards(len(starts)) + 1).astype(int).tolist()
        return [Shard(i, starts[a], b - a) for i, (a, b) in enumerate(itertools.pairwise(ends))]

    def _reject(
        self, folder: epath.Path, listed: list[Rejection], num_shards: int, total: int, usable: int
    ) -> None:
        """Writes rejected.jsonl and prints what was rejected. Raises ValueError when it is too much, and
        LostRecords when it is not all that is not usable."""
        parts = [folder / f"{REJECTED}-{i}" for i in range(num_shards)]
        lines = _lines(listed).splitlines()
        for part in parts:
            lines += part.read_text().splitlines()
            part.unlink()
        if usable + len(lines) != total:
            raise LostRecords(
                f"of {total} records {usable} were written and {len(lines)} rejected, which is not all"
            )
        warnings = collections.Counter()
        for i in range(num_shards):
            part = folder / f"{WARNINGS}-{i}"
            warnings.update(json.loads(part.read_text()))
            part.unlink()
        text = "".join(line + "\n" for line in lines)
        reasons = collections.Counter(json.loads(line)["reason"] for line in lines)
        print(f"{total:>9} records\n{usable:>9} usable")
        for reason, number in warnings.most_common():
            print(f"{number:>9} usable, but: {reason}")
        for reason, number in reasons.most_common():
            print(f"{number:>9} rejected: {reason}")
        if len(lines) > self.limits.max_rejected * total or len(lines) == total:
            file = self.folder.with_name(f"{self.folder.name}.{REJECTED}")
            file.write_text(text)
            if len(lines) == total:
                raise ValueError(f"none of {total} records can be used: see {file}.")
            raise ValueError(
                f"{len(lines)} of {total} records can't be used, more than --max-rejected="
                f"{self.limits.max_rejected:g} of all: see {file}. Mend them, or give another --max-rejected."
            )
        (folder / REJECTED).write_text(text)


def _lines(rejections: list[Rejection]) -> str:
    return "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in rejections)


def _merge_indices(folder: epath.Path, languages: tuple[str, ...], num_shards: int) -> list[int]:
    """Joins the shards' parts of the index. Returns how many records each shard has."""
    lengths = []
    schema = dataset.index_schema(languages)
    with (folder / dataset.INDEX).open("wb") as out, pyarrow.ipc.new_file(out, schema) as index:
        for i in range(num_shards):
            part = folder / f"{dataset.INDEX}-{i}"
            table = pyarrow.ipc.open_file(pyarrow.BufferReader(part.read_bytes())).read_all()
            index.write_table(table)
            lengths.append(table.num_rows)
            part.unlink()
    return lengths


@contextmanager
def _progress(folder: epath.Path, shards: list[Shard]) -> Iterator[None]:
    """A bar of the records whose shards are done, wherever the workers are."""
    done = threading.Event()
    total = sum(shard.num_records for shard in shards)

    def watch() -> None:
        with tqdm.tqdm(total=total, desc="prepare", unit="record", dynamic_ncols=True) as bar:
            last = False
            while not last:
                last = done.wait(0.5)
                numbers = (file.name.rpartition("-")[2] for file in folder.glob(f"{dataset.INDEX}-*"))
                bar.n = sum(shards[int(number)].num_records for number in numbers)
                bar.refresh()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _import_beam() -> ModuleType:
    """Beam, when it is needed: it takes a second, and complains of Google's libraries if not there."""
    logging.disable(logging.WARNING)
    try:
        import apache_beam
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam


def prepare(folder: str | os.PathLike, source: Source, limits: Limits, beam_options: str = "") -> None:
    """Makes a data set. beam_options: "runner=DataflowRunner ..."; none runs it on all cores here.

    Raises FileExistsError for a folder that is there, FileNotFoundError and ValueError for a source that
    can't be read, ValueError when more is rejected than `limits` allow, and LostRecords when rows of the
    source are neither records nor rejections.
    """
    if epath.Path(folder).exists():
        raise FileExistsError(f"{folder} is there already: choose another folder, or delete that one.")
    epath.Path(folder).parent.mkdir(parents=True, exist_ok=True)
    for left in epath.Path(folder).parent.glob(f"incomplete.??????_{glob.escape(epath.Path(folder).name)}"):
        print(f"{left} is what a run has left that was killed, or is still running elsewhere.", flush=True)
    options = shlex.split(beam_options)
    if not options:
        options = ["runner=DirectRunner", "direct_running_mode=multi_processing"]
        options += [f"direct_num_workers={os.cpu_count()}", "default_sdk_harness_log_level=ERROR"]
    arguments = [f"--{option.removeprefix('--')}" for option in options]
    pipeline_options = _import_beam().options.pipeline_options.PipelineOptions(arguments)
    config = tfds.download.DownloadConfig(beam_options=pipeline_options)
    builder = SpeechBuilder(folder, source, limits)
    with tempfile.TemporaryDirectory() as empty:  # TFDS wants one, even if nothing is downloaded
        builder.download_and_prepare(download_dir=empty, download_config=config)
