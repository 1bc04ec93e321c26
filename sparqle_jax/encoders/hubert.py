"""HuBERT and wav2vec 2.0: waveform -> frames. Base, large and x-large from one file, by configuration.

Convolutions, then a Transformer. Base models normalise each layer after its residual (post-norm); large and
x-large ones before (pre-norm). After transformers' modeling_hubert.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import layers
from sparqle_jax.encoders import convolutions
from sparqle_jax.encoders.convolutions import Config
from sparqle_jax.sharding import split_batch
from sparqle_jax.tables import Table, linear, norm

PREFIXES = ("hubert.", "wav2vec2.")


def table(config: Config) -> Table:
    """Which tensor of a transformers file is which parameter."""
    return Table(
        rules=(
            *convolutions.RULES,
            *linear("layers.attention.query", "encoder.layers.{i}.attention.q_proj"),
            *linear("layers.attention.key", "encoder.layers.{i}.attention.k_proj"),
            *linear("layers.attention.value", "encoder.layers.{i}.attention.v_proj"),
            *linear("layers.attention.out", "encoder.layers.{i}.attention.out_proj"),
            *norm("layers.attention_norm", "encoder.layers.{i}.layer_norm"),
            *linear("layers.up", "encoder.layers.{i}.feed_forward.intermediate_dense"),
            *linear("layers.down", "encoder.layers.{i}.feed_forward.output_dense"),
            *norm("layers.mlp_norm", "encoder.layers.{i}.final_layer_norm"),
        ),
        ignored=convolutions.IGNORED,
    )


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each with a residual; norms after (base) or before (large)."""

    def __init__(self, config: Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention = layers.Attention(width, config.num_attention_heads, **kwargs)
        self.attention_norm = layers.LayerNorm(width, eps, param_dtype=param_dtype, rngs=rngs)
        self.up = layers.linear(width, config.intermediate_size, ("embed", "mlp"), **kwargs)
        self.down = layers.linear(config.intermediate_size, width, ("mlp", "embed"), **kwargs)
        self.mlp_norm = layers.LayerNorm(width, eps, param_dtype=param_dtype, rngs=rngs)
        self.pre_norm = config.do_stable_layer_norm
        self.activation = config.hidden_act

    def _attend(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return self.attention(x, self.attention.keys_values(x), mask)

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.down(layers.activation(self.activation)(self.up(x)))

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x [B, T, D], mask bool [B, 1, 1, T] -> [B, T, D]."""
        if self.pre_norm:
            x = x + self._attend(self.attention_norm(x), mask)
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self._attend(x, mask))
        return self.mlp_norm(x + self._mlp(x))


class Encoder(nnx.Module):
    """The model without a head: `HubertModel` and `Wav2Vec2Model` of transformers.

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
        self.layers = layers.stack(
            lambda rngs: EncoderLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )

    def __call__(
        self, waveform: jax.Array, mask: jax.Array | None = None, *, layer: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """waveform float [B, S] at 16 kHz, mask bool [B, S] -> (frames [B, T, D], mask bool [B, T]).

        The mask is 1 on samples and 0 on the padding after them; None means no padding.

        layer: the frames after that many layers, 0 being their input. None is all: the model's output, in
            pre-norm models after the final norm.
        Raises ValueError when S is too short for one frame, or there is no such layer.
        """
        num_layers = self.config.num_hidden_layers
        if layer is not None and not 0 <= layer <= num_layers:
            raise ValueError(f"layer={layer} does not exist: this encoder has layers 0 to {num_layers}.")
        x, frames_mask = self.features(waveform, mask)
        x = self.contextualise(x, frames_mask, layer=layer)
        return x, jnp.ones(x.shape[:2], bool) if frames_mask is None else frames_mask

    def hidden_states(
        self, waveform: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The frames of every layer, 0 to num_hidden_layers, [num_hidden_layers + 1, B, T, D]; their mask.

        The last are the model's output: in pre-norm models after the final norm.
        """
        x, frames_mask = self.features(waveform, mask)
        x, keys_mask = self._add_positions(x, frames_mask)

        def step(encoder_layer, x, _):
            x = split_batch(encoder_layer(x, keys_mask))
            return x, x

        last, outputs = layers.scan(self.layers, step, x, remat=self.remat)
        if self.config.do_stable_layer_norm:
            last = self.norm(last)
        frames = jnp.concatenate([x[None], outputs[:-1], last[None]])
        return frames, jnp.ones(x.shape[:2], bool) if frames_mask is None else frames_mask

    def contextualise(
        self, x: jax.Array, frames_mask: jax.Array | None, *, layer: int | None = None
    ) -> jax.Array:
        """What `features` returns -> frames [B, T, D]: positions, then `layer` layers (None is all)."""
        x, keys_mask = self._add_positions(x, frames_mask)

        def step(encoder_layer, x, _):
            return split_batch(encoder_layer(x, keys_mask)), None

        with jax.named_scope("layers"):
            x, _ = layers.scan(self.layers, step, x, num=layer, remat=self.remat)
        if layer in (None, self.config.num_hidden_layers) and self.config.do_stable_layer_norm:
            x = self.norm(x)
        return x

    def _add_positions(
        self, x: jax.Array, frames_mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The input of the layers [B, T, D], and the mask of their keys."""
        keys_mask = None
        if frames_mask is not None:
            x = jnp.where(frames_mask[..., None], x, 0)  # as an example's end, when it is alone
            keys_mask = frames_mask[:, None, None, :]
        with jax.named_scope("positional_conv"):
            x = x + self.positional_conv(x)
        if not self.config.do_stable_layer_norm:
            x = self.norm(x)
        return x, keys_mask
