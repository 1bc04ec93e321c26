"""Blocks of BERT, of which several adapters are made: attention and feed-forward, with residual and norm."""

from typing import Protocol

import jax
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import layers

# Keys and values: of one layer each [B, C, N, H]; of all layers with these as their first dimension.
KeysValues = tuple[jax.Array, jax.Array]


class Sizes(Protocol):
    """The fields of an adapter's Config that the blocks read, under their names in BERT's configuration."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float


class FeedForward(nnx.Module):
    """BERT's feed-forward: up, activation, down, dropout, residual, norm."""

    def __init__(self, sizes: Sizes, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = layers.linear(sizes.hidden_size, sizes.intermediate_size, ("embed", "mlp"), **kwargs)
        self.down = layers.linear(sizes.intermediate_size, sizes.hidden_size, ("mlp", "embed"), **kwargs)
        self.norm = layers.LayerNorm(
            sizes.hidden_size, sizes.layer_norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.activation, self.rate = sizes.hidden_act, sizes.hidden_dropout_prob

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        out = self.down(layers.activation(self.activation)(self.up(x)))
        return self.norm(layers.dropout(out, self.rate, key) + x)


class AttentionBlock(nnx.Module):
    """BERT's attention: attention, dropout, residual, norm. Keys and values from itself or from frames."""

    def __init__(
        self,
        sizes: Sizes,
        source_width: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attention = layers.Attention(
            sizes.hidden_size,
            sizes.num_attention_heads,
            source_width,
            dropout_rate=sizes.attention_probs_dropout_prob,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = layers.LayerNorm(
            sizes.hidden_size, sizes.layer_norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.rate = sizes.hidden_dropout_prob

    def __call__(
        self, x: jax.Array, keys_values: KeysValues, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        probs_key, out_key = (None, None) if key is None else jax.random.split(key)
        out = self.attention(x, keys_values, mask, probs_key)
        return self.norm(layers.dropout(out, self.rate, out_key) + x)
