"""Reads a compiled program: its collectives, and gradients of weights that do not train.

Read from its text, `compiled.as_text()`: XLA's HLO as it runs on one device. TPU's compiler writes some
things in ways of its own, which are handled here: a reduce-scatter is a fusion of an all-reduce and a slice;
a collective that runs beside other work is cut up over several fusions, each of which shows it; what goes to
other slices is sent and received by the host; and loops do not say how often they run.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from flax import nnx

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program.

    times: how often it runs, per run of the program. result: bytes of its result on one device, each time.
    group: how many devices exchange data (over slices: how many slices). crosses: whether over slices, by
    the data centre's network. source: JAX's name for the operation that it belongs to.
    """

    kind: str
    times: int
    result: int
    group: int
    crosses: bool
    source: str

    @property
    def sent(self) -> int:
        """Bytes that one device sends per run of the program, with rings (the least that is possible)."""
        others = self.group - 1
        if self.kind == "all-reduce":  # a reduce-scatter, then an all-gather
            each = 2 * self.result * others // self.group
        elif self.kind == "reduce-scatter":
            each = self.result * others
        elif self.kind in ("collective-permute", "collective-broadcast"):
            each = self.result
        else:
            each = self.result * others // self.group
        return self.times * each


@dataclasses.dataclass(frozen=True)
class Census:
    """unknown_loops: names of loops with collectives that run an unknown number of times; once is counted."""

    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]


def census(text: str) -> Census:
    """All collectives of a compiled program, in the order of its text; of a condition, the larger branch."""
    return _Reader(_read(text)).census()


def frozen_gradients(
    text: str, frozen: Iterable[tuple[int, ...]], trained: Iterable[tuple[int, ...]] = ()
) -> list[str]:
    """The products whose results have the shape of a frozen weight, by name, in a program for one device.

    Such a product is the gradient of that weight, which nobody wants: there should be none. frozen and
    trained: the shapes that `weight_shapes` gives. What has the shape of a trained weight as well can't be
    told apart and is left out, as are biases. The order of the sizes does not matter, nor do sizes of 1. The
    caller chooses a batch in which no activation has the shape of a weight.
    """
    shapes = {_shape_key(shape) for shape in frozen} - {_shape_key(shape) for shape in trained}
    found = []
    for instructions in _read(text).computations.values():
        for instruction in instructions.values():
            if instruction.opcode in ("dot", "convolution"):
                ((_, sizes),) = _arrays(instruction.type)
                if _shape_key(sizes) in shapes:
                    found.append(f"{instruction.source or instruction.name} {list(sizes)}")
    return found


def weight_shapes(state: nnx.State) -> set[tuple[int, ...]]:
    """The shapes of all weights with two dimensions or more; of stacked layers, of one layer and of all."""
    shapes = set()
    for _, variable in nnx.to_flat_state(state):
        shape = tuple(variable.get_value().shape)
        single = shape[len(shape) - len(variable.get_metadata("axes")) :]
        if sum(size > 1 for size in single) > 1:
            shapes |= {shape, single}
    return shapes


# --- Reading the text ---------------------------------------------------------------------------------


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool

    @property
    def source(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def index(self) -> int:
        """The index of a get-tuple-element."""
        return int(re.search(r"index=(\d+)", self.attributes)[1])

    def computations(self, *attributes: str) -> list[str]:
        """The names of the computations that these attributes hold: one, or several in braces."""
        pattern = rf"(?:{'|'.join(attributes)})=(?:%?([\w.\-]+)|\{{([^}}]*)\}})"
        found = re.findall(pattern, self.attributes)
        return [name.strip().lstrip("%") for one, several in found for name in (one or several).split(",")]


class _Program(NamedTuple):
    computations: dict[str, dict[str, _Instruction]]
    entry: str
    devices: int


# Parentheses up to three deep: a type may be a tuple of tuples of arrays, whose layouts have their own.
_FLAT = r"[^()]*"
_NESTED = rf"{_FLAT}(?:\({_FLAT}\){_FLAT})*"
_DEEP = rf"{_FLAT}(?:\({_NESTED}\){_FLAT})*"
_INSTRUCTION = re.compile(rf"\s+(ROOT )?%?([\w.\-]+) = (\({_DEEP}\)|\S+) ([\w\-]+)\(({_DEEP})\)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")


def _read(text: str) -> _Program:
    computations, entry = {}, ""
    instructions: dict[str, _Instruction] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            root, name, type_, opcode, operands, attributes = match.groups()
            operands = re.findall(r"%([\w.\-]+)", operands) or [operands]
            instructions[name] = _Instruction(name, type_, opcode, operands, attributes, root is not None)
        elif match := _COMPUTATION.match(line):
            instructions = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation.")
    return _Program(computations, entry, math.prod(map(int, counts)))


class _Scope(NamedTuple):
    """A computation; if it is a loop's body or condition, also the loop and the computation around it."""

    name: str
    instructions: dict[str, _Instruction]
    loop: _Instruction | None = None
    around: "_Scope | None" = None

    @property
    def root(self) -> _Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.root)

    def uncopied(self, name: str) -> _Instruction:
        """The instruction of this name, or the one of which it is a copy."""
        instruction = self.instructions[name]
        while instruction.opcode == "copy":
            instruction = self.instructions[instruction.operands[0]]
        return instruction

    def place(self, name: str) -> int | None:
        """Where in the state of this loop it is, if it is a part of it or a copy of one."""
        instruction = self.uncopied(name)
        if instruction.opcode != "get-tuple-element":
            return None
        source = self.instructions[instruction.operands[0]]
        return instruction.index if source.opcode == "parameter" else None


class _Reader:
    """Walks through a program from its entry, and counts."""

    def __init__(self, program: _Program):
        self.program = program
        self.chains: set[str] = set()
        self.unknown: list[str] = []

    def census(self) -> Census:
        return Census(tuple(self._computation(self._scope(self.program.entry), 1)), tuple(self.unknown))

    def _scope(self, name: str) -> _Scope:
        return _Scope(name, self.program.computations[name])

    def _computation(self, scope: _Scope, times: int) -> list[Collective]:
        instructions = scope.instructions
        results = {
            instruction.operands[0]: instruction.type
            for instruction in instructions.values()
            if instruction.opcode.endswith("-done")
        }
        found = []
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in _KINDS:
                type_ = results.get(instruction.name, instruction.type)
                scatters = scope.name.startswith("all-reduce-scatter")
                found += self._collective(instruction, kind, type_, times, scatters)
            elif instruction.opcode == "recv":
                found += _from_other_slices(instruction, times)
            elif instruction.opcode == "while":
                found += self._loop(instruction, scope, times)
            elif instruction.opcode == "conditional":
                branches = instruction.computations(
                    "branch_computations", "true_computation", "false_computation"
                )
                found += max(
                    (self._computation(self._scope(branch), times) for branch in branches), key=_total
                )
            else:
                for called in instruction.computations("calls", "to_apply", "called_computations"):
                    found += self._computation(self._scope(called), times)
        return found

    def _collective(
        self, instruction: _Instruction, kind: str, type_: str, times: int, scatters: bool
    ) -> list[Collective]:
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain and chain[1] in self.chains:
            return []
        if chain:
            self.chains.add(chain[1])
        group = _group(instruction, self.program.devices)
        if group == 1:
            return []
        result = _bytes(type_)
        if scatters:
            kind, result = "reduce-scatter", result // group
        return [Collective(kind, times, result, group, False, instruction.source)]

    def _loop(self, loop: _Instruction, scope: _Scope, times: int) -> list[Collective]:
        condition, body = self._inside(loop, scope)
        trips = self._trips(loop, scope, condition, body)
        found = self._computation(body, times * (1 if trips is None else trips))
        if trips is None and found:
            self.unknown.append(loop.source or loop.name)
        return found

    def _inside(self, loop: _Instruction, scope: _Scope) -> tuple[_Scope, _Scope]:
        """The condition and the body of a loop."""
        names = [name for part in ("condition", "body") for name in loop.computations(part)]
        condition, body = (_Scope(name, self.program.computations[name], loop, scope) for name in names)
        return condition, body

    def _trips(self, loop: _Instruction, scope: _Scope, condition: _Scope, body: _Scope) -> int | None:
        """The number of times a loop runs: as it says, or if it counts from one constant up to another."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        compare, initial, final = condition.root, scope.instructions[loop.operands[0]], body.root
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter = condition.place(compare.operands[0])
        if counter is None or initial.opcode != "tuple" or final.opcode != "tuple":
            return None
        step = body.instructions[final.operands[counter]]
        if step.opcode != "add" or body.place(step.operands[0]) != counter:
            return None
        start = self._constant(initial.operands[counter], scope)
        stop = self._constant(compare.operands[1], condition)
        by = self._constant(step.operands[1], body)
        if start is None or stop is None or not by:
            return None
        return max(0, math.ceil((stop - start) / by))

    def _constant(self, name: str, scope: _Scope) -> int | None:
        """The value of a whole constant, also by way of loops that hand it on unchanged; or else None."""
        instruction = scope.uncopied(name)
        if instruction.opcode == "constant":
            value = instruction.operands[0]
            return int(value) if re.fullmatch(r"-?\d+", value) else None
        if instruction.opcode != "get-tuple-element":
            return None
        source = scope.instructions[instruction.operands[0]]
        if source.opcode == "while":  # what that loop leaves
            loop, around = source, scope
        elif (
            source.opcode == "parameter" and scope.loop is not None
        ):  # what the loop has that this is part of
            loop, around = scope.loop, scope.around
        else:
            return None
        initial, (_, body) = around.instructions[loop.operands[0]], self._inside(loop, around)
        if initial.opcode != "tuple" or body.root.opcode != "tuple":
            return None
        place = instruction.index
        unchanged = body.place(body.root.operands[place]) == place
        return self._constant(initial.operands[place], around) if unchanged else None


def _from_other_slices(recv: _Instruction, times: int) -> list[Collective]:
    """A collective between slices of TPUs, from the half of it that receives."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', recv.attributes)
    if transfer is None:
        return []  # data from the host
    source = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', recv.attributes)[1]
    # "{1,2}x{0:3}": slices and their devices; or one device of each: {{100000,200000},{100001,200001}}
    target = re.search(r'_xla_megascale_target="?\{+(\d[\d,]*)', recv.attributes)
    if target is None:
        raise ValueError(f"can't read which slices take part in {source}: {recv.attributes[:400]}")
    kind = transfer[1].lower().replace("_", "-")
    group = len(target[1].split(","))
    if kind == "one-to-one":
        kind, group = "collective-permute", 2
    result = _bytes(recv.type.partition(", u32[]")[0])  # what follows are handles
    return [Collective(kind, times, result, group, True, source)]


def _group(instruction: _Instruction, devices: int) -> int:
    """The number of devices that take part in a collective together."""
    attributes = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{[^ ]*\})\}", attributes):
        apart = [pair for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pair[0] != pair[1]]
        return 2 if apart else 1
    if re.search(r"replica_groups=\{\}", attributes):
        return devices
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(counted[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'?(\w+)'?=(\d+)", mesh[1]))
        # An axis, or a part of one: 'x' or 'x':(1)2, of which 2 is the part's size.
        grouped = re.findall(r"'?(\w+)'?(?::\(\d+\)(\d+))?(?:,|$)", mesh[2])
        return math.prod(int(part or axes[axis]) for axis, part in grouped)
    raise ValueError(f"can't read which devices take part in {instruction.name}: {attributes[:300]}")


def _arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a type: bf16[4,8]{1,0} -> [("bf16", (4, 8))]."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", type_)
    return [(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found]


def _bytes(type_: str) -> int:
    bits = 0
    for dtype, sizes in _arrays(type_):
        width = re.search(r"\d+", dtype)  # of bf16, f8e4m3fn, s32; pred has none, and takes a byte
        bits += math.prod(sizes) * (0 if dtype == "token" else int(width[0]) if width else 8)
    return bits // 8


def _shape_key(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _total(collectives: list[Collective]) -> int:
    return sum(collective.sent for collective in collectives)
