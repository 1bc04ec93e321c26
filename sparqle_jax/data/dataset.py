"""A data set: a folder that `sparqle_jax.data.prepare` has made, local or on gs://.

It is a TFDS data set with one split, "train", in ArrayRecord files, of which any record is read at once,
beside an index of everything but the audio (`index.arrow`), which is mapped into memory. TensorFlow is not
needed.
"""

import bisect
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow
import pyarrow.compute
import pydantic
import tensorflow_datasets as tfds
from etils import epath

from sparqle_jax.audio import SAMPLE_RATE

INDEX = "index.arrow"
SPLIT = "train"
# What two data sets may have in common, and in which columns of their index it stands. Ids alone say nothing:
# those of small sets are numbers.
SHARED = {
    "utterances": ("id", "text"),
    "recordings": ("samples_hash",),
    "speakers": ("speaker",),
    "texts": ("text",),
}


class Utterance(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A recording without its audio. text: empty where nobody speaks. translations: those that there are, by
    language code. num_samples: at 16 kHz."""

    id: Annotated[str, pydantic.Field(min_length=1)]
    text: str
    translations: dict[str, str] = {}
    language: str = "en"
    speaker: str = ""
    num_samples: Annotated[int, pydantic.Field(ge=0)]

    @property
    def duration(self) -> float:
        """The length in seconds."""
        return self.num_samples / SAMPLE_RATE


def features(languages: Iterable[str]) -> tfds.features.FeaturesDict:
    """The schema of a record, the same for all sources. languages: those of the translations."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            # 16 kHz. TFDS's Audio would need TensorFlow.
            "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
            "id": text(),
            "text": text(),
            "translations": tfds.features.FeaturesDict({code: text() for code in languages}),
            "language": text(),
            "speaker": text(),
            "duration": np.float32,  # in seconds
        }
    )


def index_schema(languages: Iterable[str]) -> pyarrow.Schema:
    """The columns of the index, a row for each record in its order."""
    text = pyarrow.string()
    return pyarrow.schema(
        {
            "id": text,
            "text": text,
            "translations": pyarrow.struct(dict.fromkeys(languages, text)),
            "language": text,
            "speaker": text,
            "num_samples": pyarrow.int32(),
            "samples_hash": pyarrow.binary(8),
        }
    )


def _joined(index: pyarrow.Table, columns: Sequence[str]) -> pyarrow.ChunkedArray:
    """One column of several."""
    first, *rest = (index[column] for column in columns)
    return pyarrow.compute.binary_join_element_wise(first, *rest, "\x1f") if rest else first


def overlap_line(overlap: dict[str, int], number: int) -> str:
    """`DataSet.overlap` in words. number: of the utterances."""
    counts = ", ".join(f"{count} {name}" for name, count in overlap.items())
    return f"of its {number} utterances the training data have {counts}"


class CorruptRecord(ValueError):
    """A record that can't be read; its message names it."""


class DataSet(Sequence[Utterance]):
    """The utterances of a data set, by number, and their audio.

    folder: local or gs://. Raises FileNotFoundError when there is none, ValueError when it is not whole.
    Travels to other processes as the name of its folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = epath.Path(folder)
        if not (self.folder / INDEX).exists():
            raise FileNotFoundError(
                f"{folder} is no data set: it has no {INDEX}. Make one of your recordings with `python -m "
                "sparqle_jax.data.prepare`."
            )
        self._index = _read_index(self.folder / INDEX)
        self.num_samples = self._index["num_samples"].to_numpy()  # int32 [N]
        if not len(self):
            raise ValueError(f"{folder} is empty.")
        shards = [file.name for file in self.folder.glob(f"*-{SPLIT}.array_record-*-of-*")]
        if not shards or len(shards) != int(shards[0].rpartition("-")[2]):
            raise ValueError(f"{folder} is not whole: it has {len(shards)} shards. Prepare it again.")

    def __reduce__(self):
        return DataSet, (os.fspath(self.folder),)

    def __len__(self) -> int:
        return self._index.num_rows

    def __getitem__(self, index: int) -> Utterance:
        row = {name: self._index[name][index].as_py() for name in Utterance.model_fields}
        row["translations"] = {code: text for code, text in row["translations"].items() if text is not None}
        return Utterance.model_construct(**row)

    @property
    def languages(self) -> tuple[str, ...]:
        """Into which there are translations, of some utterances or all."""
        codes = (field.name for field in self._index.schema.field("translations").type)
        return tuple(code for code in codes if self._translations(code).null_count < len(self))

    @property
    def spoken(self) -> list[str]:
        """The languages of the speech."""
        return sorted(self._index["language"].unique().to_pylist())

    @property
    def has_speech(self) -> np.ndarray:
        """bool [N]: in which of the recordings somebody speaks."""
        return pyarrow.compute.not_equal(self._index["text"], "").to_numpy()

    def has(self, task: str) -> np.ndarray:
        """bool [N]: which of the utterances have a right answer to a task: see `answer_of` in tasks.py."""
        return self._answers(task).is_valid().to_numpy()

    def texts(self, task: str) -> Iterable[str]:
        """The right answers to a task of the utterances that have one, in their order."""
        chunks = self._answers(task).chunks
        return itertools.chain.from_iterable(chunk.drop_null().to_pylist() for chunk in chunks)

    def overlap(self, training: Sequence["DataSet"]) -> dict[str, int]:
        """The utterances of this data set that stand in the training data as well: how many by id and text
        ("utterances"), by their samples ("recordings"), speaker and text. No speaker, no text: none."""
        counts = {}
        for name, columns in SHARED.items():
            own, found = _joined(self._index, columns), np.zeros(len(self), bool)
            for data_set in training:
                # Training data are large: of them, what is in the first column of both alone is looked at.
                theirs = data_set._index.select(columns)
                both = theirs.filter(pyarrow.compute.is_in(theirs[columns[0]], self._index[columns[0]]))
                found |= pyarrow.compute.is_in(own, _joined(both, columns).unique()).to_numpy()
            filled = pyarrow.compute.binary_length(self._index[columns[-1]]).to_numpy() > 0
            counts[name] = int((found & filled).sum())
        return counts

    def waveform(self, index: int) -> np.ndarray:
        """float32 [S] at 16 kHz, samples from -1 to 1. Raises CorruptRecord."""
        return self.samples(index).astype(np.float32) / 32768

    def samples(self, index: int) -> np.ndarray:
        """The recording as int16 [S] at 16 kHz. Raises CorruptRecord, naming id and file, if it is broken."""
        try:
            record = self._records[index]
            if record["id"].decode() != self._index["id"][index].as_py():
                raise ValueError(f"its id is {record['id'].decode()!r}: the index is another data set's")
        except Exception as error:  # what the readers raise depends on what is broken
            # ArrayRecord says so of what it finds; else it is a disk or a network that fails.
            if isinstance(error, OSError | RuntimeError) and "orrupt" not in str(error):
                raise
            raise CorruptRecord(
                f"{self._index['id'][index].as_py()!r} can't be read, record {index} of {self.folder}, in "
                f"{self._shard(index)}: {error}"
            ) from error
        return record["audio"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the index, in which there are hashes of the audio: another one is another data set."""
        digest = hashlib.blake2b(digest_size=16)
        with (self.folder / INDEX).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _answers(self, task: str) -> pyarrow.ChunkedArray:
        if task == "transcribe":
            return self._index["text"]
        if task not in self.languages:
            return pyarrow.chunked_array([pyarrow.nulls(len(self), pyarrow.string())])
        return self._translations(task)

    def _translations(self, language: str) -> pyarrow.ChunkedArray:
        column = self._index["translations"]
        return pyarrow.chunked_array([chunk.field(language) for chunk in column.chunks], pyarrow.string())

    @functools.cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        return tfds.builder_from_directory(self.folder)

    @functools.cached_property
    def _records(self) -> Sequence[dict[str, Any]]:
        return self._builder.as_data_source(SPLIT)

    def _shard(self, index: int) -> str:
        split = self._builder.info.splits[SPLIT]
        ends = list(itertools.accumulate(split.shard_lengths))
        return os.path.basename(split.filepaths[bisect.bisect_right(ends, index)])


class Corpus(Sequence[Utterance]):
    """Several data sets one after the other. sizes: how many utterances each has."""

    def __init__(self, data_sets: Sequence[DataSet]):
        self.data_sets = list(data_sets)
        self.sizes = [len(data_set) for data_set in data_sets]
        self.num_samples = np.concatenate([data_set.num_samples for data_set in data_sets])
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Utterance:
        number, index = self.locate(index)
        return self.data_sets[number][index]

    def samples(self, index: int) -> np.ndarray:
        """Reads an utterance as `DataSet.samples` does."""
        number, index = self.locate(index)
        return self.data_sets[number].samples(index)

    def locate(self, index: int) -> tuple[int, int]:
        """The data set that an utterance is in, and its number there."""
        number = bisect.bisect_right(self._ends, index)
        return number, int(index) - (self._ends[number - 1] if number else 0)


def _read_index(file: epath.Path) -> pyarrow.Table:
    try:
        source = (
            pyarrow.BufferReader(file.read_bytes())
            if "://" in os.fspath(file)
            else pyarrow.memory_map(os.fspath(file))
        )
        return pyarrow.ipc.open_file(source).read_all()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is broken ({error}): prepare the data set again.") from error
