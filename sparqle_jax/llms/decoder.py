"""The language model: Llama 2, 3 and 3.1+, Mistral, Qwen2, Qwen2.5 and Qwen3, by configuration.

One pre-norm decoder with rotary positions, grouped key/value heads and a gated feed-forward; the families
differ in biases, q/k norms, tied embeddings, rope scaling and sliding windows. After transformers'
modeling_llama.py, modeling_mistral.py, modeling_qwen2.py and modeling_qwen3.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.sharding import BATCH_AXES, batch_parts, split_batch
from sparqle_jax.tables import Rule, Table, linear

PREFIXES = ()
ROPE_TYPES = ("default", "linear", "llama3")

# The defaults of each model type's configuration, where they are not Llama's.
_QWEN = dict(vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768)
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": dict(),
    "mistral": dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072),
    "qwen2": _QWEN,
    "qwen3": dict(**_QWEN, head_dim=128),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The stretching of rotary frequencies for contexts longer than those first trained on.

    type "linear" divides every frequency by `factor`; "llama3" only the low ones, smoothly.
    """

    type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of a decoder-only language model, under transformers' names where it has them.

    sliding_windows: one entry per layer, how many positions back a token may look (None: all);
    an empty tuple means None everywhere.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    max_position_embeddings: int = 2048

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings

    def flops(self, size: int, prompt: int, answer: int) -> tuple[int, int]:
        """Forward over `size` prompts and answers: of the layers' linear maps, and of their attention."""
        # The last token of the answer predicts nothing, so it is not read.
        length = prompt + answer - 1
        width, rows = self.hidden_size, size * length
        heads = self.num_attention_heads * self.head_dim
        kv_heads = self.num_key_value_heads * self.head_dim
        linear = 2 * flops.linear(rows, width, heads) + 2 * flops.linear(rows, width, kv_heads)
        linear += 3 * flops.linear(rows, width, self.intermediate_size)
        layers = self.num_hidden_layers
        return layers * linear, layers * flops.attention(size, length, length, heads)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Config":
        """Reads the `config.json` of a model type in DEFAULTS, as transformers 4 or 5 wrote it.

        Raises ValueError for another model_type, and for a kind of rope scaling that is not in ROPE_TYPES.
        """
        family = config.get("model_type")
        if family not in DEFAULTS:
            raise ValueError(f"model_type={family!r} is not supported; supported: {list(DEFAULTS)}.")
        defaults = DEFAULTS[family]
        names = [field.name for field in dataclasses.fields(cls)]
        given = {k: v for k, v in config.items() if k in names and v is not None and k != "rope_scaling"}
        values = {**defaults, **given}
        heads = values.get("num_attention_heads", cls.num_attention_heads)
        # null means as many key/value heads as heads; so does leaving it out, in a Llama alone.
        if "num_key_value_heads" in config or family == "llama":
            values["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        if "head_dim" not in values:
            values["head_dim"] = values.get("hidden_size", cls.hidden_size) // heads
        theta, values["rope_scaling"] = _read_rope(config, values.get("max_position_embeddings", 2048))
        values["rope_theta"] = theta
        bias = bool(config.get("attention_bias", False)) and family != "mistral"
        values["qkv_bias"] = bias or family == "qwen2"
        values["out_bias"] = bias and family != "qwen2"
        values["mlp_bias"] = bool(config.get("mlp_bias", False)) and family == "llama"
        values["qk_norm"] = family == "qwen3"
        values["sliding_windows"] = _read_windows(
            config, values.get("num_hidden_layers", cls.num_hidden_layers)
        )
        return cls(**values)


def _read_rope(config: dict[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from transformers 5's `rope_parameters` or 4's `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {list(ROPE_TYPES)}.")
    if kind == "default":
        return theta, None
    names = [field.name for field in dataclasses.fields(RopeScaling) if field.name != "type"]
    values = {name: rope[name] for name in names if rope.get(name) is not None}
    if "factor" not in values:
        raise ValueError(f"rope type {kind!r} needs a factor, but config.json gives {rope}.")
    values.setdefault("original_max_position_embeddings", max_positions)
    return theta, RopeScaling(kind, **values)


def _read_windows(config: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; Mistral's is in all, Qwen's in those that `layer_types` marks."""
    family = config["model_type"]
    window = config.get("sliding_window", 4096)
    if family == "mistral":
        windows = (window,) * num_layers
    elif family in ("qwen2", "qwen3") and config.get("use_sliding_window") and window is not None:
        first = config.get("max_window_layers", 28)
        kinds = config.get("layer_types") or [
            "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
        ]
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    else:
        windows = ()
    return windows if any(window is not None for window in windows) else ()


def rope_frequencies(config: Config) -> np.ndarray:
    """Radians per position for each pair of dimensions of a head: float32 [head_dim / 2]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slowed = frequencies / np.float32(scaling.factor)
    if scaling.type == "linear":
        return slowed
    # llama3: wavelengths much shorter than the first context stay, much longer ones are stretched.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (keep * frequencies + (1 - keep) * slowed).astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, L, N, H] by cos and sin [B, L, H / 2]; dimension i is paired with i + H / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values", "mask", "length"], meta_fields=[]
)
@dataclasses.dataclass
class KVCache:
    """Keys and values of the tokens so far, in arrays of fixed size C; grows by writing at `length`.

    keys, values [layers, B, C, K, H]; mask bool [B, C]: real tokens; length int32 []: places filled.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    length: jax.Array

    def _map_rows(self, function: Callable[[jax.Array, int], jax.Array]) -> "KVCache":
        """The cache with `function(array, axis)` done to its batch axes."""
        return dataclasses.replace(
            self, keys=function(self.keys, 1), values=function(self.values, 1), mask=function(self.mask, 0)
        )

    def take(self, rows: jax.Array) -> "KVCache":
        """These rows int [B'] alone."""
        return self._map_rows(lambda x, axis: jnp.take(x, rows, axis)).split()

    def repeat(self, beams: int) -> "KVCache":
        """Each row `beams` times."""
        return self._map_rows(lambda x, axis: jnp.repeat(x, beams, axis))

    def reorder(self, parents: jax.Array) -> "KVCache":
        """Each of the rows [B * W] as its parent int [B, W] among the beams of its example."""

        def reorder(x: jax.Array, axis: int) -> jax.Array:
            # Within an example, so that on a mesh nothing of the cache is sent.
            apart = x.reshape(*x.shape[:axis], *parents.shape, *x.shape[axis + 1 :])
            take = functools.partial(jnp.take, axis=axis, mode="clip")
            return jax.vmap(take, in_axes=(axis, 0), out_axes=axis)(apart, parents).reshape(x.shape)

        return self._map_rows(reorder).split()

    def split(self) -> "KVCache":
        """Inside a program for a mesh: kept split by examples and by heads, where the mesh divides them.

        Without a mesh it is the cache itself.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return self
        _, batch, _, heads, _ = self.keys.shape
        rows = None if batch % batch_parts(mesh) else BATCH_AXES
        kept = PartitionSpec(None, rows, None, None if heads % mesh.shape["model"] else "model")
        specs = KVCache(kept, kept, PartitionSpec(rows), PartitionSpec())
        return jax.lax.with_sharding_constraint(self, specs)


_TABLE = Table(
    rules=(
        Rule("embeddings.embedding", "model.embed_tokens.weight"),
        *linear("layers.query", "model.layers.{i}.self_attn.q_proj"),
        *linear("layers.key", "model.layers.{i}.self_attn.k_proj"),
        *linear("layers.value", "model.layers.{i}.self_attn.v_proj"),
        *linear("layers.out", "model.layers.{i}.self_attn.o_proj"),
        Rule("layers.query_norm.scale", "model.layers.{i}.self_attn.q_norm.weight"),
        Rule("layers.key_norm.scale", "model.layers.{i}.self_attn.k_norm.weight"),
        Rule("layers.attention_norm.scale", "model.layers.{i}.input_layernorm.weight"),
        Rule("layers.mlp_norm.scale", "model.layers.{i}.post_attention_layernorm.weight"),
        *linear("layers.gate", "model.layers.{i}.mlp.gate_proj"),
        *linear("layers.up", "model.layers.{i}.mlp.up_proj"),
        *linear("layers.down", "model.layers.{i}.mlp.down_proj"),
        Rule("norm.scale", "model.norm.weight"),
        Rule("lm_head.kernel", "lm_head.weight", (1, 0)),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


def table(config: Config) -> Table:
    """The parameters, as the tensors of a transformers file."""
    if not config.tie_word_embeddings:
        return _TABLE
    return dataclasses.replace(_TABLE, copies={"lm_head.weight": "model.embed_tokens.weight"})


class DecoderLayer(nnx.Module):
    """Self-attention with rotary positions, then the gated feed-forward; RMS norm before each."""

    def __init__(self, config: Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, mlp, head = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_attention_heads * head, config.num_key_value_heads * head

        def norm(features: int) -> layers.RMSNorm:
            return layers.RMSNorm(features, config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs)

        self.attention_norm = norm(width)
        self.query = layers.linear(width, heads, ("embed", "heads"), bias=config.qkv_bias, **kwargs)
        self.key = layers.linear(width, kv_heads, ("embed", "heads"), bias=config.qkv_bias, **kwargs)
        self.value = layers.linear(width, kv_heads, ("embed", "heads"), bias=config.qkv_bias, **kwargs)
        self.out = layers.linear(heads, width, ("heads", "embed"), bias=config.out_bias, **kwargs)
        self.query_norm = norm(head) if config.qk_norm else None
        self.key_norm = norm(head) if config.qk_norm else None
        self.mlp_norm = norm(width)
        self.gate = layers.linear(width, mlp, ("embed", "mlp"), bias=config.mlp_bias, **kwargs)
        self.up = layers.linear(width, mlp, ("embed", "mlp"), bias=config.mlp_bias, **kwargs)
        self.down = layers.linear(mlp, width, ("mlp", "embed"), bias=config.mlp_bias, **kwargs)
        self.head_dim, self.activation = head, config.hidden_act

    def queries_keys_values(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, L, M] -> queries [B, L, N, H], keys and values [B, L, K, H], positions rotated in."""
        x = self.attention_norm(x)
        query, key, value = (
            project(x).reshape(*x.shape[:2], -1, self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def attend(
        self, x: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        """Attention and feed-forward with residuals: x [B, L, M] -> [B, L, M].

        mask bool [B|1, 1, L, C]; None: causal.
        """
        out = layers.attention(query, key, value, mask, causal=mask is None)
        x = x + self.out(out.reshape(*x.shape[:2], -1))
        normed = self.mlp_norm(x)
        return x + self.down(layers.activation(self.activation)(self.gate(normed)) * self.up(normed))


class LLM(nnx.Module):
    """A decoder-only language model: embeddings or ids in, hidden states out; `logits` turns those to scores.

    dtype: of the matrix products; param_dtype: of the parameters; remat: a key of
    `layers.REMAT_POLICIES`: what the backward pass recomputes instead of keeping.
    """

    TRAINED = (r".*\.lora_[ab]",)
    lora = None  # `lora.add` sets its configuration

    def __init__(
        self,
        config: Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        layers.check_remat(remat)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype, self.remat = config, dtype, remat
        axes = ("vocab", "embed")
        self.embeddings = layers.Embedding(config.vocab_size, config.hidden_size, axes, **kwargs)
        self.layers = layers.stack(
            lambda rngs: DecoderLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.norm = layers.RMSNorm(
            config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else layers.linear(
                config.hidden_size, config.vocab_size, ("embed", "vocab"), bias=False, **kwargs
            )
        )

    def embed(self, ids: jax.Array) -> jax.Array:
        """ids int [B, L] -> [B, L, M]. An id outside the vocabulary gives NaN, never another's row."""
        return self.embeddings(ids)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., M] -> float32 [..., V]."""
        kernel = self.embeddings.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        kernel = kernel.astype(self.dtype)
        return jnp.einsum("...M,MV->...V", hidden, kernel, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, size: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `size` tokens, padding included."""
        config = self.config
        shape = (config.num_hidden_layers, batch, size, config.num_key_value_heads, config.head_dim)
        return KVCache(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            mask=jnp.zeros((batch, size), bool),
            length=jnp.zeros((), jnp.int32),
        ).split()

    def answer_states(
        self, prompt: jax.Array, prompt_mask: jax.Array, answer: jax.Array, answer_mask: jax.Array
    ) -> jax.Array:
        """The states that predict each token of an answer, for `logits`: hidden [B, L, M].

        prompt [B, P, M] and its mask bool [B, P]; answer int [B, L] and its mask.
        """
        # The last token of the answer predicts nothing, so it need not be read.
        embeddings = jnp.concatenate([prompt, self.embed(answer[:, :-1])], 1)
        mask = jnp.concatenate([prompt_mask, answer_mask[:, :-1]], 1)
        hidden, _ = self(embeddings, mask)
        length = prompt.shape[1]
        first = last_real(hidden[:, :length], prompt_mask)  # which predicts the answer's first token
        return jnp.concatenate([first[:, None], hidden[:, length:]], 1)

    def prefill(self, prompt: jax.Array, mask: jax.Array, size: int) -> tuple[jax.Array, KVCache]:
        """Reads prompts [B, P, M], mask bool [B, P]: the states [B, M] that predict their answers' first
        tokens, and a cache of `size` tokens that holds them."""
        hidden, cache = self(prompt, mask, self.init_cache(prompt.shape[0], size))
        return last_real(hidden, mask), cache

    def step(self, ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One token int [B] more for each row: the states [B, M] that predict the next, and the cache."""
        hidden, cache = self(ids[:, None], None, cache)
        return hidden[:, 0], cache

    def __call__(
        self, inputs: jax.Array, mask: jax.Array | None = None, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """inputs: ids int [B, L] or embeddings [B, L, M]; mask bool [B, L] -> (hidden [B, L, M], cache).

        Hidden states are after the final norm. Padding may stand anywhere: it is not seen, and positions
        count real tokens alone. With a cache the inputs come after what it holds; the cache returned
        holds them too. The caller sees to it that they fit: `length` + L <= C.
        Raises ValueError for more places than the model has positions.
        """
        x = self.embed(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        x = split_batch(x.astype(self.dtype))
        batch, length = x.shape[:2]
        order = None
        if cache is None and mask is not None:
            # Real tokens first: what is seen is then a matter of order alone, as fused attention wants it.
            order = jnp.argsort(~mask.astype(bool), axis=1, stable=True)
            x, mask = _rows(x, order), _rows(mask, order)
        mask = jnp.ones((batch, length), bool) if mask is None else mask.astype(bool)
        x = jnp.where(mask[..., None], x, 0)  # a NaN in padding would come through attention's zeros
        if cache is None:
            start, keys_mask = 0, mask
        else:
            start = cache.length
            keys_mask = jax.lax.dynamic_update_slice(cache.mask, mask, (0, start))
        if keys_mask.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{keys_mask.shape[1]} places for tokens are more than the LLM's max_position_embeddings="
                f"{self.config.max_position_embeddings}: shorten prompt, answer or max_new_tokens."
            )
        positions = jnp.maximum(jnp.cumsum(keys_mask, 1) - 1, 0)  # [B, C]
        query_positions = jax.lax.dynamic_slice_in_dim(positions, start, length, 1)  # [B, L]
        # Angles in float32: bfloat16 makes 257 into 256.
        angles = query_positions[..., None].astype(jnp.float32) * rope_frequencies(self.config)
        cos, sin = jnp.cos(angles), jnp.sin(angles)

        index = jnp.arange(keys_mask.shape[1])
        causal = index[None, :] <= (start + jnp.arange(length))[:, None]  # [L, C]
        visible = causal[None] & keys_mask[:, None, :]  # [B, L, C]
        distance = query_positions[:, :, None] - positions[:, None, :]

        def step(layer, carry, xs):
            x, keys, values = carry
            i, window = xs
            if window is None:
                seen = None if cache is None else visible[:, None]
            else:
                seen = (visible & (distance < window))[:, None]
            query, key, value = layer.queries_keys_values(x, cos, sin)
            if cache is not None:
                at = (i, 0, start, 0, 0)
                keys = jax.lax.dynamic_update_slice(keys, key[None].astype(keys.dtype), at)
                values = jax.lax.dynamic_update_slice(values, value[None].astype(values.dtype), at)
                key, value = keys[i], values[i]
            x = split_batch(layer.attend(x, query, key, value, seen))
            return (x, keys, values), None

        windows = None
        if self.config.sliding_windows:
            no_window = jnp.iinfo(jnp.int32).max
            windows = jnp.array([no_window if w is None else w for w in self.config.sliding_windows])
        # The whole cache is carried, not scanned over: a loop writes to what it carries in place.
        carry = (x, None, None) if cache is None else (x, cache.keys, cache.values)
        xs = (jnp.arange(self.config.num_hidden_layers), windows)
        with jax.named_scope("layers"):
            (x, keys, values), _ = layers.scan(self.layers, step, carry, xs, remat=self.remat)
        if cache is not None:
            cache = KVCache(keys, values, keys_mask, start + length).split()
        x = self.norm(x)
        return x if order is None else _rows(x, jnp.argsort(order, axis=1)), cache


def _rows(x: jax.Array, order: jax.Array) -> jax.Array:
    """The positions of x [B, L, ...] in the order int [B, L]."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1, mode="clip")


def last_real(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The state of each row's last real position: hidden [B, L, M], mask bool [B, L] -> [B, M]."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], 1)
    return jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
