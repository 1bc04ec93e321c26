"""WavLM: waveform -> frames. Base and large from one file, by configuration.

wav2vec 2.0's model, but a score of attention has a bias for the distance of the two frames: one table of
biases for all layers, and in each layer a gate on them that depends on the frame of the query. After
transformers' modeling_wavlm.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.encoders import transformer, wav2vec2
from sparqle_jax.tables import Rule, Table, linear

PREFIXES = ("wavlm.",)
_GATES = 8  # two gates, each the sum of four outputs


@dataclasses.dataclass(frozen=True)
class Config(wav2vec2.Config):
    """The fields of wav2vec 2.0's Config, and those of the relative positions.

    num_buckets: half of them are for keys before their query, half for keys after it; of each half, the first
    half hold one distance each, the others more and more, up to max_bucket_distance.
    """

    num_buckets: int = 320
    max_bucket_distance: int = 800

    def flops(self, size: int, samples: int) -> int:
        """Forward: as wav2vec 2.0's, and the gates."""
        gates = flops.linear(size * self.num_frames(samples), self.hidden_size, _GATES)
        return super().flops(size, samples) + self.num_hidden_layers * gates


def table(config: Config) -> Table:
    """The parameters, as the tensors of a transformers file."""
    layer = "encoder.layers.{i}.attention"
    return wav2vec2.table(config) + Table(
        rules=(
            Rule("position_bias.embedding", "encoder.layers.0.attention.rel_attn_embed.weight"),
            *linear("layers.attention.gates", f"{layer}.gru_rel_pos_linear"),
            Rule("layers.attention.gate_scale", f"{layer}.gru_rel_pos_const"),
        ),
    )


def buckets(num_frames: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """int [2 * num_frames - 1]: the bucket of each offset (key minus query), from the farthest before on."""
    offsets = np.arange(1 - num_frames, num_frames)
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offsets)
    # In float32, as transformers computes it: borders of buckets are a matter of rounding.
    far = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum((exact + far * (half - exact)).astype(int), half - 1)
    return np.where(distance < exact, distance, far) + half * (offsets > 0)


class Attention(transformer.SelfAttention):
    """Multi-head self-attention whose scores have a gated bias for the distance of query and key."""

    def __init__(
        self, width: int, num_heads: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(width, num_heads, **kwargs)
        self.gates = layers.linear(width // num_heads, _GATES, (None, None), **kwargs)
        self.gate_scale = nnx.Param(jnp.ones((1, num_heads, 1, 1), param_dtype), axes=(None,) * 4)

    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array) -> jax.Array:
        """x [B, T, D], mask bool [B, 1, 1, T], bias float32 [N, T, T] -> [B, T, D]."""
        key, value = self.keys_values(x)
        bias = self._gate(self.split_heads(x)) * bias
        out = jax.nn.dot_product_attention(self.split_heads(self.query(x)), key, value, bias=bias, mask=mask)
        return self.out(out.reshape(x.shape))

    def _gate(self, x: jax.Array) -> jax.Array:
        """The factor of each query's biases, from the layer's input [B, T, N, H]: float32 [B, N, T, 1]."""
        gates = self.gates(x).astype(jnp.float32).reshape(*x.shape[:-1], 2, _GATES // 2).sum(-1)
        first, second = jax.nn.sigmoid(gates).transpose(3, 0, 2, 1)[..., None]
        return first * (second * self.gate_scale[...].astype(jnp.float32) - 1) + 2


class Encoder(wav2vec2.Encoder):
    """The model without a head: `WavLMModel` of transformers. Arguments as for wav2vec 2.0's."""

    Attention = Attention

    def __init__(
        self,
        config: Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=rngs)
        self.position_bias = layers.Embedding(
            config.num_buckets,
            config.num_attention_heads,
            (None, None),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def _bias(self, num_frames: int) -> jax.Array:
        """The bias of each pair of frames, query and key, before the gates: float32 [N, T, T]."""
        config = self.config
        by_offset = self.position_bias(
            buckets(num_frames, config.num_buckets, config.max_bucket_distance)
        ).T  # [N, 2T - 1]
        # Each row of the result begins one offset earlier than the row before it: so does a repeated row of
        # 2T entries that is read 2T - 1 at a time. A gather of T * T entries would be slow on TPUs.
        rows = jnp.tile(jnp.pad(by_offset, ((0, 0), (0, 1))), num_frames)[:, :-num_frames]
        return rows.reshape(-1, num_frames, 2 * num_frames - 1)[:, :, num_frames - 1 :]
