"""WavLM: waveform -> frames. Base and large from one file, by configuration.

HuBERT's convolutions and layers, but a score of attention has a bias for the distance of the two frames: one
table of biases for all layers, and in each layer a gate on them that depends on the frame of the query. After
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
from sparqle_jax.encoders import convolutions
from sparqle_jax.sharding import split_batch
from sparqle_jax.tables import Rule, Table, linear, norm

PREFIXES = ("wavlm.",)
_GATES = 8  # two gates, each the sum of four outputs


@dataclasses.dataclass(frozen=True)
class Config(convolutions.Config):
    """The fields of the convolutions' Config, and those of the relative positions.

    num_buckets: half of them are for keys before their query, half for keys after it; of each half, the first
    half hold one distance each, the others more and more, up to max_bucket_distance.
    """

    num_buckets: int = 320
    max_bucket_distance: int = 800

    def flops(self, size: int, samples: int) -> int:
        """Forward: as HuBERT's, and the gates."""
        gates = flops.linear(size * self.num_frames(samples), self.hidden_size, _GATES)
        return super().flops(size, samples) + self.num_hidden_layers * gates


def table(config: Config) -> Table:
    """Which tensor of a transformers file is which parameter."""
    return Table(
        rules=(
            *convolutions.RULES,
            Rule("position_bias.embedding", "encoder.layers.0.attention.rel_attn_embed.weight"),
            *linear("layers.attention.query", "encoder.layers.{i}.attention.q_proj"),
            *linear("layers.attention.key", "encoder.layers.{i}.attention.k_proj"),
            *linear("layers.attention.value", "encoder.layers.{i}.attention.v_proj"),
            *linear("layers.attention.out", "encoder.layers.{i}.attention.out_proj"),
            *linear("layers.attention.gates", "encoder.layers.{i}.attention.gru_rel_pos_linear"),
            Rule("layers.attention.gate_scale", "encoder.layers.{i}.attention.gru_rel_pos_const"),
            *norm("layers.attention_norm", "encoder.layers.{i}.layer_norm"),
            *linear("layers.up", "encoder.layers.{i}.feed_forward.intermediate_dense"),
            *linear("layers.down", "encoder.layers.{i}.feed_forward.output_dense"),
            *norm("layers.mlp_norm", "encoder.layers.{i}.final_layer_norm"),
        ),
        # With the heads of speaker verification.
        ignored=(*convolutions.IGNORED, r"tdnn\..*", r"feature_extractor\.(weight|bias)", r"objective\..*"),
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


class Attention(nnx.Module):
    """Multi-head self-attention whose scores have a gated bias for the distance of query and key."""

    def __init__(
        self, width: int, num_heads: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        if width % num_heads:
            raise ValueError(
                f"the width {width} is not a multiple of the number of attention heads {num_heads}."
            )
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.query = layers.linear(width, width, ("embed", "heads"), **kwargs)
        self.key = layers.linear(width, width, ("embed", "heads"), **kwargs)
        self.value = layers.linear(width, width, ("embed", "heads"), **kwargs)
        self.out = layers.linear(width, width, ("heads", "embed"), **kwargs)
        self.gates = layers.linear(width // num_heads, _GATES, (None, None), **kwargs)
        self.gate_scale = nnx.Param(jnp.ones((1, num_heads, 1, 1), param_dtype), axes=(None,) * 4)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x [B, T, D], bias float32 [N, T, T], mask bool [B, 1, 1, T] -> [B, T, D]."""
        query, key, value = (self._split_heads(project(x)) for project in (self.query, self.key, self.value))
        bias = self._gate(self._split_heads(x)) * bias
        out = jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask)
        return self.out(out.reshape(x.shape))

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)  # [B, T, N, H]

    def _gate(self, x: jax.Array) -> jax.Array:
        """The factor of each query's biases, from the layer's input [B, T, N, H]: float32 [B, N, T, 1]."""
        gates = self.gates(x).astype(jnp.float32).reshape(*x.shape[:-1], 2, _GATES // 2).sum(-1)
        first, second = jax.nn.sigmoid(gates).transpose(3, 0, 2, 1)[..., None]
        return first * (second * self.gate_scale[...].astype(jnp.float32) - 1) + 2


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each with a residual; norms after (base) or before (large)."""

    def __init__(self, config: Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention = Attention(width, config.num_attention_heads, **kwargs)
        self.attention_norm = layers.LayerNorm(width, eps, param_dtype=param_dtype, rngs=rngs)
        self.up = layers.linear(width, config.intermediate_size, ("embed", "mlp"), **kwargs)
        self.down = layers.linear(config.intermediate_size, width, ("mlp", "embed"), **kwargs)
        self.mlp_norm = layers.LayerNorm(width, eps, param_dtype=param_dtype, rngs=rngs)
        self.pre_norm = config.do_stable_layer_norm
        self.activation = config.hidden_act

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.down(layers.activation(self.activation)(self.up(x)))

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x [B, T, D], bias float32 [N, T, T], mask bool [B, 1, 1, T] -> [B, T, D]."""
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), bias, mask)
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, bias, mask))
        return self.mlp_norm(x + self._mlp(x))


class Encoder(nnx.Module):
    """The model without a head: `WavLMModel` of transformers.

    dtype: of the matrix products and the frames; param_dtype: of the parameters; remat: a key of
    `layers.REMAT_POLICIES`, for those who train through the encoder.
    """

    TRAINED = ()

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
        self.features = convolutions.Features(config, **kwargs)
        self.positional_conv = convolutions.PositionalConv(config, **kwargs)
        self.norm = layers.LayerNorm(
            config.hidden_size, config.layer_norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.position_bias = layers.Embedding(
            config.num_buckets,
            config.num_attention_heads,
            (None, None),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.layers = layers.stack(
            lambda rngs: EncoderLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )

    def __call__(self, waveform: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """waveform float [B, S] at 16 kHz, mask bool [B, S] -> (frames [B, T, D], mask bool [B, T]).

        The mask is 1 on samples and 0 on the padding after them; None means no padding.
        Raises ValueError when S is too short for one frame.
        """
        x, frames_mask = self._inputs(waveform, mask)
        x, _ = self._run(x, frames_mask, keep=False)
        return x, jnp.ones(x.shape[:2], bool) if frames_mask is None else frames_mask

    def hidden_states(
        self, waveform: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The frames of every layer, 0 to num_hidden_layers, [num_hidden_layers + 1, B, T, D]; their mask.

        The last are the model's output: in pre-norm models after the final norm.
        """
        x, frames_mask = self._inputs(waveform, mask)
        last, outputs = self._run(x, frames_mask, keep=True)
        frames = jnp.concatenate([x[None], outputs[:-1], last[None]])
        return frames, jnp.ones(x.shape[:2], bool) if frames_mask is None else frames_mask

    def _inputs(self, waveform: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The input of the layers [B, T, D], and the frames' mask bool [B, T]; None where all are real."""
        x, frames_mask = self.features(waveform, mask)
        if frames_mask is not None:
            x = jnp.where(frames_mask[..., None], x, 0)  # as an example's end, when it is alone
        with jax.named_scope("positional_conv"):
            x = x + self.positional_conv(x)
        return x if self.config.do_stable_layer_norm else self.norm(x), frames_mask

    def _run(
        self, x: jax.Array, frames_mask: jax.Array | None, *, keep: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """The model's output [B, T, D]; with `keep` also that of each layer, [layers, B, T, D]."""
        keys_mask = None if frames_mask is None else frames_mask[:, None, None, :]
        bias = self._biases(x.shape[1])

        def step(encoder_layer, x, _):
            x = split_batch(encoder_layer(x, bias, keys_mask))
            return x, x if keep else None

        with jax.named_scope("layers"):
            x, outputs = layers.scan(self.layers, step, x, remat=self.remat)
        return self.norm(x) if self.config.do_stable_layer_norm else x, outputs

    def _biases(self, num_frames: int) -> jax.Array:
        """The bias of each pair of frames, query and key, before the gates: float32 [N, T, T]."""
        config = self.config
        by_offset = self.position_bias(
            buckets(num_frames, config.num_buckets, config.max_bucket_distance)
        ).T  # [N, 2T - 1]
        # Each row of the result begins one offset earlier than the row before it: so does a repeated row of
        # 2T entries that is read 2T - 1 at a time. A gather of T * T entries would be slow on TPUs.
        rows = jnp.tile(jnp.pad(by_offset, ((0, 0), (0, 1))), num_frames)[:, :-num_frames]
        return rows.reshape(-1, num_frames, 2 * num_frames - 1)[:, :, num_frames - 1 :]
