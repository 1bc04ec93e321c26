"""Frames concatenated k by k, a linear map and an activation; the projection to the LLM is the second map.

The published projectors of this form, and what they are here:

    SLAM-ASR     k=5: concat, linear, ReLU, linear. Rest of the frames dropped.
    Voxtral      k=4, hidden=5120, activation="gelu", bias=False, projection_bias=False
    Ultravox     k=8, remainder="pad", hidden=4096, activation="swiglu", bias=False, pre_norm=True,
                 mid_norm=True, norm_start=0.4, projection_bias=False
    Ultravox before 0.5: with mid_norm=False and projection_norm="rms"
"""

from typing import Literal, Self

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.adapters import windows
from sparqle_jax.sharding import split_batch


class Config(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """k: frames of a token. remainder: what becomes of the last frames, fewer than k. hidden: width after the
    linear map, of which "swiglu" makes half: the first half times SiLU of the second. pre_norm, mid_norm: an
    RMS norm before the linear map, and after the activation, its scale beginning at norm_start.
    """

    kind: Literal["linear"] = "linear"
    k: pydantic.PositiveInt = 5
    remainder: windows.Remainder = "drop"
    hidden: pydantic.PositiveInt = 2048
    activation: Literal["relu", "gelu", "silu", "swiglu"] = "relu"
    bias: bool = True
    pre_norm: bool = False
    mid_norm: bool = False
    norm_start: float = 1.0
    norm_eps: float = 1e-6
    projection_bias: bool = True
    projection_norm: Literal["layer", "rms"] | None = None

    @pydantic.model_validator(mode="after")
    def _halves(self) -> Self:
        if self.activation == "swiglu" and self.hidden % 2:
            raise ValueError(f"activation='swiglu' halves hidden={self.hidden}, which must be even")
        return self

    @property
    def width(self) -> int:
        return self.hidden // 2 if self.activation == "swiglu" else self.hidden

    @property
    def min_frames(self) -> int:
        return self.k if self.remainder == "drop" else 1

    def num_tokens(self, frames):
        return windows.num_windows(frames, self.k, self.k, self.remainder)

    def flops(self, size: int, frames: int, frames_width: int, frames_gradient: bool = False) -> int:
        """Forward, the gradient of the kernel, and that of the frames if their norm trains, or they do."""
        times = flops.TRAINED if frames_gradient or self.pre_norm else flops.TRAINED - 1
        return times * flops.linear(size * self.num_tokens(frames), self.k * frames_width, self.hidden)


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
        kwargs = dict(param_dtype=param_dtype, rngs=rngs)
        norm = dict(start=config.norm_start, **kwargs)
        self.config, self.dtype = config, dtype
        stacked, eps = config.k * frames_width, config.norm_eps
        self.pre_norm = layers.RMSNorm(stacked, eps, **norm) if config.pre_norm else None
        self.linear = layers.linear(
            stacked, config.hidden, ("embed", None), bias=config.bias, dtype=dtype, **kwargs
        )
        self.mid_norm = layers.RMSNorm(config.width, eps, **norm) if config.mid_norm else None

    def __call__(
        self, frames: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """frames [B, T, D] and bool [B, T] -> tokens [B, Q, A] and their mask bool [B, Q]."""
        k = self.config.k
        x, mask = windows.cut(frames, mask, k, k, self.config.remainder)
        x = x.reshape(*x.shape[:2], k * x.shape[3])  # [B, Q, k * D]
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x = self.linear(x)
        if self.config.activation == "swiglu":
            value, gate = jnp.split(x, 2, -1)
            x = jax.nn.silu(gate) * value
        else:
            x = layers.activation(self.config.activation)(x)
        if self.mid_norm is not None:
            x = self.mid_norm(x)
        return split_batch(x), mask
