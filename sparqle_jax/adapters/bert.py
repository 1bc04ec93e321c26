"""Blocks of BERT, of which several adapters are made: attention and feed-forward, with residual and norm."""

from typing import Literal

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import layers
from sparqle_jax.tables import Rule, linear, norm

# Keys and values: of one layer each [B, C, N, H]; of all layers with these as their first dimension.
KeysValues = tuple[jax.Array, jax.Array]


class Sizes(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """Fields that these adapters share; names and defaults as in BERT's configuration if it has them."""

    hidden_size: pydantic.PositiveInt = 768
    num_hidden_layers: pydantic.PositiveInt = 12
    num_attention_heads: pydantic.PositiveInt = 12
    intermediate_size: pydantic.PositiveInt = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    projection_bias: bool = True
    projection_norm: Literal["layer", "rms"] | None = None

    @property
    def width(self) -> int:
        return self.hidden_size


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


def query_tokens(
    sizes: Sizes, num_queries: int, span_frames: int = 0, *, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Param:
    """Learned queries [1, num_queries, A]; with span_frames, they start as those of positions evenly over so
    many frames."""
    width = sizes.hidden_size
    queries = nnx.initializers.normal(0.02)(rngs.params(), (1, num_queries, width), param_dtype)
    if span_frames:
        positions = (jnp.arange(num_queries) + 0.5) * span_frames / num_queries
        queries += layers.sinusoids(positions, width).astype(param_dtype)
    return nnx.Param(queries, axes=(None, None, "embed"))


def with_positions(frames: jax.Array) -> jax.Array:
    """Frames [B, T, D] with sinusoids of their positions, as queries with span_frames look for them."""
    return frames + layers.sinusoids(jnp.arange(frames.shape[1]), frames.shape[2]).astype(frames.dtype)


def expanded(query_tokens: nnx.Param, batch: int) -> jax.Array:
    """The queries of each example: float32 [batch, Q, A]."""
    queries = query_tokens[...].astype(jnp.float32)
    return jnp.broadcast_to(queries, (batch, *queries.shape[1:]))


def attention_rules(target: str, source: str, inner: str = "self") -> tuple[Rule, ...]:
    """The parameters of an AttentionBlock at `target`, as the tensors of BERT's attention at `source`.

    inner: what the part with query, key and value is called.
    """
    return (
        *linear(f"{target}.attention.query", f"{source}.{inner}.query"),
        *linear(f"{target}.attention.key", f"{source}.{inner}.key"),
        *linear(f"{target}.attention.value", f"{source}.{inner}.value"),
        *linear(f"{target}.attention.out", f"{source}.output.dense"),
        *norm(f"{target}.norm", f"{source}.output.LayerNorm"),
    )
