"""LoRA: low-rank changes of some linear maps of a frozen language model, x W + s (x A) B; A and B train.

An LLM needs nothing for it: `add` replaces its linear maps after loading, and the frozen kernels keep their
paths. After Hu et al. 2021 and peft; s is alpha / rank, or alpha / sqrt(rank) (rank-stabilised).
"""

import functools
import json
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx

from sparqle_jax import flops as formulas
from sparqle_jax import layers

Rank = Annotated[int, pydantic.Field(ge=1)]
Alpha = Annotated[float, pydantic.Field(gt=0)]

_DRAWS = 0x10BA  # keeps LoRA's draws apart from the adapter's, which has the same key


class Config(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """LoRA's sizes.

    targets: which linear maps have it, by their names in this project (query, key, value, out, gate, up,
    down). dropout: of the input of A, in training. rslora: alpha is divided by sqrt(rank), not by rank.
    ranks, alphas: of targets that have others than the rest.
    """

    rank: Rank = 8
    alpha: Alpha = 16.0
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = ("query", "value")
    rslora: bool = False
    ranks: dict[str, Rank] = {}
    alphas: dict[str, Alpha] = {}

    @pydantic.model_validator(mode="after")
    def _of_targets(self) -> "Config":
        if strangers := sorted({*self.ranks, *self.alphas} - set(self.targets)):
            raise ValueError(f"ranks and alphas name {strangers}, which are not in targets={self.targets}")
        return self

    def __hash__(self) -> int:  # it is static in compiled programs
        return hash(json.dumps(self.model_dump(), sort_keys=True))

    def rank_of(self, target: str) -> int:
        return self.ranks.get(target, self.rank)

    def scale_of(self, target: str) -> float:
        rank = self.rank_of(target)
        return self.alphas.get(target, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


class Linear(nnx.Module):
    """A linear map with LoRA beside its kernel; both may be stacked, with leading dimensions.

    lora_a [in, rank] and lora_b [rank, out] are float32 parameters; products have the map's dtype.
    """

    def __init__(self, base: nnx.Linear, rank: int, scale: float, dropout: float, rngs: nnx.Rngs):
        *stack, d_in, d_out = base.kernel.shape
        axes_in, axes_out = base.kernel.get_metadata("axes")
        # torch's kaiming_uniform_ with a = sqrt(5), as in peft.
        a = jax.random.uniform(rngs.params(), (*stack, d_in, rank), minval=-1, maxval=1) / math.sqrt(d_in)
        self.kernel, self.bias, self.dtype = base.kernel, base.bias, base.dtype
        self.lora_a = nnx.Param(a, axes=(axes_in, None))
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, d_out)), axes=(None, axes_out))
        self.scale, self.dropout = scale, dropout
        self.dropout_key = nnx.data(None)  # see with_dropout

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        x = x.astype(self.dtype)
        out = x @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            out += self.bias[...].astype(self.dtype)
        key = None if self.dropout_key is None else self.dropout_key[...]
        low = layers.dropout(x, self.dropout, key) @ self.lora_a[...].astype(self.dtype)
        return out + self.scale * (low @ self.lora_b[...].astype(self.dtype))

    def merged(self) -> jax.Array:
        """The kernel with LoRA folded in, of the kernel's dtype and sharding."""

        def fold(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return (kernel + self.scale * (a @ b)).astype(kernel.dtype)

        kernel = self.kernel[...]
        return jax.jit(fold, out_shardings=kernel.sharding)(kernel, self.lora_a[...], self.lora_b[...])


def linears(llm: nnx.Module) -> dict[str, nnx.Linear | Linear]:
    """The linear maps that may have LoRA, by path ("layers.query"); the last name in it is the target's.

    Losses and generation read the LM head as a matrix, so it is none of them.
    """
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(llm)}
    return {
        path: module
        for path, module in modules.items()
        if isinstance(module, nnx.Linear | Linear) and path != "lm_head"
    }


def add(llm: nnx.Module, config: Config, rngs: nnx.Rngs) -> nnx.Module:
    """The LLM with new LoRA, which changes nothing yet: B is zero. The frozen arrays are shared with `llm`.

    Raises ValueError for targets that match nothing, with the names that there are, and for an LLM that has
    LoRA already.
    """
    if llm.lora is not None:
        raise ValueError(f"the LLM has LoRA already ({llm.lora!r}): fold it in first (lora.merge).")
    llm = nnx.clone(llm)
    found = {path: path.rpartition(".")[2] for path in linears(llm)}
    if unknown := [target for target in config.targets if target not in found.values()]:
        raise ValueError(
            f"LoRA's targets {unknown} match no linear map of the LLM; choose among "
            f"{sorted(set(found.values()))}."
        )
    for path, target in found.items():
        if target in config.targets:
            *parents, name = path.split(".")
            parent = functools.reduce(getattr, parents, llm)
            rank, scale = config.rank_of(target), config.scale_of(target)
            setattr(parent, name, Linear(getattr(parent, name), rank, scale, config.dropout, rngs))
    llm.lora = config
    return llm


def _with_lora(llm: nnx.Module) -> dict[str, Linear]:
    return {path: linear for path, linear in linears(llm).items() if isinstance(linear, Linear)}


def with_dropout(llm: nnx.Module, key: jax.Array) -> nnx.Module:
    """The LLM as it trains: with LoRA's dropout, drawn by `key` for each layer and linear map anew."""
    if llm.lora is None or not llm.lora.dropout:
        return llm
    llm, key = nnx.clone(llm), jax.random.fold_in(key, _DRAWS)
    for number, linear in enumerate(_with_lora(llm).values()):
        # Stacked as the parameters are, so that each layer is given its own.
        keys = jax.random.split(jax.random.fold_in(key, number), linear.lora_a.shape[:-2])
        linear.dropout_key = nnx.Variable(keys)
    return llm


def flops(llm: nnx.Module, rows: int) -> int:
    """Matrix products of LoRA in a training step, forward and backward, over so many tokens."""
    total = 0
    for linear in _with_lora(llm).values():
        *stack, d_in, rank = linear.lora_a.shape
        one = formulas.linear(rows, d_in, rank) + formulas.linear(rows, rank, linear.lora_b.shape[-1])
        total += math.prod(stack) * one
    return formulas.TRAINED * total


def merge(llm: nnx.Module) -> nnx.Module:
    """The LLM without LoRA that gives the same: folded into its kernels, in their dtype. For export."""
    if llm.lora is None:
        return llm
    state = dict(nnx.to_flat_state(nnx.state(llm)))
    for path, linear in _with_lora(llm).items():
        of_linear = tuple(path.split("."))
        state[*of_linear, "kernel"] = linear.kernel.replace(linear.merged())
        del state[*of_linear, "lora_a"], state[*of_linear, "lora_b"]
        dtype = linear.kernel.dtype

    def bare() -> nnx.Module:
        kwargs = dict(dtype=llm.dtype, param_dtype=dtype, remat=llm.remat)
        return type(llm)(llm.config, **kwargs, rngs=nnx.Rngs(0))

    return nnx.merge(nnx.graphdef(nnx.eval_shape(bare)), nnx.from_flat_state(list(state.items())))
