"""Linear maps, norms, attention, and equal layers stacked and run by `scan`: what the towers share.

Parameters are named and shaped as in Flax (`kernel` is [in, out]). Each carries, as metadata `axes`,
the names of its dimensions; `sharding.py` says on which mesh axis each name lies.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_remat(remat: str | None) -> None:
    """Raises ValueError when `remat` names no rematerialisation policy."""
    if remat is not None and remat not in REMAT_POLICIES:
        raise ValueError(
            f"remat={remat!r} is not a rematerialisation policy; "
            f"use None (keep everything) or one of {sorted(REMAT_POLICIES)}."
        )


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that transformers calls `name`; ValueError for one that is not known here."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; supported: {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def linear(
    d_in: int,
    d_out: int,
    axes: tuple[str | None, str | None],
    *,
    bias: bool = True,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear map with kernel [d_in, d_out], initialised as BERT and Llama are: normal(0, 0.02)."""
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
    )


class Embedding(nnx.Embed):
    """A table [num, features], initialised normal(0, 0.02)."""

    def __init__(
        self,
        num: int,
        features: int,
        axes: tuple[str | None, str | None],
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            embedding_metadata={"axes": axes},
            rngs=rngs,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [...] -> [..., features]. An id outside the table gives NaN, never another's row."""
        valid = (ids >= 0) & (ids < self.num_embeddings)
        return jnp.where(valid[..., None], super().__call__(jnp.where(valid, ids, 0)), jnp.nan)


class LayerNorm(nnx.LayerNorm):
    """Layer norm over the last dimension, in float32; the result has the input's dtype."""

    def __init__(self, features: int, epsilon: float, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(
            features,
            epsilon=epsilon,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where PyTorch's does not
            scale_metadata={"axes": (None,)},
            bias_metadata={"axes": (None,)},
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(x.dtype)


class RMSNorm(nnx.RMSNorm):
    """Root-mean-square norm over the last dimension, in float32; the result has the input's dtype.

    start: the value with which its scale begins to train.
    """

    def __init__(
        self, features: int, epsilon: float, *, start: float = 1.0, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        super().__init__(
            features,
            epsilon=epsilon,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            scale_init=nnx.initializers.constant(start),
            scale_metadata={"axes": (None,)},
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(x.dtype)


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """float32 [N, width]: sines, then cosines, of positions [N], with periods from 6 to 6,000."""
    frequencies = 1000.0 ** -jnp.linspace(0, 1, (width + 1) // 2)
    angles = positions[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)[:, :width]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Drops entries of x with probability `rate`; without a key (evaluation) x itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    seen_first: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with the softmax in float32.

    query [B, T, N, H]; key and value [B, C, K, H], K dividing N; mask bool, broadcastable to
    [B, N, T, C], True where a query may look. causal: query i may look at keys 0 to i alone; without dropout.
    seen_first: the mask is the same for all queries, [B, 1, 1, C], and the keys that are seen come first, so
    that their number says it all. Returns [B, T, N, H]. A query that may look nowhere gets finite values,
    which are never used.
    """
    if dropout_key is None or dropout_rate == 0.0:
        if _has_cudnn(query) and (mask is None or seen_first):
            return _cudnn_attention(query, key, value, mask, causal)
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
    scores = jnp.einsum("BTNH,BCNH->BNTC", query, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores), dropout_rate, dropout_key)
    return jnp.einsum("BNTC,BCNH->BTNH", weights.astype(value.dtype), value)


def _has_cudnn(query: jax.Array) -> bool:
    """Whether cuDNN's fused attention is there for these queries: on NVIDIA's GPUs, in 16 bits.

    It keeps no scores in memory. A program may be for devices that are not here (`plan_tpu`): its mesh says.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    sizes = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    return platform in ("gpu", "cuda") and query.dtype in (jnp.bfloat16, jnp.float16) and sizes


def _cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool
) -> jax.Array:
    """Computes `attention` for a mask bool [B, 1, 1, C] that leaves out the last keys, or none."""
    (batch, length), odd = query.shape[:2], key.shape[1] % 2
    if odd and mask is None and not causal:  # a causal one does not see the padding
        mask = jnp.ones((batch, 1, 1, key.shape[1]), bool)
    # cuDNN's backward pass takes even lengths alone.
    query, key, value = (_pad(x, x.shape[1] % 2) for x in (query, key, value))
    lengths: dict[str, jax.Array] = {}
    if mask is not None:
        # At least one key, so that an empty row has finite values.
        seen = jnp.maximum(jnp.broadcast_to(mask, (batch, *mask.shape[1:])).sum((1, 2, 3), jnp.int32), 1)
        every = jnp.full(batch, query.shape[1], jnp.int32)
        lengths = dict(query_seq_lengths=every, key_value_seq_lengths=seen)
    options = dict(implementation="cudnn", is_causal=causal)
    return jax.nn.dot_product_attention(query, key, value, **options, **lengths)[:, :length]


def _pad(x: jax.Array, number: int) -> jax.Array:
    """x [B, T, ...] with so many zeros after its positions."""
    return jnp.pad(x, ((0, 0), (0, number), *[(0, 0)] * (x.ndim - 2))) if number else x


class Attention(nnx.Module):
    """Multi-head attention with biases, as in HuBERT and BERT; Whisper's keys have none.

    Queries come from x [B, T, width], keys and values from `source` [B, C, source_width].
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        source_width: int | None = None,
        *,
        dropout_rate: float = 0.0,
        key_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        if width % num_heads:
            raise ValueError(
                f"the width {width} is not a multiple of the number of attention heads {num_heads}."
            )
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        source_width = source_width or width
        self.query = linear(width, width, ("embed", "heads"), **kwargs)
        self.key = linear(source_width, width, ("embed", "heads"), bias=key_bias, **kwargs)
        self.value = linear(source_width, width, ("embed", "heads"), **kwargs)
        self.out = linear(width, width, ("heads", "embed"), **kwargs)
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate

    def split_heads(self, x: jax.Array) -> jax.Array:
        """[B, T, width] -> [B, T, N, H]."""
        # Sizes are written out: of an empty array, -1 can't be told.
        return x.reshape(*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)

    def keys_values(self, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        """source [B, C, source_width] -> keys and values, each [B, C, N, H]."""
        return self.split_heads(self.key(source)), self.split_heads(self.value(source))

    def weights(self, x: jax.Array, source: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Attention weights of x [B, T, width] to source [B, C, source_width]: float32 [B, N, T, C]."""
        query, key = self.split_heads(self.query(x)), self.split_heads(self.key(source))
        scores = jnp.einsum("BTNH,BCNH->BNTC", query, key, preferred_element_type=jnp.float32)
        scores *= query.shape[-1] ** -0.5
        return jax.nn.softmax(scores, where=mask if mask is None else jnp.broadcast_to(mask, scores.shape))

    def __call__(
        self,
        x: jax.Array,
        keys_values: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, T, width], keys and values [B, C, N, H], mask bool [B|1, 1, T|1, C] -> [B, T, width].

        In a mask that is the same for all queries the keys that are seen come first.
        """
        out = attention(
            self.split_heads(self.query(x)),
            *keys_values,
            mask,
            seen_first=mask is not None and mask.shape[1:3] == (1, 1),
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key,
        )
        return self.out(out.reshape(x.shape))


def stack(make_layer: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num` equal layers as one module whose parameters have a leading layer dimension."""
    return nnx.vmap(make_layer)(rngs.split(num))


def scan(
    layers: nnx.Module,
    step: Callable,
    carry,
    xs=None,
    *,
    num: int | None = None,
    remat: str | None = None,
):
    """Runs stacked layers one after the other in one compiled loop.

    `step(layer, carry, x) -> (carry, y)`; `num` runs only the first `num` layers; `remat` is a key of
    REMAT_POLICIES: what the backward pass recomputes instead of keeping.
    Returns (carry, stacked ys).
    """
    check_remat(remat)
    graphdef, state = nnx.split(layers)
    if num is not None:
        state = jax.tree.map(lambda leaf: leaf[:num], state)

    def body(carry, state_and_x):
        state, x = state_and_x
        return step(nnx.merge(graphdef, state), carry, x)

    if remat is not None:
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, (state, xs))
