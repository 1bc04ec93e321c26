"""Floating-point operations of a step: counted in the program, and from formulas alone.

Both count matrix products and convolutions, 2 per multiplication and addition, and nothing else: the rest
is a few per cent, and runs elsewhere on the chip. They agree on what the model needs; `count` tells what the
program computes again beyond that. Model FLOP utilisation divides by the time and the chips' peak.
"""

import dataclasses
import math

from jax.extend import core
from jax.interpreters import partial_eval


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
    """Counts one run of a program, on all devices together; of `jax.jit(f).trace(...).jaxpr`, say.

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


# --- Formulas --------------------------------------------------------------------------------------------

# How often a product is computed, forward and backward, where every gradient is wanted, where that of a
# frozen weight is not, and where none is. Attention has no weights: both of its operands have gradients.
TRAINED, FROZEN, FORWARD = 3, 2, 1


def linear(rows: int, d_in: int, d_out: int) -> int:
    """Operations of a linear map of so many rows."""
    return 2 * rows * d_in * d_out


def attention(size: int, queries: int, keys: int, width: int) -> int:
    """The scores of queries with keys and the sums of values, over all heads: `width` in all."""
    return 2 * linear(size * queries, keys, width)


def in_blocks(positions: int, block: int = 32) -> int:
    """The number of positions in whole blocks of `losses.token_loss`."""
    block = min(block, positions)
    return -(-positions // block) * block
