"""Whisper's encoder: waveform -> frames. All sizes, tiny to large-v3, by configuration.

Log-mel features every 10 ms, two convolutions that halve their number, then a Transformer with a norm before
each part, on a window of 30 seconds. After transformers' modeling_whisper.py and
feature_extraction_whisper.py.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers
from sparqle_jax.encoders import transformer
from sparqle_jax.sharding import split_batch
from sparqle_jax.tables import Rule, Table, linear, norm

PREFIXES = ("model.encoder.", "encoder.")
SAMPLE_RATE = 16_000
FFT, HOP = 400, 160  # samples that a mel frame reads, and from one to the next
FRAME_SAMPLES = 2 * HOP


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of transformers' configuration that the encoder reads, under their names there.

    pad_to_window: silence follows the recording up to the end of the window, and all frames of the window are
    computed and attended to, as the model was trained. False: only the batch's waveform is computed, and its
    padding is masked: short recordings cost less, but are unlike those that the model was trained on.
    Either way the frames are those of the recording: one for each 20 ms that it has begun.
    """

    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    activation_function: str = "gelu"
    max_source_positions: int = 1500
    pad_to_window: bool = True

    @classmethod
    def from_dict(cls, config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> Self:
        """Reads a transformers `config.json`, and its `preprocessor_config.json`: other features than
        Whisper's are a ValueError."""
        names = [field.name for field in dataclasses.fields(cls)]
        ours = cls(**{name: config[name] for name in names if name in config})
        needed = dict(n_fft=FFT, hop_length=HOP, feature_size=ours.num_mel_bins, dither=0)
        for key, value in needed.items():
            if preprocessor is not None and preprocessor.get(key, value) != value:
                raise ValueError(
                    f"a preprocessor with {key}={preprocessor[key]!r} is not supported: this encoder needs "
                    f"{key}={value}."
                )
        return ours

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        return self.encoder_layers

    @property
    def min_samples(self) -> int:
        return 1

    @property
    def max_samples(self) -> int:
        """The window: 480,000 samples, 30 seconds, for all published sizes."""
        return self.max_source_positions * FRAME_SAMPLES

    def num_frames(self, num_samples):
        """Frames of `num_samples` samples (int or array): the 20 ms that have begun."""
        return -(-num_samples // FRAME_SAMPLES)

    def flops(self, size: int, samples: int) -> int:
        """Forward: the Fourier transform and the mel bands, the convolutions, the layers."""
        if self.pad_to_window:
            samples = self.max_samples
        width, frames = self.d_model, self.num_frames(samples)
        computed = size * _computed_mel_frames(samples, self.max_samples)
        total = sum(flops.linear(computed, *basis.shape) for basis in _fourier_bases())
        total += flops.linear(computed, FFT // 2 + 1, self.num_mel_bins)
        total += flops.linear(size * _mel_frames(samples), 3 * self.num_mel_bins, width)
        rows = size * frames
        total += flops.linear(rows, 3 * width, width)
        layer = 4 * flops.linear(rows, width, width) + 2 * flops.linear(rows, width, self.encoder_ffn_dim)
        return total + self.encoder_layers * (layer + flops.attention(size, frames, frames, width))


def table(config: Config) -> Table:
    """The parameters, as the tensors of a transformers file."""
    return Table(
        rules=(
            Rule("conv1.kernel", "conv1.weight", (2, 1, 0)),
            Rule("conv1.bias", "conv1.bias"),
            Rule("conv2.kernel", "conv2.weight", (2, 1, 0)),
            Rule("conv2.bias", "conv2.bias"),
            Rule("positions", "embed_positions.weight"),
            *linear("layers.attention.query", "layers.{i}.self_attn.q_proj"),
            *linear("layers.attention.key", "layers.{i}.self_attn.k_proj"),
            *linear("layers.attention.value", "layers.{i}.self_attn.v_proj"),
            *linear("layers.attention.out", "layers.{i}.self_attn.out_proj"),
            *norm("layers.attention_norm", "layers.{i}.self_attn_layer_norm"),
            *linear("layers.up", "layers.{i}.fc1"),
            *linear("layers.down", "layers.{i}.fc2"),
            *norm("layers.mlp_norm", "layers.{i}.final_layer_norm"),
            *norm("norm", "layer_norm"),
        ),
        # The decoder, and the heads of fine-tuned models.
        ignored=(
            r"(model\.)?decoder\..*",
            r"proj_out\..*",
            r"projector\..*",
            r"classifier\..*",
            "layer_weights",
        ),
    )


def _mel_frames(samples):
    """Mel frames of so many samples (int or array): the 10 ms that have begun."""
    return -(-samples // HOP)


def _computed_mel_frames(samples: int, window: int) -> int:
    """Mel frames that read any of so many samples: up to two more begin after the last sample."""
    return min(_mel_frames(samples) + 2, _mel_frames(window))


def _fourier_bases() -> tuple[np.ndarray, np.ndarray]:
    """Cosines [201, 201] and sines [199, 199] of the Fourier transform of 400 real samples x: of the sums
    x[n] + x[400 - n], and of the differences."""
    angles = 2 * np.pi / FFT * np.outer(np.arange(FFT // 2 + 1), np.arange(FFT // 2 + 1))
    return np.cos(angles).astype(np.float32), np.sin(angles[1:-1, 1:-1]).astype(np.float32)


def _mel_filters(num_mel_bins: int) -> np.ndarray:
    """float32 [201, num_mel_bins]: the bands of Slaney's mel scale, of equal area, up to 8 kHz."""
    from transformers.audio_utils import mel_filter_bank  # a second that only Whisper's users pay

    options: dict[str, Any] = dict(norm="slaney", mel_scale="slaney")
    filters = mel_filter_bank(FFT // 2 + 1, num_mel_bins, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, **options)
    return filters.astype(np.float32)


def log_mel(waveform: jax.Array, num_mel_bins: int, window: int) -> jax.Array:
    """Whisper's features of waveforms float [B, S], which are 0 after a recording's end.

    Returns float32 [B, ceil(S / 160), num_mel_bins]: the first of those that WhisperFeatureExtractor gives
    for the recording and silence up to `window` samples. So a recording has the same ones whatever S is.
    """
    length = waveform.shape[1]
    computed = _computed_mel_frames(length, window)
    with jax.named_scope("log_mel"):
        end = HOP * (computed - 1) + FFT // 2  # of the last frame: frames are centred at multiples of HOP
        x = jnp.pad(waveform.astype(jnp.float32), ((0, 0), (0, min(end, window) - length)))
        x = jnp.pad(x, ((0, 0), (FFT // 2, max(end - window, 0))), mode="reflect")
        # A frame is five blocks of half a hop, and the next one begins two blocks later.
        blocks = x.reshape(x.shape[0], -1, HOP // 2)
        frames = [blocks[:, i : i + 2 * computed - 1 : 2] for i in range(2 * FFT // HOP)]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi / FFT * np.arange(FFT))
        x = jnp.concatenate(frames, -1) * hann.astype(np.float32)  # [B, computed, 400]

        # The Fourier transform is two matrix products: on TPUs these can be asked for in full float32, which
        # XLA's own transform can't, and halved by symmetry they are as exact as a fast transform.
        first, middle, second = x[..., 1 : FFT // 2], x[..., FFT // 2, None], x[..., : FFT // 2 : -1]
        cosines, sines = _fourier_bases()
        exactly = jax.lax.Precision.HIGHEST
        real = jnp.matmul(
            jnp.concatenate([x[..., :1], first + second, middle], -1), cosines, precision=exactly
        )
        imaginary = jnp.matmul(first - second, sines, precision=exactly)
        power = jnp.square(real) + jnp.pad(jnp.square(imaginary), ((0, 0), (0, 0), (1, 1)))
        mel = jnp.matmul(power, _mel_filters(num_mel_bins), precision=exactly)
        mel = jnp.log10(jnp.maximum(mel, 1e-10))
        mel = jnp.maximum(mel, mel.max((1, 2), keepdims=True) - 8)
        return ((mel + 4) / 4)[:, : _mel_frames(length)]


class Encoder(nnx.Module):
    """`WhisperModel.encoder` of transformers, with the features that it is given there.

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
        width, kinds = config.d_model, dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype, self.remat = config, dtype, remat

        def conv(channels: int, stride: int) -> nnx.Conv:
            return nnx.Conv(
                channels,
                width,
                3,
                strides=stride,
                padding=1,
                **kinds,
                kernel_init=nnx.initializers.he_normal(),
                kernel_metadata={"axes": (None, None, "embed")},
                bias_metadata={"axes": ("embed",)},
                rngs=rngs,
            )

        self.conv1, self.conv2 = conv(config.num_mel_bins, 1), conv(width, 2)
        positions = layers.sinusoids(jnp.arange(config.max_source_positions), width)
        self.positions = nnx.Param(positions.astype(param_dtype), axes=(None, "embed"))

        def make_layer(rngs: nnx.Rngs) -> transformer.EncoderLayer:
            heads = config.encoder_attention_heads
            return transformer.EncoderLayer(
                transformer.SelfAttention(width, heads, key_bias=False, **kinds, rngs=rngs),
                width,
                config.encoder_ffn_dim,
                activation=config.activation_function,
                norm_eps=1e-5,
                pre_norm=True,
                **kinds,
                rngs=rngs,
            )

        self.layers = layers.stack(make_layer, config.encoder_layers, rngs)
        self.norm = layers.LayerNorm(width, 1e-5, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, waveform: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """waveform float [B, S] at 16 kHz, mask bool [B, S] -> (frames [B, T, D], mask bool [B, T]).

        The mask is 1 on samples and 0 on the padding after them; None means no padding. A frame is real when
        its 20 ms begin within the recording. Frames of the window after S are computed, but not returned.
        Raises ValueError when S is 0, or longer than the window.
        """
        x, keys_mask, frames_mask = self._inputs(waveform, mask)
        x, _ = transformer.run(self.layers, x, keys_mask, remat=self.remat)
        return self.norm(x)[:, : frames_mask.shape[1]], frames_mask

    def hidden_states(
        self, waveform: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The frames of every layer, 0 to encoder_layers, [encoder_layers + 1, B, T, D]; their mask.

        The last are the model's output, after the final norm.
        """
        x, keys_mask, frames_mask = self._inputs(waveform, mask)
        last, outputs = transformer.run(self.layers, x, keys_mask, keep=True, remat=self.remat)
        frames = transformer.hidden_states(x, outputs, self.norm(last))
        return frames[:, :, : frames_mask.shape[1]], frames_mask

    def _inputs(
        self, waveform: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """The input of the layers [B, T, D]; the mask of their keys bool [B, T], None if all are real;
        the frames' mask bool [B, T']."""
        config, length = self.config, waveform.shape[1]
        if length > config.max_samples:
            raise ValueError(
                f"a waveform of {length} samples ({length / SAMPLE_RATE:.2f} s) is longer than the encoder's "
                f"window of {config.max_samples} samples ({config.max_samples / SAMPLE_RATE:.2f} s): cut the "
                "recording into segments, or pad the batch to less."
            )
        if length < config.min_samples:
            raise ValueError("a waveform of 0 samples gives no frame; at least 1 sample is needed.")
        frames_mask = jnp.ones((waveform.shape[0], config.num_frames(length)), bool)
        lengths = jnp.full(waveform.shape[0], length)
        if mask is not None:
            waveform, lengths = jnp.where(mask, waveform, 0), mask.sum(1)
            frames_mask = jnp.arange(config.num_frames(length)) < config.num_frames(lengths)[:, None]
        if config.pad_to_window:
            waveform = jnp.pad(waveform, ((0, 0), (0, config.max_samples - length)))
        x = log_mel(waveform, config.num_mel_bins, config.max_samples)
        mel_mask = keys_mask = None
        if mask is not None and not config.pad_to_window:
            mel_mask = (jnp.arange(x.shape[1]) < _mel_frames(lengths)[:, None])[..., None]
            keys_mask = frames_mask
        activation = layers.activation(config.activation_function)
        with jax.named_scope("convolutions"):
            x = activation(self.conv1(_without_padding(x, mel_mask)))
            x = activation(self.conv2(_without_padding(x, mel_mask)))
        positions = self.positions[: x.shape[1]].astype(self.dtype)
        return split_batch(x + positions), keys_mask, frames_mask


def _without_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeros after an example's end, as a convolution has them there when the example is alone."""
    return x if mask is None else jnp.where(mask, x, 0)
