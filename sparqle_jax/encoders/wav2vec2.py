"""wav2vec 2.0: waveform -> frames. HuBERT has the same model, and WavLM all of it but the attention.

Seven convolutions turn 16 kHz samples into one feature every 20 ms; a convolution over time adds positions;
then a Transformer. Base models normalise the first convolution over time (group norm) and each layer after
its residual (post-norm), large ones every convolution over channels (layer norm) and each layer before
(pre-norm). After transformers' modeling_wav2vec2.py and modeling_hubert.py.
"""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.compat import check_compat
from sparqle_jax.encoders import transformer
from sparqle_jax.sharding import split_batch
from sparqle_jax.tables import Rule, Table, linear, norm

PREFIXES = ("wav2vec2.",)

# Tensors of pre-training and of fine-tuned models' heads.
_IGNORED = (
    r"masked_spec_embed",
    r"lm_head\..*",
    r"projector\..*",
    r"classifier\..*",
    r"layer_weights",
    r"quantizer\..*",
    r"project_(hid|q)\..*",
    # Of speaker verification.
    r"tdnn\..*",
    r"feature_extractor\.(weight|bias)",
    r"objective\..*",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of transformers' configurations that inference reads, under their names there.

    normalize: each waveform to mean 0 and variance 1 ("variance", as transformers' do_normalize), by its
    largest absolute sample ("peak", as SparQLe's published code), or not at all.
    compat: None gives each example of a padded batch the frames that it has alone. "transformers" counts
    padding in a base model's norm over time, as transformers does. "published" is that, and reads the mask
    the wrong way round, as SparQLe's code does: as many leading frames count as the example has PADDING (all
    but the last, when it has none).
    """

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
    normalize: Literal["variance", "peak"] | None = None
    compat: Literal["transformers", "published"] | None = None

    def __post_init__(self):
        check_compat(self.compat, "transformers")
        if not len(self.conv_dim) == len(self.conv_stride) == len(self.conv_kernel):
            raise ValueError(
                "conv_dim, conv_stride and conv_kernel must have one entry per convolution; got "
                f"{len(self.conv_dim)}, {len(self.conv_stride)} and {len(self.conv_kernel)} entries."
            )
        if self.feat_extract_norm not in ("group", "layer"):
            raise ValueError(f"feat_extract_norm must be 'group' or 'layer', got {self.feat_extract_norm!r}.")

    @classmethod
    def from_dict(cls, config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> Self:
        """Reads a transformers `config.json`, and its `preprocessor_config.json`: where that leaves something
        out, it has transformers' default. Without a preprocessor, waveforms stay as they are."""
        for key in ("conv_pos_batch_norm", "adapter_attn_dim", "add_adapter"):
            if config.get(key):
                raise ValueError(f"an encoder with {key}={config[key]!r} is not supported.")
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: config[name] for name in names if name in config}
        if preprocessor is not None and preprocessor.get("do_normalize", True):
            values["normalize"] = "variance"
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    @property
    def width(self) -> int:
        return self.hidden_size

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

    @property
    def max_samples(self) -> None:
        return None

    def flops(self, size: int, samples: int) -> int:
        """Forward: the convolutions, the projection, the convolution of positions, the layers."""
        total, channels = 0, 1
        for i, (kernel, out) in enumerate(zip(self.conv_kernel, self.conv_dim, strict=True)):
            total += flops.linear(size * self.num_frames(samples, layers=i + 1), kernel * channels, out)
            channels = out
        frames, width = self.num_frames(samples), self.hidden_size
        rows = size * frames
        total += flops.linear(rows, channels, width)
        group = width // self.num_conv_pos_embedding_groups
        total += flops.linear(rows, self.num_conv_pos_embeddings * group, width)
        layer = 4 * flops.linear(rows, width, width) + 2 * flops.linear(rows, width, self.intermediate_size)
        return total + self.num_hidden_layers * (layer + flops.attention(size, frames, frames, width))


_RULES = (
    Rule("features.conv_layers.{i}.conv.kernel", "feature_extractor.conv_layers.{i}.conv.weight", (2, 1, 0)),
    Rule("features.conv_layers.{i}.conv.bias", "feature_extractor.conv_layers.{i}.conv.bias"),
    *norm("features.conv_layers.{i}.norm", "feature_extractor.conv_layers.{i}.layer_norm"),
    *norm("features.norm", "feature_projection.layer_norm"),
    *linear("features.projection", "feature_projection.projection"),
    Rule(
        "positional_conv.scale",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        (2, 1, 0),
        others=("encoder.pos_conv_embed.conv.weight_g",),
    ),
    Rule(
        "positional_conv.direction",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        (2, 1, 0),
        others=("encoder.pos_conv_embed.conv.weight_v",),
    ),
    Rule("positional_conv.bias", "encoder.pos_conv_embed.conv.bias"),
    *norm("norm", "encoder.layer_norm"),
    *linear("layers.attention.query", "encoder.layers.{i}.attention.q_proj"),
    *linear("layers.attention.key", "encoder.layers.{i}.attention.k_proj"),
    *linear("layers.attention.value", "encoder.layers.{i}.attention.v_proj"),
    *linear("layers.attention.out", "encoder.layers.{i}.attention.out_proj"),
    *norm("layers.attention_norm", "encoder.layers.{i}.layer_norm"),
    *linear("layers.up", "encoder.layers.{i}.feed_forward.intermediate_dense"),
    *linear("layers.down", "encoder.layers.{i}.feed_forward.output_dense"),
    *norm("layers.mlp_norm", "encoder.layers.{i}.final_layer_norm"),
)


def table(config: Config) -> Table:
    """The parameters, as the tensors of a transformers file."""
    return Table(rules=_RULES, ignored=_IGNORED)


def normalise(waveform: jax.Array, mask: jax.Array | None, how: str | None) -> jax.Array:
    """Waveforms float [B, S] as `Config.normalize` says, each over its real samples; silence stays."""
    if how is None:
        return waveform
    waveform = waveform.astype(jnp.float32)
    real = jnp.ones(waveform.shape, bool) if mask is None else mask.astype(bool)
    if how == "peak":
        peak = jnp.abs(waveform).max(1, keepdims=True, where=real, initial=0)
        return jnp.where(real, waveform / jnp.where(peak > 0, peak, 1), 0)
    count = jnp.maximum(real.sum(1, keepdims=True), 1)
    mean = waveform.sum(1, keepdims=True, where=real) / count
    variance = jnp.square(waveform - mean).sum(1, keepdims=True, where=real) / count
    return jnp.where(real, (waveform - mean) * jax.lax.rsqrt(variance + 1e-7), 0)


class ConvLayer(nnx.Module):
    """One convolution of the feature extractor: convolution, norm over time, channels or none, GELU."""

    def __init__(
        self, config: Config, index: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
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


class Features(nnx.Module):
    """The convolutions and the projection to the encoder's width: each frame for itself."""

    def __init__(self, config: Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.conv_layers = nnx.List(ConvLayer(config, i, **kwargs) for i in range(len(config.conv_dim)))
        channels = config.conv_dim[-1]
        self.norm = (
            layers.LayerNorm(channels, config.layer_norm_eps, param_dtype=param_dtype, rngs=rngs)
            if config.feat_proj_layer_norm
            else None
        )
        self.projection = layers.linear(channels, config.hidden_size, (None, "embed"), **kwargs)

    def __call__(
        self, waveform: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """waveform float [B, S], mask bool [B, S] -> (x [B, T, D], the frames' mask bool [B, T]).

        The mask is None where there is no padding. Raises ValueError when S is too short for one frame.
        """
        config = self.config
        if waveform.shape[1] < config.min_samples:
            raise ValueError(
                f"a waveform of {waveform.shape[1]} samples gives no frame; "
                f"at least {config.min_samples} samples (at 16 kHz) are needed: pad the batch."
            )
        waveform = normalise(waveform, mask, config.normalize)
        if mask is None and config.compat == "published":
            mask = jnp.ones(waveform.shape, bool)  # which the published code reads as all padding
        first_mask = None
        if mask is not None and config.compat is None:
            num_first = config.num_frames(mask.sum(1), layers=1)
            length = config.num_frames(waveform.shape[1], layers=1)
            # At least one, so that an empty example divides by no zero.
            first_mask = jnp.arange(length) < jnp.maximum(num_first, 1)[:, None]
        x = waveform.astype(self.dtype)[..., None]
        with jax.named_scope("conv_layers"):
            for conv_layer in self.conv_layers:
                x = split_batch(conv_layer(x, first_mask))
        if self.norm is not None:
            x = self.norm(x)
        return self.projection(x), None if mask is None else self._frames_mask(mask)

    def _frames_mask(self, mask: jax.Array) -> jax.Array:
        """bool [B, T]: which frames are made of real samples alone (or as `compat` has it)."""
        config = self.config
        num_frames = config.num_frames(mask.shape[1])
        if config.compat == "published":
            # transformers marks the last real frame by its index, length - 1. Given padding for speech,
            # that is negative for up to one frame of padding, and indexes from the end: -2 for none.
            last = config.num_frames((~mask.astype(bool)).sum(1)) - 1
            return jnp.arange(num_frames) <= (last % num_frames)[:, None]
        return jnp.arange(num_frames) < config.num_frames(mask.sum(1))[:, None]


class PositionalConv(nnx.Module):
    """A grouped convolution over time with weight norm, whose output is added as position information.

    The weight of kernel position k is `scale[k] * direction[k] / |direction[k]|`; the checkpoints call the
    two `weight_g` and `weight_v`, or `parametrizations.weight.original0` and `original1`.
    """

    def __init__(self, config: Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
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
        # A convolution for each group: one of groups takes cuDNN and CPUs more than twice as long.
        out = jnp.concatenate(
            [
                jax.lax.conv_general_dilated(
                    *group,
                    window_strides=(1,),
                    padding=(self.padding,),
                    dimension_numbers=("NWC", "WIO", "NWC"),
                )
                for group in zip(
                    jnp.split(x.astype(self.dtype), self.groups, -1),
                    jnp.split(weight.astype(self.dtype), self.groups, -1),
                    strict=True,
                )
            ],
            -1,
        )
        return layers.activation(self.activation)(out + self.bias[...].astype(self.dtype))


class Encoder(nnx.Module):
    """The model without a head: `Wav2Vec2Model` and `HubertModel` of transformers.

    dtype: of the matrix products and the frames; param_dtype: of the parameters; remat: a key of
    `layers.REMAT_POLICIES`, for those who train through the encoder.
    """

    TRAINED = ()
    Attention: type[transformer.SelfAttention] = transformer.SelfAttention

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
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config, self.dtype, self.remat = config, dtype, remat
        self.features = Features(config, **kinds, rngs=rngs)
        self.positional_conv = PositionalConv(config, **kinds, rngs=rngs)
        self.norm = layers.LayerNorm(width, eps, param_dtype=param_dtype, rngs=rngs)

        def make_layer(rngs: nnx.Rngs) -> transformer.EncoderLayer:
            return transformer.EncoderLayer(
                self.Attention(width, config.num_attention_heads, **kinds, rngs=rngs),
                width,
                config.intermediate_size,
                activation=config.hidden_act,
                norm_eps=eps,
                pre_norm=config.do_stable_layer_norm,
                **kinds,
                rngs=rngs,
            )

        self.layers = layers.stack(make_layer, config.num_hidden_layers, rngs)

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
        x = self._add_positions(x, frames_mask)
        last, outputs = self._run(x, frames_mask, keep=True)
        frames = transformer.hidden_states(x, outputs, self._finish(last))
        return frames, jnp.ones(x.shape[:2], bool) if frames_mask is None else frames_mask

    def contextualise(
        self, x: jax.Array, frames_mask: jax.Array | None, *, layer: int | None = None
    ) -> jax.Array:
        """Makes frames [B, T, D] of what `features` returns: positions, then `layer` layers (None is all)."""
        x, _ = self._run(self._add_positions(x, frames_mask), frames_mask, num=layer)
        return self._finish(x) if layer in (None, self.config.num_hidden_layers) else x

    def _add_positions(self, x: jax.Array, frames_mask: jax.Array | None) -> jax.Array:
        """The input of the layers [B, T, D]."""
        if frames_mask is not None:
            x = jnp.where(frames_mask[..., None], x, 0)  # as an example's end, when it is alone
        with jax.named_scope("positional_conv"):
            x = x + self.positional_conv(x)
        return x if self.config.do_stable_layer_norm else self.norm(x)

    def _run(
        self, x: jax.Array, frames_mask: jax.Array | None, **options
    ) -> tuple[jax.Array, jax.Array | None]:
        bias = self._bias(x.shape[1])
        return transformer.run(self.layers, x, frames_mask, bias, remat=self.remat, **options)

    def _bias(self, num_frames: int) -> jax.Array | None:
        """The bias of the layers' scores by distance: none."""
        return None

    def _finish(self, x: jax.Array) -> jax.Array:
        """The model's output, from that of its last layer."""
        return self.norm(x) if self.config.do_stable_layer_norm else x
