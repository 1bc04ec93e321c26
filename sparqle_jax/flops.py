"""How many floating-point operations a step takes: counted in the program, and from formulas alone.

Both count matrix products and convolutions, 2 per multiplication and addition, and nothing else: the rest
is a few per cent, and runs elsewhere on the chip. They agree on what the model needs; `count` tells what the
program computes again beyond that. Model FLOP utilisation divides by the time and the chips' peak.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from sparqle_jax.adapters.qformer import QFormerConfig
from sparqle_jax.encoders.hubert import HubertConfig
from sparqle_jax.llms.decoder import DecoderConfig
from sparqle_jax.model import Aligner, SpeechLLM


@dataclasses.dataclass(frozen=True)
class Flops:
    """model: of the forward and the backward pass. rematerialised: of what the backward pass computes again
    because it was not kept."""

    model: int = 0
    rematerialised: int = 0

    @property
    def total(self) -> int:
        return self.model + self.rematerialised

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.rematerialised + other.rematerialised)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.model * times, self.rematerialised * times)


def count(jaxpr: core.ClosedJaxpr) -> Flops:
    """Of one run of a program, on all devices together; of `jax.jit(f).trace(...).jaxpr`, say.

    Results that nothing uses don't count, a loop counts as often as it runs, and of a condition the branch
    with most. Raises ValueError for products where it is not known how often they run: in a `while_loop`
    or a Pallas kernel.
    """
    program, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _count(program, rematerialised=False)


def _count(jaxpr: core.Jaxpr, rematerialised: bool) -> Flops:
    return sum((_count_equation(equation, rematerialised) for equation in jaxpr.eqns), Flops())


def _count_equation(equation: core.JaxprEqn, rematerialised: bool) -> Flops:
    # What a checkpoint computes again JAX puts under this name; an equation inside of another one has only
    # the names since then.
    rematerialised = rematerialised or "rematted_computation" in str(equation.source_info.name_stack)
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS:
        flops = _PRODUCTS[name](equation)
        return Flops(rematerialised=flops) if rematerialised else Flops(model=flops)
    parts = [_count(inner, rematerialised) for inner in core.jaxprs_in_params(params)]
    if name == "scan":
        return sum(parts, Flops()) * params["length"]
    if name == "cond":
        return max(parts, key=lambda branch: branch.total)
    if name == "shard_map":  # inside, shapes are those of one device
        axes = params["manual_axes"] if "manual_axes" in params else params["newly_manual_axes"]
        return sum(parts, Flops()) * math.prod(params["mesh"].shape[axis] for axis in axes)
    flops = sum(parts, Flops())
    if flops.total and name in ("while", "pallas_call"):
        raise ValueError(
            f"the program has matrix products in a {name}, and how often they run can't be told from it; "
            "a loop of known length must be written with jax.lax.scan or fori_loop(0, n, ...) to be counted."
        )
    return flops


def _dot_general(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _conv(equation: core.JaxprEqn) -> int:
    """Padding counts as data. Of an input with gaps (the gradient of one with strides), gaps do not."""
    kernel = equation.invars[1].aval.shape
    features = equation.params["dimension_numbers"].rhs_spec[0]
    terms = math.prod(kernel) // kernel[features]
    return 2 * math.prod(equation.outvars[0].aval.shape) * terms // math.prod(equation.params["lhs_dilation"])


_PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _conv}


# --- From formulas alone ------------------------------------------------------------------------------

# How often a product is computed, forward and backward, where every gradient is wanted, where that of a
# frozen weight is not, and where none is. Attention has no weights: both of its operands have gradients.
_TRAINED, _FROZEN, _FORWARD = 3, 2, 1


def analytic(
    model: Aligner | SpeechLLM, batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]
) -> dict[str, int]:
    """What one training step must compute, by part of the model; their sum is the step's.

    The model and the batch may be abstract (`nnx.eval_shape`): shapes are all that is read, as far as they
    are padded. Every position counts, real or padding, seen by attention or not; an LM head has the
    positions that `losses.token_loss` gives it, a multiple of 32 (or all, when there are fewer). Nothing is
    computed twice. A batch with `frames` needs no encoder.
    """
    if isinstance(model, Aligner):
        return _aligner(model, batch)
    if isinstance(model, SpeechLLM):
        return _sparqle(model, batch)
    raise TypeError(f"only an Aligner and a SpeechLLM are trained here, not a {type(model).__name__}.")


def _aligner(model: Aligner, batch: Mapping) -> dict[str, int]:
    config, features = model.adapter.config, model.heads.speech_projection.out_features
    encoder, (size, frames) = _encoder(model.encoder.config, batch)
    queries, width, text = config.num_queries, config.hidden_size, batch["text"].shape[1]

    # STC trains what it compares. STM alone compares only to draw its negatives.
    comparing = _TRAINED if "stc" in model.losses else _FORWARD if "stm" in model.losses else 0
    # STG reads no more than keys and values of the queries, but a layer is computed as a whole.
    speaking = _TRAINED if "stg" in model.losses else comparing
    heads = comparing * (
        _linear(size * queries, width, features)
        + _linear(size, width, features)  # of a text, its first token
        + _linear(size * queries, features, size)  # the similarities
    )
    parts = {
        "encoder": encoder,
        "adapter, speech": speaking * _qformer(config, size, queries=queries, frames=frames),
        "adapter, text": comparing * _qformer(config, size, text=text),
    }
    if "stm" in model.losses:
        parts["adapter, pairs"] = _TRAINED * _qformer(
            config, 3 * size, queries=queries, text=text, frames=frames
        )
        heads += _TRAINED * _linear(3 * size * queries, width, 2)
    if "stg" in model.losses:
        parts["adapter, text to generate"] = _TRAINED * _qformer(config, size, text=text, cached=queries)
        positions = size * _in_blocks(text - 1)
        head = _linear(positions, width, width) + _linear(positions, width, config.vocab_size)
        parts["adapter, LM head"] = _TRAINED * head
    return parts | {"heads": heads}


def _sparqle(model: SpeechLLM, batch: Mapping) -> dict[str, int]:
    adapter, llm = model.adapter.config, model.llm.config
    encoder, (size, frames) = _encoder(model.encoder.config, batch)
    queries, answer = adapter.num_queries, batch["answer"].shape[1]
    length = batch["before"].shape[1] + queries + batch["after"].shape[1] + answer - 1
    linear, attention = _decoder(llm, size, length)
    positions = size * _in_blocks(answer)
    return {
        "encoder": encoder,
        "adapter": _TRAINED * _qformer(adapter, size, queries=queries, frames=frames),
        "projection": _TRAINED * _linear(size * queries, adapter.hidden_size, llm.hidden_size),
        "llm": _FROZEN * linear + _TRAINED * attention,
        "LM head": _FROZEN * _linear(positions, llm.hidden_size, llm.vocab_size),
    }


def _encoder(config: HubertConfig, batch: Mapping) -> tuple[int, tuple[int, int]]:
    """The encoder's forward pass, and how many examples and frames come out of it."""
    if "frames" in batch:
        return 0, batch["frames"].shape[:2]
    size, samples = batch["waveform"].shape
    return _hubert(config, size, samples), (size, config.num_frames(samples))


def _hubert(config: HubertConfig, size: int, samples: int) -> int:
    """Forward: the convolutions, the projection, the convolution of positions, the layers."""
    flops, channels = 0, 1
    for i, (kernel, out) in enumerate(zip(config.conv_kernel, config.conv_dim, strict=True)):
        flops += _linear(size * config.num_frames(samples, layers=i + 1), kernel * channels, out)
        channels = out
    frames, width = config.num_frames(samples), config.hidden_size
    rows = size * frames
    flops += _linear(rows, channels, width)
    group = width // config.num_conv_pos_embedding_groups
    flops += _linear(rows, config.num_conv_pos_embeddings * group, width)
    layer = 4 * _linear(rows, width, width) + 2 * _linear(rows, width, config.intermediate_size)
    return flops + config.num_hidden_layers * (layer + _attention(size, frames, frames, width))


def _qformer(
    config: QFormerConfig, size: int, *, queries: int = 0, text: int = 0, frames: int = 0, cached: int = 0
) -> int:
    """Forward: `size` examples of `queries` and `text` tokens, which see `cached` tokens as well."""
    width, tokens, layers = config.hidden_size, queries + text, config.num_hidden_layers
    flops = layers * 4 * _linear(size * tokens, width, width)
    flops += layers * _attention(size, tokens, tokens + cached, width)
    flops += layers * 2 * _linear(size * tokens, width, config.intermediate_size)
    reading = -(-layers // config.cross_attention_freq) if queries else 0
    return flops + reading * _cross_attention(config, size, frames)


def _cross_attention(config: QFormerConfig, size: int, frames: int) -> int:
    """Forward: the queries read the frames."""
    width, queries = config.hidden_size, config.num_queries
    return (
        2 * _linear(size * queries, width, width)
        + 2 * _linear(size * frames, config.encoder_width, width)
        + _attention(size, queries, frames, width)
    )


def _decoder(config: DecoderConfig, size: int, length: int) -> tuple[int, int]:
    """Forward: the layers' linear maps, and their attention."""
    width, rows = config.hidden_size, size * length
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    linear = 2 * _linear(rows, width, heads) + 2 * _linear(rows, width, kv_heads)
    linear += 3 * _linear(rows, width, config.intermediate_size)
    layers = config.num_hidden_layers
    return layers * linear, layers * _attention(size, length, length, heads)


def _linear(rows: int, d_in: int, d_out: int) -> int:
    return 2 * rows * d_in * d_out


def _attention(size: int, queries: int, keys: int, width: int) -> int:
    """The scores of queries with keys and the sums of values, over all heads: `width` in all."""
    return 2 * _linear(size * queries, keys, width)


def _in_blocks(positions: int, block: int = 32) -> int:
    """As many positions as whole blocks of `losses.token_loss` have."""
    block = min(block, positions)
    return -(-positions // block) * block
