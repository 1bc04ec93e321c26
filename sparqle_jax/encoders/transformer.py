"""The Transformer that encoders share: self-attention and feed-forward, stacked and run as one loop."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import layers
from sparqle_jax.sharding import split_batch


class SelfAttention(layers.Attention):
    """Multi-head attention of frames to each other."""

    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None) -> jax.Array:
        """x [B, T, D], mask bool [B, 1, 1, T] -> [B, T, D]. bias: for encoders that add one to the scores."""
        return super().__call__(x, self.keys_values(x), mask)


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each with a residual; norms before each (pre_norm) or after it."""

    def __init__(
        self,
        attention: SelfAttention,
        width: int,
        mlp_width: int,
        *,
        activation: str,
        norm_eps: float,
        pre_norm: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(param_dtype=param_dtype, rngs=rngs)
        self.attention = attention
        self.attention_norm = layers.LayerNorm(width, norm_eps, **kwargs)
        self.up = layers.linear(width, mlp_width, ("embed", "mlp"), dtype=dtype, **kwargs)
        self.down = layers.linear(mlp_width, width, ("mlp", "embed"), dtype=dtype, **kwargs)
        self.mlp_norm = layers.LayerNorm(width, norm_eps, **kwargs)
        self.activation, self.pre_norm = activation, pre_norm

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.down(layers.activation(self.activation)(self.up(x)))

    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        """x [B, T, D], mask bool [B, 1, 1, T], bias as the attention takes it -> [B, T, D]."""
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), mask, bias)
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, mask, bias))
        return self.mlp_norm(x + self._mlp(x))


def run(
    stack: nnx.Module,
    x: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None = None,
    *,
    num: int | None = None,
    keep: bool = False,
    remat: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs stacked layers, or the first `num`, on x [B, T, D]; mask bool [B, T] says which keys are real.

    Returns the last output [B, T, D]; with `keep` also that of each layer, [layers, B, T, D], else None.
    """
    keys_mask = None if mask is None else mask[:, None, None, :]

    def step(layer: EncoderLayer, x: jax.Array, _) -> tuple[jax.Array, jax.Array | None]:
        x = split_batch(layer(x, keys_mask, bias))
        return x, x if keep else None

    with jax.named_scope("layers"):
        return layers.scan(stack, step, x, num=num, remat=remat)


def hidden_states(first: jax.Array, outputs: jax.Array, last: jax.Array) -> jax.Array:
    """The input of the first layer, the outputs [layers, B, T, D] of all but the last, and the model's own:
    [layers + 1, B, T, D]."""
    return jnp.concatenate([first[None], outputs[:-1], last[None]])
