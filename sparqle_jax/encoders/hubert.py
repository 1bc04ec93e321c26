"""HuBERT: waveform -> frames. Base, large and x-large from one file, by configuration.

Seven convolutions turn 16 kHz samples into one feature every 20 ms; a convolution over time adds
positions; a Transformer follows. Base models normalise the first convolution over time (group norm) and
each layer after its residual (post-norm); large and x-large ones normalise every convolution over
channels (layer norm) and each layer before (pre-norm). After transformers' modeling_hubert.py.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import layers
from sparqle_jax.compat import check_compat
from sparqle_jax.sharding import split_batch

Compat = Literal["transformers", "published"] | None


@dataclasses.dataclass(frozen=True)
class HubertConfig:
    """The fields of transformers' HubertConfig that inference reads, under their names there."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    feat_extract_norm: Literal["group", "layer"] = "group"
    feat_extract_activation: str = "gelu"
    feat_proj_layer_norm: bool = True
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False

    def __post_init__(self):
        if not len(self.conv_dim) == len(self.conv_stride) == len(self.conv_kernel):
            raise ValueError(
                "conv_dim, conv_stride and conv_kernel must have one entry per convolution; got "
                f"{len(self.conv_dim)}, {len(self.conv_stride)} and {len(self.conv_kernel)} entries."
            )
        if self.feat_extract_norm not in ("group", "layer"):
            raise ValueError(f"feat_extract_norm must be 'group' or 'layer', got {self.feat_extract_norm!r}.")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "HubertConfig":
        """Reads a transformers `config.json`; what it leaves out has transformers' default."""
        for key in ("conv_pos_batch_norm", "adapter_attn_dim"):
            if config.get(key):
                raise ValueError(f"HuBERT with {key}={config[key]!r} is not supported.")
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: config[name] for name in names if name in config}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def num_frames(self, num_samples, layers: int | None = None):
        """Frames from `num_samples` samples (int or array) after all convolutions, or the first `layers`.

        After all, a frame is 20 ms. Edges are not padded: 399 samples give no frame.
        """
        for kernel, stride in list(zip(self.conv_kernel, self.conv_stride, strict=True))[:layers]:
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples

    @property
    def min_samples(self) -> int:
        """The shortest waveform that gives one frame: 400 samples, 25 ms, for the usual convolutions."""
        num_samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            num_samples = (num_samples - 1) * stride + kernel
        return num_samples


class ConvLayer(nnx.Module):
    """One convolution of the feature extractor: convolution, norm over time, channels or none, GELU."""

    def __init__(
        self, config: HubertConfig, index: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        channels = config.conv_dim[index]
        self.conv = nnx.Conv(
            config.conv_dim[index - 1] if index else 1,
            channels,
            config.conv_kernel[index],
            strides=config.conv_stride[index],
            padding="VALID",
            use_bias=config.conv_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.he_normal(),
            kernel_metadata={"axes": (None, None, "mlp")},
            bias_metadata={"axes": ("mlp",)},
            rngs=rngs,
        )
        self.over_time = config.feat_extract_norm == "group" and index == 0
        has_norm = config.feat_extract_norm == "layer" or self.over_time
        self.norm = layers.LayerNorm(channels, 1e-5, param_dtype=param_dtype, rngs=rngs) if has_norm else None
        self.activation = config.feat_extract_activation

    def __call__(self, x: jax.Array, time_mask: jax.Array | None) -> jax.Array:
        """x [B, S, C_in] -> [B, S', C]; time_mask bool [B, S'] says what the norm over time counts."""
        x = self.conv(x)
        if self.over_time:
            x = self._norm_over_time(x, time_mask)
        elif self.norm is not None:
            x = self.norm(x)
        return layers.activation(self.activation)(x)

    def _norm_over_time(self, x: jax.Array, time_mask: jax.Array | None) -> jax.Array:
        """Each channel of each example to mean 0 and variance 1 over its real frames, in float32."""
        dtype, x = x.dtype, x.astype(jnp.float32)
        where = None if time_mask is None else time_mask[..., None]
        mean = x.mean(1, keepdims=True, where=where)
        variance = jnp.square(x - mean).mean(1, keepdims=True, where=where)
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
        return (x * self.norm.scale[...] + self.norm.bias[...]).astype(dtype)


class PositionalConv(nnx.Module):
    """A grouped convolution over time with weight norm, whose output is added as position information.

    The weight of kernel position k is `scale[k] * direction[k] / |direction[k]|`; the checkpoints call the
    two `weight_g` and `weight_v`, or `parametrizations.weight.original0` and `original1`.
    """

    def __init__(self, config: HubertConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        width, size = config.hidden_size, config.num_conv_pos_embeddings
        self.groups = config.num_conv_pos_embedding_groups
        shape = (size, width // self.groups, width)
        direction = nnx.initializers.he_normal()(rngs.params(), shape, param_dtype)
        norm = jnp.sqrt(jnp.square(direction).sum((1, 2), keepdims=True))
        self.scale = nnx.Param(norm, axes=(None, None, None))
        self.direction = nnx.Param(direction, axes=(None, None, "mlp"))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype), axes=("mlp",))
        # "Same" padding; an even kernel gives one frame too many, which transformers cuts off the end.
        self.padding = (size // 2, size // 2 - (1 - size % 2))
        self.activation = config.feat_extract_activation
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        direction = self.direction[...].astype(jnp.float32)
        norm = jnp.sqrt(jnp.square(direction).sum((1, 2), keepdims=True))
        weight = self.scale[...].astype(jnp.float32) * direction / norm
        out = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            weight.astype(self.dtype),
            window_strides=(1,),
            padding=(self.padding,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return layers.activation(self.activation)(out + self.bias[...].astype(self.dtype))


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each with a residual; norms after (base) or before (large)."""

    def __init__(self, config: HubertConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
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


class Hubert(nnx.Module):
    """HuBERT without a head: `HubertModel` of transformers.

    dtype: of the matrix products and the frames; param_dtype: of the parameters; remat: a key of
    `layers.REMAT_POLICIES`, for those who train through the encoder.
    """

    def __init__(
        self,
        config: HubertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        layers.check_remat(remat)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, features = config.hidden_size, config.conv_dim[-1]
        self.config, self.dtype, self.remat = config, dtype, remat
        self.conv_layers = nnx.List([ConvLayer(config, i, **kwargs) for i in range(len(config.conv_dim))])
        self.feature_norm = (
            layers.LayerNorm(features, config.layer_norm_eps, param_dtype=param_dtype, rngs=rngs)
            if config.feat_proj_layer_norm
            else None
        )
        self.feature_projection = layers.linear(features, width, (None, "embed"), **kwargs)
        self.positional_conv = PositionalConv(config, **kwargs)
        self.norm = layers.LayerNorm(width, config.layer_norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: EncoderLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )

    def __call__(
        self,
        waveform: jax.Array,
        mask: jax.Array | None = None,
        *,
        layer: int | None = None,
        compat: Compat = None,
    ) -> tuple[jax.Array, jax.Array]:
        """waveform float [B, S] at 16 kHz, mask bool [B, S] -> (frames [B, T, D], mask bool [B, T]).

        The mask is 1 on samples and 0 on the padding after them; None means no padding.

        layer: the frames after that many layers, 0 being their input. None is all: the model's output, in
            pre-norm models after the final norm.
        compat: None gives each example of a padded batch the frames that it has alone.
            "transformers" counts padding in a base model's norm over time, as transformers does.
            "published" is that, and reads the mask the wrong way round, as SparQLe's code does: as many
            leading frames count as the example has PADDING (all but the last, when it has none).
        Raises ValueError when S is too short for one frame, or there is no such layer.
        """
        num_layers = self.config.num_hidden_layers
        if layer is not None and not 0 <= layer <= num_layers:
            raise ValueError(f"layer={layer} does not exist: this HuBERT has layers 0 to {num_layers}.")
        x, frames_mask = self.features(waveform, mask, compat=compat)
        x = self.contextualise(x, frames_mask, layer=layer)
        return x, jnp.ones(x.shape[:2], bool) if frames_mask is None else frames_mask

    def hidden_states(
        self, waveform: jax.Array, mask: jax.Array | None = None, *, compat: Compat = None
    ) -> jax.Array:
        """The frames of every layer, 0 to num_hidden_layers: [num_hidden_layers + 1, B, T, D]."""
        x, frames_mask = self.features(waveform, mask, compat=compat)
        x, keys_mask = self._add_positions(x, frames_mask)

        def step(encoder_layer, x, _):
            x = split_batch(encoder_layer(x, keys_mask))
            return x, x

        last, outputs = layers.scan(self.layers, step, x, remat=self.remat)
        if self.config.do_stable_layer_norm:
            last = self.norm(last)
        return jnp.concatenate([x[None], outputs[:-1], last[None]])

    def features(
        self, waveform: jax.Array, mask: jax.Array | None = None, *, compat: Compat = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Each frame for itself: convolutions and projection. Returns x [B, T, D] and the frames' mask.

        The mask is None where there is no padding. Pre-training masks frames between this and
        `contextualise`.
        """
        check_compat(compat, "transformers")
        if waveform.shape[1] < self.config.min_samples:
            raise ValueError(
                f"a waveform of {waveform.shape[1]} samples gives no frame; "
                f"at least {self.config.min_samples} samples (at 16 kHz) are needed: pad the batch."
            )
        if mask is None and compat == "published":
            mask = jnp.ones(waveform.shape, bool)  # which the published code reads as all padding
        first_mask = None
        if mask is not None and compat is None:
            num_first = self.config.num_frames(mask.sum(1), layers=1)
            length = self.config.num_frames(waveform.shape[1], layers=1)
            # At least one, so that an empty example divides by no zero.
            first_mask = jnp.arange(length) < jnp.maximum(num_first, 1)[:, None]

        x = waveform.astype(self.dtype)[..., None]
        with jax.named_scope("conv_layers"):
            for conv_layer in self.conv_layers:
                x = split_batch(conv_layer(x, first_mask))
        if self.feature_norm is not None:
            x = self.feature_norm(x)
        return self.feature_projection(x), None if mask is None else self._frames_mask(mask, compat)

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

    def _frames_mask(self, mask: jax.Array, compat: Compat) -> jax.Array:
        """bool [B, T]: which frames are made of real samples alone (or what `compat` makes of it)."""
        num_frames = self.config.num_frames(mask.shape[1])
        if compat == "published":
            # transformers marks the last real frame by its index, length - 1. Given padding for speech,
            # that is negative for up to one frame of padding, and indexes from the end: -2 for none.
            last = self.config.num_frames((~mask.astype(bool)).sum(1)) - 1
            return jnp.arange(num_frames) <= (last % num_frames)[:, None]
        return jnp.arange(num_frames) < self.config.num_frames(mask.sum(1))[:, None]
