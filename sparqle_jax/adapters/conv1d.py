"""Convolutions over time that make fewer frames, then a linear map; the projection to the LLM is the second.

SLAM-ASR's cov1d-linear has one convolution with kernel = stride = 5: convolution, ReLU, linear, ReLU, linear.
SpeechVerse, whose code is not public, downsamples by 1-D convolutions to about 12.5 Hz before the projection:
kernel=3, stride=2, num_layers=2, channels=1024, hidden=None, on frames of 20 ms.
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
    """kernel, stride: in frames, of every convolution; edges are not padded. channels: width after each of
    them; None: as wide as the frames. hidden: width after the linear map; None: there is none. An activation
    follows every map.
    """

    kind: Literal["conv1d"] = "conv1d"
    kernel: pydantic.PositiveInt = 5
    stride: pydantic.PositiveInt = 5
    num_layers: pydantic.PositiveInt = 1
    channels: pydantic.PositiveInt | None = None
    hidden: pydantic.PositiveInt | None = 2048
    activation: Literal["relu", "gelu", "silu"] = "relu"
    projection_bias: bool = True
    projection_norm: Literal["layer", "rms"] | None = None

    @pydantic.model_validator(mode="after")
    def _has_a_width(self) -> Self:
        if self.channels is None and self.hidden is None:
            raise ValueError("hidden=None leaves the convolutions last: give their channels")
        return self

    @property
    def width(self) -> int:
        return self.channels if self.hidden is None else self.hidden

    @property
    def min_frames(self) -> int:
        frames = 1
        for _ in range(self.num_layers):
            frames = (frames - 1) * self.stride + self.kernel
        return frames

    def num_tokens(self, frames):
        for _ in range(self.num_layers):
            frames = windows.num_windows(frames, self.kernel, self.stride)
        return frames

    def flops(self, size: int, frames: int, frames_width: int, frames_gradient: bool = False) -> int:
        """Forward and backward; without frames_gradient, the first layer has that of its kernel alone."""
        maps, width = [], frames_width
        for _ in range(self.num_layers):
            frames = windows.num_windows(frames, self.kernel, self.stride)
            channels = self.channels or frames_width
            maps.append(flops.linear(size * frames, self.kernel * width, channels))
            width = channels
        if self.hidden is not None:
            maps.append(flops.linear(size * frames, width, self.hidden))
        return flops.TRAINED * sum(maps) - (0 if frames_gradient else maps[0])


class Adapter(nnx.Module):
    """Frames [B, T, D] -> tokens [B, Q, A]."""

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
        channels = config.channels or frames_width
        # Kernels [kernel, in, out], as linear maps of windows: a product that every chip does at full speed.
        self.convolutions = nnx.List(
            nnx.LinearGeneral(
                (config.kernel, channels if i else frames_width),
                channels,
                axis=(-2, -1),
                kernel_init=nnx.initializers.normal(0.02),
                kernel_metadata={"axes": (None, "embed", None)},
                bias_metadata={"axes": (None,)},
                **kwargs,
            )
            for i in range(config.num_layers)
        )
        self.linear = (
            None
            if config.hidden is None
            else layers.linear(channels, config.hidden, ("embed", None), **kwargs)
        )

    def __call__(
        self, frames: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """frames [B, T, D] and bool [B, T] -> tokens [B, Q, A] and their mask bool [B, Q]."""
        activation = layers.activation(self.config.activation)
        for convolution in self.convolutions:
            x, mask = windows.cut(frames, mask, self.config.kernel, self.config.stride)
            frames = activation(convolution(x))
        if self.linear is not None:
            frames = activation(self.linear(frames))
        return split_batch(frames), mask
