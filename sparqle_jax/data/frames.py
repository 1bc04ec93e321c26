"""What the frozen encoder makes of a data set, computed once and kept in a file."""

import hashlib
import os
import shutil
from pathlib import Path

import grain
import jax
import numpy as np
import tqdm
from flax import nnx

from sparqle_jax.data.pipeline import Arrays, Waveforms
from sparqle_jax.encoders.hubert import Hubert

BATCH_SIZE = 32


class Frames:
    """The frames of a data set's recordings, padded to one length, from a file that `keep_frames` made."""

    def __init__(self, file: Path):
        self.rows = np.load(file, mmap_mode="r")

    def __getitem__(self, index: int) -> Arrays:
        """frames float16 [T, D] and frames_mask bool [T]."""
        row = self.rows[index]
        return {"frames": row["frames"], "frames_mask": np.arange(len(row["frames"])) < row["num_frames"]}


def keep_frames(folder: Path, waveforms: Waveforms, encoder: Hubert) -> Frames:
    """The frames of all waveforms, from their file in `folder`, or else computed and written to it.

    The file is named by what is in it: another encoder, or other recordings, have another file. It appears
    only when it is whole. Raises ValueError when the disk has no room for it.
    """
    file = folder / f"{_fingerprint(waveforms, encoder)}.npy"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        length, width = encoder.config.num_frames(waveforms.num_samples), encoder.config.hidden_size
        dtype = np.dtype([("frames", np.float16, (length, width)), ("num_frames", np.int32)])
        size, free = len(waveforms) * dtype.itemsize, shutil.disk_usage(folder).free
        if size > free:
            raise ValueError(
                f"the frames of {len(waveforms)} recordings take {size / 1e9:.1f} GB, and there are "
                f"{free / 1e9:.1f} GB left on the disk of {folder}: make room, or --set data.frames=null."
            )
        partial = file.with_suffix(f".{os.getpid()}")
        try:
            _compute(np.lib.format.open_memmap(partial, "w+", dtype, (len(waveforms),)), waveforms, encoder)
            partial.rename(file)
        finally:
            partial.unlink(missing_ok=True)
    return Frames(file)


def _fingerprint(waveforms: Waveforms, encoder: Hubert) -> str:
    digest = hashlib.sha256(repr((encoder.config, waveforms.extractor, waveforms.num_samples)).encode())
    for parameter in jax.tree.leaves(nnx.state(encoder)):
        digest.update(np.asarray(parameter).tobytes())
    for utterance in waveforms.utterances:
        status = utterance.audio.stat()
        digest.update(repr((utterance.audio.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _compute(rows: np.memmap, waveforms: Waveforms, encoder: Hubert) -> None:
    graph, state = nnx.split(encoder)
    encode = jax.jit(lambda state, waveform, mask: nnx.merge(graph, state)(waveform, mask))
    num = len(rows)
    # All batches have one shape, so that there is one program: the last is filled with the last recording.
    dataset = grain.MapDataset.range(-(-num // BATCH_SIZE) * BATCH_SIZE)
    dataset = dataset.map(lambda index: waveforms[min(int(index), num - 1)]).batch(BATCH_SIZE)
    inputs = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)))
    with tqdm.tqdm(total=num, desc="frames", unit="recording", dynamic_ncols=True) as bar:
        for start in range(0, num, BATCH_SIZE):
            batch = next(inputs)
            frames, mask = encode(state, batch["waveform"], batch["waveform_mask"])
            here = rows[start : start + BATCH_SIZE]
            here["frames"] = frames[: len(here)]
            here["num_frames"] = mask.sum(1)[: len(here)]
            bar.update(len(here))
    rows.flush()
