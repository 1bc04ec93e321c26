"""Frames of the frozen encoder for a whole corpus, computed once and kept in a file."""

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import grain
import jax
import numpy as np
import tqdm
from flax import nnx

from sparqle_jax.checkpoint import fingerprint
from sparqle_jax.data.pipeline import Arrays, Waveforms

BATCH_SIZE = 32


class Frames:
    """The frames of a corpus's recordings, from a file that `keep_frames` made.

    frames: float16 [sum of T, D], one recording's after the other's, which begin and end at `ends`.
    num_frames: from samples to frames. Travels to other processes as the name of its file.
    """

    def __init__(self, file: Path, ends: np.ndarray, width: int, num_frames: Callable[[int], int]):
        self.file, self.ends, self.num_frames = file, ends, num_frames
        self.frames = np.memmap(file, np.float16, "r", shape=(int(ends[-1]), width))

    def __reduce__(self):
        return Frames, (self.file, self.ends, self.frames.shape[1], self.num_frames)

    def rows(self, indices: Sequence[int], num_samples: int) -> Arrays:
        """frames float16 [B, T, D] and frames_mask bool [B, T] of some recordings."""
        length = self.num_frames(num_samples)
        batch = np.zeros((len(indices), length, self.frames.shape[1]), np.float16)
        mask = np.zeros(batch.shape[:2], bool)
        for row, index in enumerate(indices):
            start, end = self.ends[index], self.ends[index + 1]
            batch[row, : end - start] = self.frames[start:end]
            mask[row, : end - start] = True
        return {"frames": batch, "frames_mask": mask}


def keep_frames(folder: Path, waveforms: Waveforms, encoder: nnx.Module) -> Frames:
    """The frames of all waveforms, from their file in `folder`, or else computed and written to it.

    The file is named by what is in it: another encoder, or other recordings, have another file. It appears
    only when it is whole; who is stopped before goes on where it was. Raises ValueError when the disk has no
    room for it.
    """
    width, num_frames = encoder.config.width, encoder.config.num_frames
    ends = np.concatenate([[0], np.cumsum(num_frames(waveforms.corpus.num_samples.astype(np.int64)))])
    file = folder / f"{_fingerprint(waveforms, encoder)}.frames"
    partial = file.with_suffix(".partial")
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as out:
            # Where another run computes the same, this one waits for it, and finds the file.
            fcntl.flock(out, fcntl.LOCK_EX)
            if not file.is_file():
                _check_room(folder, 2 * width * int(ends[-1]) - out.tell())
                _compute(out, ends, waveforms, encoder)
                partial.replace(file)
    return Frames(file, ends, width, num_frames)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"the frames to be kept take {size / 1e9:.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB left: make room, or --set data.frames=null."
        )


def _fingerprint(waveforms: Waveforms, encoder: nnx.Module) -> str:
    digest = hashlib.sha256(repr((encoder.config, fingerprint(encoder))).encode())
    for data_set in waveforms.corpus.data_sets:
        digest.update(data_set.fingerprint.encode())
    return digest.hexdigest()[:16]


def _compute(out: BinaryIO, ends: np.ndarray, waveforms: Waveforms, encoder: nnx.Module) -> None:
    """Appends the frames that are not in the file yet, whole batches at a time."""
    graph, state = nnx.split(encoder)
    encode = jax.jit(lambda state, waveform, mask: nnx.merge(graph, state)(waveform, mask)[0])
    num, row_bytes = len(waveforms), 2 * encoder.config.width
    whole = int(np.searchsorted(ends, out.tell() // row_bytes, "right")) - 1  # recordings in the file
    first = whole // BATCH_SIZE * BATCH_SIZE
    out.truncate(int(ends[first]) * row_bytes)
    out.seek(0, 2)
    # All batches have one shape, so that there is one program: the last is filled with the last recording.
    longest = int(waveforms.corpus.num_samples.max())

    def load(start: int) -> Arrays:
        return waveforms.rows([min(i, num - 1) for i in range(start, start + BATCH_SIZE)], longest)

    dataset = grain.MapDataset.range(first, num, BATCH_SIZE).map(load)
    inputs = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
    with tqdm.tqdm(total=num, initial=first, desc="frames", unit="recording", dynamic_ncols=True) as bar:
        for start in range(first, num, BATCH_SIZE):
            batch = next(inputs)
            frames = np.asarray(encode(state, batch["waveform"], batch["waveform_mask"]), np.float16)
            for i in range(start, min(start + BATCH_SIZE, num)):
                out.write(frames[i - start, : ends[i + 1] - ends[i]].tobytes())
            bar.update(min(BATCH_SIZE, num - start))
