"""Multi-head cross-attention: learned queries read the frames, each for itself.

A Q-Former without self-attention, for the second connector of Yu et al., "Connecting Speech Encoder and
Large Language Model for ASR" (2023). Their code is not public; layers are BERT's, as in the `qformer`.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.adapters.bert import (
    AttentionBlock,
    FeedForward,
    Sizes,
    expanded,
    query_tokens,
    with_positions,
)
from sparqle_jax.sharding import split_batch


class Config(Sizes):
    """num_queries: tokens of every recording. span_frames: as for the `qformer`, sinusoids of their position
    are added to the frames, and the queries start evenly over so many frames; 0: neither. The other names and
    defaults as in BERT's configuration.
    """

    kind: Literal["cross_attention"] = "cross_attention"
    num_queries: pydantic.PositiveInt = 100
    span_frames: Annotated[int, pydantic.Field(ge=0)] = 0
    num_hidden_layers: pydantic.PositiveInt = 1

    @property
    def min_frames(self) -> int:
        return 1

    def num_tokens(self, frames):
        """The number of queries, whatever the frames (int or array)."""
        return frames * 0 + self.num_queries

    def flops(self, size: int, frames: int, frames_width: int, frames_gradient: bool = False) -> int:
        """Forward and backward. The frames' norm trains, so products with frames have all gradients."""
        rows, width = size * self.num_queries, self.hidden_size
        layer = 2 * flops.linear(rows, width, width) + 2 * flops.linear(size * frames, frames_width, width)
        layer += flops.attention(size, self.num_queries, frames, width)
        layer += 2 * flops.linear(rows, width, self.intermediate_size)
        return flops.TRAINED * self.num_hidden_layers * layer


class Layer(nnx.Module):
    """Cross-attention to the frames, feed-forward."""

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
        self.cross_attention = AttentionBlock(config, frames_width, **kwargs)
        self.mlp = FeedForward(config, **kwargs)

    def __call__(self, x: jax.Array, frames: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [B, Q, A], frames [B, T, D], mask bool [B, 1, 1, T] -> x."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = self.cross_attention(x, self.cross_attention.attention.keys_values(frames), mask, keys[0])
        return self.mlp(x, keys[1])


class Adapter(nnx.Module):
    """Frames [B, T, D] -> tokens [B, Q, A], one for each query."""

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
        width = config.hidden_size
        self.config, self.dtype = config, dtype
        self.frames_norm = layers.LayerNorm(frames_width, 1e-5, **norm)
        self.query_tokens = query_tokens(config, config.num_queries, config.span_frames, **norm)
        self.embeddings_norm = layers.LayerNorm(width, config.layer_norm_eps, **norm)
        self.layers = layers.stack(
            lambda rngs: Layer(config, frames_width, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )

    def __call__(
        self, frames: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """frames [B, T, D] and bool [B, T] -> tokens float32 [B, Q, A]; mask bool [B, Q]: all real."""
        read, seen = self._place(frames), mask.astype(bool)[:, None, None, :]

        def step(layer: Layer, x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            layer_key = None if key is None else jax.random.fold_in(key, number)
            return split_batch(layer(x, read, seen, layer_key)), None

        tokens, _ = layers.scan(self.layers, step, self._queries(len(frames), key), self._numbers())
        return tokens, jnp.ones(tokens.shape[:2], bool)

    def attention(self, frames: jax.Array, mask: jax.Array) -> jax.Array:
        """Attention weights of each query to each frame: the mean of the heads of each layer.

        frames [B, T, D] and bool [B, T] -> float32 [layers, B, Q, T], each row of sum 1.
        """
        read, seen = self._place(frames), mask.astype(bool)[:, None, None, :]

        def step(layer: Layer, x: jax.Array, _) -> tuple[jax.Array, jax.Array]:
            weights = layer.cross_attention.attention.weights(x, read, seen).mean(1)
            return layer(x, read, seen, None), weights

        return layers.scan(self.layers, step, self._queries(len(frames), None), self._numbers())[1]

    def _place(self, frames: jax.Array) -> jax.Array:
        """Frames [B, T, D] as the layers read them: normed, with their positions."""
        frames = self.frames_norm(frames)
        return with_positions(frames) if self.config.span_frames else frames

    def _queries(self, batch: int, key: jax.Array | None) -> jax.Array:
        """Queries float32 [batch, Q, A] as the first layer reads them."""
        x = self.embeddings_norm(expanded(self.query_tokens, batch))
        key = None if key is None else jax.random.fold_in(key, self.config.num_hidden_layers)
        return split_batch(layers.dropout(x, self.config.hidden_dropout_prob, key))

    def _numbers(self) -> jax.Array:
        return jnp.arange(self.config.num_hidden_layers)
