"""Windows of frames, for adapters that make tokens of some frames at a time."""

from typing import Literal

import jax
import jax.numpy as jnp

# What becomes of the last frames where they fill no window: dropped, or padded with zeros to one.
Remainder = Literal["drop", "pad"]


def num_windows(frames, size: int, stride: int, remainder: Remainder = "drop"):
    """Windows of `size` frames, one every `stride`, in so many frames (int or array).

    "pad" is for windows side by side, stride = size.
    """
    if remainder == "pad":
        return -(-frames // size)
    return ((frames - size) // stride + 1) * (frames >= size)


def cut(
    frames: jax.Array, mask: jax.Array, size: int, stride: int, remainder: Remainder = "drop"
) -> tuple[jax.Array, jax.Array]:
    """frames [B, T, D] and their mask bool [B, T] -> windows [B, L, size, D] and their mask bool [B, L].

    An example's windows are real that it has alone; padding in the last one of them is zero.
    """
    batch, num_frames, width = frames.shape
    count = num_windows(num_frames, size, stride, remainder)
    lengths = mask.astype(bool).sum(1)
    real = jnp.arange(count) < num_windows(lengths, size, stride, remainder)[:, None]
    frames = jnp.where(mask[..., None], frames, 0)
    if remainder == "pad":
        frames = jnp.pad(frames, ((0, 0), (0, count * size - num_frames), (0, 0)))
    if stride == size:
        return frames[:, : count * size].reshape(batch, count, size, width), real
    return frames[:, positions(count, size, stride)], real


def positions(count: int, size: int, stride: int) -> jax.Array:
    """The frames in each window: int [count, size]."""
    return jnp.arange(count)[:, None] * stride + jnp.arange(size)
