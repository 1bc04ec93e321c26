"""The windowed Q-Former: a small Q-Former reads each window of frames by itself, as in SALMONN.

Learned queries read the frames of a window by cross-attention, in every layer; the same queries and layers
for all windows, so tokens keep the order of speech and grow with its length. All frames of a window are read,
padding too, as published:

    SALMONN         window=stride=17 (0.33 s), num_queries=1, remainder="drop", frames_norm=False (its joined
                    encoder has the norms)
    Granite Speech  window=stride=15, num_queries=3, remainder="pad", frames_norm=False
"""

from typing import Literal, Self

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.adapters import windows
from sparqle_jax.adapters.bert import AttentionBlock, FeedForward, Sizes, expanded, query_tokens
from sparqle_jax.sharding import split_batch


class Config(Sizes):
    """window, stride: in frames. num_queries: tokens of each window. remainder: what becomes of the last
    frames, too few for a window; "pad" needs stride = window. frames_norm: a layer norm of the frames. The
    other names and defaults as in BERT's configuration, as for the `qformer`.
    """

    kind: Literal["windowed_qformer"] = "windowed_qformer"
    window: pydantic.PositiveInt = 17
    stride: pydantic.PositiveInt = 17
    num_queries: pydantic.PositiveInt = 1
    remainder: windows.Remainder = "drop"
    frames_norm: bool = True
    num_hidden_layers: pydantic.PositiveInt = 2

    @pydantic.model_validator(mode="after")
    def _pads_side_by_side(self) -> Self:
        if self.remainder == "pad" and self.stride != self.window:
            raise ValueError(
                f"remainder='pad' needs windows side by side: set stride={self.window} (it is {self.stride})"
            )
        return self

    @property
    def min_frames(self) -> int:
        return self.window if self.remainder == "drop" else 1

    def num_windows(self, frames):
        return windows.num_windows(frames, self.window, self.stride, self.remainder)

    def num_tokens(self, frames):
        return self.num_windows(frames) * self.num_queries

    def flops(self, size: int, frames: int, frames_width: int, frames_gradient: bool = False) -> int:
        """Forward and backward; frames without a norm have a gradient only with frames_gradient."""
        count, width = size * self.num_windows(frames), self.hidden_size
        rows = count * self.num_queries
        keys_values = 2 * flops.linear(count * self.window, frames_width, width)
        layer = 6 * flops.linear(rows, width, width) + 2 * flops.linear(rows, width, self.intermediate_size)
        layer += flops.attention(count, self.num_queries, self.num_queries, width)
        layer += flops.attention(count, self.num_queries, self.window, width)
        saved = 0 if frames_gradient or self.frames_norm else keys_values
        return self.num_hidden_layers * (flops.TRAINED * (layer + keys_values) - saved)


class Layer(nnx.Module):
    """Self-attention among the queries of a window, cross-attention to its frames, feed-forward."""

    def __init__(
        self,
        config: Config,
        frames_width: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.self_attention = AttentionBlock(config, config.hidden_size, **kwargs)
        self.cross_attention = AttentionBlock(config, frames_width, **kwargs)
        self.mlp = FeedForward(config, **kwargs)

    def __call__(self, x: jax.Array, frames: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [N, num_queries, A], frames [N, window, D] -> x."""
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        x = self.self_attention(x, self.self_attention.attention.keys_values(x), None, keys[0])
        x = self.cross_attention(x, self.cross_attention.attention.keys_values(frames), None, keys[1])
        return self.mlp(x, keys[2])

    def weights(self, x: jax.Array, frames: jax.Array) -> jax.Array:
        """Attention weights of queries to frames, mean of the heads: float32 [N, num_queries, window]."""
        x = self.self_attention(x, self.self_attention.attention.keys_values(x), None, None)
        return self.cross_attention.attention.weights(x, frames, None).mean(1)


class Adapter(nnx.Module):
    """Frames [B, T, D] -> tokens [B, windows * num_queries, A], window by window."""

    def __init__(
        self,
        config: Config,
        frames_width: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        norm = dict(param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.frames_norm = layers.LayerNorm(frames_width, 1e-5, **norm) if config.frames_norm else None
        self.query_tokens = query_tokens(config, config.num_queries, **norm)
        self.embeddings_norm = layers.LayerNorm(config.hidden_size, config.layer_norm_eps, **norm)
        self.layers = layers.stack(
            lambda rngs: Layer(config, frames_width, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )

    def __call__(
        self, frames: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """frames [B, T, D] and bool [B, T] -> tokens float32 [B, Q, A] and their mask bool [B, Q]."""
        config = self.config
        read, real = self._cut(frames, mask)

        def step(layer: Layer, x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            return split_batch(layer(x, read, None if key is None else jax.random.fold_in(key, number))), None

        x, _ = layers.scan(self.layers, step, self._queries(len(read), key), self._numbers())
        tokens = x.reshape(len(frames), real.shape[1] * config.num_queries, config.hidden_size)
        return split_batch(tokens), jnp.repeat(real, config.num_queries, 1)

    def attention(self, frames: jax.Array, mask: jax.Array) -> jax.Array:
        """Attention weights of each token to the real frames of its window: mean of the heads.

        frames [B, T, D] and bool [B, T] -> float32 [layers, B, Q, T]; rows of sum 1, of tokens that are not
        real 0.
        """
        config = self.config
        read, real = self._cut(frames, mask)

        def step(layer: Layer, x: jax.Array, _) -> tuple[jax.Array, jax.Array]:
            return layer(x, read, None), layer.weights(x, read)

        _, weights = layers.scan(self.layers, step, self._queries(len(read), None), self._numbers())
        batch, count = real.shape
        weights = weights.reshape(len(weights), batch, count, config.num_queries, config.window)
        positions = windows.positions(count, config.window, config.stride)
        placed = (positions[..., None] == jnp.arange(frames.shape[1])).astype(jnp.float32)  # [L, window, T]
        maps = jnp.einsum("dBLQk,LkT->dBLQT", weights, placed, precision="highest")
        maps *= mask[:, None, None] & real[..., None, None]
        total = maps.sum(-1, keepdims=True)
        maps /= jnp.where(total > 0, total, 1)
        return maps.reshape(config.num_hidden_layers, batch, count * config.num_queries, frames.shape[1])

    def _cut(self, frames: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Windows [B * L, window, D] of the normed frames, and which are real: bool [B, L]."""
        if self.frames_norm is not None:
            frames = self.frames_norm(frames)
        config = self.config
        cut, real = windows.cut(frames, mask, config.window, config.stride, config.remainder)
        return split_batch(cut.reshape(real.size, config.window, frames.shape[2])), real

    def _queries(self, count: int, key: jax.Array | None) -> jax.Array:
        """Queries float32 [count, num_queries, A] as the first layer reads them."""
        x = self.embeddings_norm(expanded(self.query_tokens, count))
        key = None if key is None else jax.random.fold_in(key, self.config.num_hidden_layers)
        return split_batch(layers.dropout(x, self.config.hidden_dropout_prob, key))

    def _numbers(self) -> jax.Array:
        return jnp.arange(self.config.num_hidden_layers)
