"""Random batches for the golden tiny models: 97 tokens in the LLM, 71 in the Q-Former."""

import numpy as np

SAMPLES, TEXT = 1600, 8


def stage1_batch(rng, size: int = 3) -> dict:
    return dict(
        waveform=rng.normal(size=(size, SAMPLES)).astype(np.float32),
        waveform_mask=np.arange(SAMPLES) < rng.integers(400, SAMPLES, (size, 1)),
        text=rng.integers(4, 70, (size, TEXT)).astype(np.int32),
        text_mask=np.arange(TEXT) < rng.integers(2, TEXT + 1, (size, 1)),
        recording_id=np.arange(size) % (size - 1),
    )


def stage2_batch(rng, size: int = 3) -> dict:
    batch = stage1_batch(rng, size)
    batch = {name: batch[name] for name in ("waveform", "waveform_mask")}
    for name, length, left in (("before", 4, True), ("after", 5, True), ("answer", 6, False)):
        batch[name] = rng.integers(0, 97, (size, length)).astype(np.int32)
        mask = np.arange(length) < rng.integers(1, length + 1, (size, 1))
        batch[f"{name}_mask"] = mask[:, ::-1] if left else mask
    return batch


def padded(batch: dict, rng, **padding: int) -> dict:
    """The batch with more padding, filled with anything: prompts on the left, the rest on the right."""
    out = dict(batch)
    for name, count in padding.items():
        where = (0, 0), ((count, 0) if name in ("before", "after") else (0, count))
        out[name] = np.pad(batch[name], where, constant_values=3)
        out[f"{name}_mask"] = np.pad(batch[f"{name}_mask"], where)
        noise = rng.integers(0, 70, out[name].shape).astype(out[name].dtype)
        out[name] = np.where(out[f"{name}_mask"], out[name], noise)
    return out
