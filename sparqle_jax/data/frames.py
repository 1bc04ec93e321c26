"""What the frozen encoder makes of a data set, computed once and kept in a file."""

import fcntl
import hashlib
import shutil
from pathlib import Path
from typing import BinaryIO

import grain
import jax
import numpy as np
import tqdm
from flax import nnx

from sparqle_jax.data.pipeline import Arrays, Waveforms
from sparqle_jax.encoders.hubert import Hubert

BATCH_SIZE = 32


class Frames:
    """The frames of a data set's recordings, padded to one length, from a file that `keep_frames` made.

    rows: for each recording frames float16 [T, D] and num_frames int32.
    """

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def __getitem__(self, index: int) -> Arrays:
        """frames float16 [T, D] and frames_mask bool [T]."""
        row = self.rows[index]
        return {"frames": row["frames"], "frames_mask": np.arange(len(row["frames"])) < row["num_frames"]}


def keep_frames(folder: Path, waveforms: Waveforms, encoder: Hubert) -> Frames:
    """The frames of all waveforms, from their file in `folder`, or else computed and written to it.

    The file is named by what is in it: another encoder, or other recordings, have another file. It appears
    only when it is whole; who is stopped before goes on where it was. Raises ValueError when the disk has no
    room for it.
    """
    length, width = encoder.config.num_frames(waveforms.num_samples), encoder.config.hidden_size
    row = np.dtype([("frames", np.float16, (length, width)), ("num_frames", np.int32)])
    file = folder / f"{_fingerprint(waveforms, encoder)}.frames"
    partial = file.with_suffix(".partial")
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as out:
            # Where another run computes the same, this one waits for it, and finds the file.
            fcntl.flock(out, fcntl.LOCK_EX)
            if not file.is_file():
                _check_room(folder, len(waveforms) * row.itemsize - out.tell())
                _compute(out, row, waveforms, encoder)
                partial.replace(file)
    return Frames(np.memmap(file, row, "r"))


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"the frames to be kept take {size / 1e9:.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB left: make room, or --set data.frames=null."
        )


def _fingerprint(waveforms: Waveforms, encoder: Hubert) -> str:
    digest = hashlib.sha256(repr((encoder.config, waveforms.extractor, waveforms.num_samples)).encode())
    for parameter in jax.tree.leaves(nnx.state(encoder)):
        digest.update(np.asarray(parameter).tobytes())
    for utterance in waveforms.utterances:
        status = utterance.audio.stat()
        digest.update(repr((utterance.audio.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _compute(out: BinaryIO, row: np.dtype, waveforms: Waveforms, encoder: Hubert) -> None:
    """Appends the rows that are not in the file yet, whole batches at a time."""
    graph, state = nnx.split(encoder)
    encode = jax.jit(lambda state, waveform, mask: nnx.merge(graph, state)(waveform, mask))
    num = len(waveforms)
    first = out.tell() // (row.itemsize * BATCH_SIZE) * BATCH_SIZE
    out.truncate(first * row.itemsize)
    # All batches have one shape, so that there is one program: the last is filled with the last recording.
    dataset = grain.MapDataset.range(first, -(-num // BATCH_SIZE) * BATCH_SIZE)
    dataset = dataset.map(lambda index: waveforms[min(int(index), num - 1)]).batch(BATCH_SIZE)
    inputs = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)))
    with tqdm.tqdm(total=num, initial=first, desc="frames", unit="recording", dynamic_ncols=True) as bar:
        for start in range(first, num, BATCH_SIZE):
            batch = next(inputs)
            frames, mask = encode(state, batch["waveform"], batch["waveform_mask"])
            rows = np.zeros(min(BATCH_SIZE, num - start), row)
            rows["frames"] = frames[: len(rows)]
            rows["num_frames"] = mask.sum(1)[: len(rows)]
            out.write(rows.tobytes())
            bar.update(len(rows))
