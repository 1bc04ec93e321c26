"""The mean of every k frames: the projection to the LLM is all that is learned.

Qwen2-Audio's linear projector, with the pooling before it as in the published model (k=2: 40 ms a token), but
for the encoder's last layer norm: there it comes after the pooling, inside the encoder.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax.adapters import windows
from sparqle_jax.sharding import split_batch


class Config(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """k: frames of a token; the last frames, fewer than k, are dropped. width: of the frames, and so of the
    tokens."""

    kind: Literal["pooling"] = "pooling"
    k: pydantic.PositiveInt = 2
    width: pydantic.PositiveInt = 1280
    projection_bias: bool = True
    projection_norm: Literal["layer", "rms"] | None = None

    @property
    def min_frames(self) -> int:
        return self.k

    def num_tokens(self, frames):
        return windows.num_windows(frames, self.k, self.k)

    def flops(self, size: int, frames: int, frames_width: int, frames_gradient: bool = False) -> int:
        """None: there is no matrix product."""
        return 0


class Adapter(nnx.Module):
    """Frames [B, T, A] -> tokens [B, T / k, A]; no parameters."""

    def __init__(
        self,
        config: Config,
        frames_width: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if config.width != frames_width:
            raise ValueError(
                f"pooled frames are as wide as the encoder's: set adapter.width={frames_width} (it is "
                f"{config.width})."
            )
        self.config, self.dtype = config, dtype

    def __call__(
        self, frames: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """frames [B, T, A] and bool [B, T] -> tokens [B, Q, A] and their mask bool [B, Q]."""
        x, mask = windows.cut(frames, mask, self.config.k, self.config.k)
        tokens = x.astype(jnp.float32).mean(2)
        return split_batch(tokens.astype(self.dtype)), mask
