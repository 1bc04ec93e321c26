"""Frames concatenated k by k, then fully connected layers with activations; the projection is the last.

For the first connector of Yu et al., "Connecting Speech Encoder and Large Language Model for ASR" (2023): two
linear maps with ReLU between them. Their code is not public. With one width it is `linear` with its defaults.
"""

import itertools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.adapters import windows
from sparqle_jax.sharding import split_batch


class Config(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """k: frames of a token. remainder: what becomes of the last frames, fewer than k. hidden: the width after
    each layer."""

    kind: Literal["fully_connected"] = "fully_connected"
    k: pydantic.PositiveInt = 5
    remainder: windows.Remainder = "drop"
    hidden: Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)] = (2048,)
    activation: Literal["relu", "gelu", "silu"] = "relu"
    projection_bias: bool = True
    projection_norm: Literal["layer", "rms"] | None = None

    @property
    def width(self) -> int:
        return self.hidden[-1]

    @property
    def min_frames(self) -> int:
        return self.k if self.remainder == "drop" else 1

    def num_tokens(self, frames):
        return windows.num_windows(frames, self.k, self.k, self.remainder)

    def flops(self, size: int, frames: int, frames_width: int, frames_gradient: bool = False) -> int:
        """Forward and backward; without frames_gradient, the first layer has that of its kernel alone."""
        rows, widths = size * self.num_tokens(frames), (self.k * frames_width, *self.hidden)
        maps = [flops.linear(rows, a, b) for a, b in itertools.pairwise(widths)]
        return flops.TRAINED * sum(maps) - (0 if frames_gradient else maps[0])


class Adapter(nnx.Module):
    """Frames [B, T, D] -> tokens [B, T / k, A]."""

    def __init__(
        self,
        config: Config,
        frames_width: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        widths = (config.k * frames_width, *config.hidden)
        self.layers = nnx.List(
            layers.linear(a, b, ("embed", None), **kwargs) for a, b in itertools.pairwise(widths)
        )

    def __call__(
        self, frames: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """frames [B, T, D] and bool [B, T] -> tokens [B, Q, A] and their mask bool [B, Q]."""
        k = self.config.k
        x, mask = windows.cut(frames, mask, k, k, self.config.remainder)
        x = x.reshape(*x.shape[:2], k * x.shape[3])  # [B, Q, k * D]
        for layer in self.layers:
            x = layers.activation(self.config.activation)(layer(x))
        return split_batch(x), mask
