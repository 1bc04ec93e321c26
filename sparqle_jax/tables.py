"""One table per part says which checkpoint tensor is which parameter; it is read in both directions.

Tensors are read one at a time, only the part that this host's devices hold, cast, and placed on the mesh: on
the host there is never more than one tensor in passing.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from sparqle_jax import hosts
from sparqle_jax.sharding import state_sharding
from sparqle_jax.tensors import READ_BYTES, Tensor

MakeModule = Callable[[nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A parameter and the tensor that it comes from.

    target: path of the parameter. source: name of the tensor; further spellings follow in `others`.
    `{i}` is a layer's number: in both, where layers are a list; in the source alone, where the parameter
    holds all layers, stacked, or `every` so many-th from the first on. axes: the tensor's dimensions in the
    parameter's order, None for the same.
    """

    target: str
    source: str
    axes: tuple[int, ...] | None = None
    others: tuple[str, ...] = ()
    every: int = 1

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.source, *self.others)


@dataclasses.dataclass(frozen=True)
class Table:
    """All rules of a tower.

    ignored: patterns of tensors that are known and not needed. copies: tensors that are tied to another
    one, copy -> original: written for the programs that expect them; read where the original is missing.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def within(self, part: str) -> "Table":
        """The same table for a module that is this `part` ("adapter.") of a larger one."""
        rules = tuple(dataclasses.replace(rule, target=part + rule.target) for rule in self.rules)
        return dataclasses.replace(self, rules=rules)

    def __add__(self, other: "Table") -> "Table":
        return Table(self.rules + other.rules, self.ignored + other.ignored, {**self.copies, **other.copies})


def linear(target: str, source: str) -> tuple[Rule, Rule]:
    return Rule(f"{target}.kernel", f"{source}.weight", (1, 0)), Rule(f"{target}.bias", f"{source}.bias")


def norm(target: str, source: str) -> tuple[Rule, Rule]:
    # bert-base-uncased still has TensorFlow's names, gamma and beta.
    return (
        Rule(f"{target}.scale", f"{source}.weight", others=(f"{source}.gamma",)),
        Rule(f"{target}.bias", f"{source}.bias", others=(f"{source}.beta",)),
    )


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor and its place: parameter path, the layer's number if stacked, spellings, order of axes."""

    path: tuple
    layer: int | None
    spellings: tuple[str, ...]
    axes: tuple[int, ...] | None


def _expand(table: Table, shapes: Mapping[tuple, tuple[int, ...]]) -> Iterator[Entry]:
    """The table's rules for the parameters that a model has, one entry per tensor."""
    names = {".".join(map(str, path)): path for path in shapes}
    for rule in table.rules:
        numbered, stacked = "{i}" in rule.target, "{i}" in rule.source
        pattern = re.escape(rule.target).replace(r"\{i\}", r"(\d+)")
        for name, path in names.items():
            match = re.fullmatch(pattern, name)
            if not match:
                continue
            if stacked and not numbered:
                layers = [(i, i * rule.every) for i in range(shapes[path][0])]
            else:
                layers = [(None, match[1] if numbered else None)]
            for layer, i in layers:
                spellings = tuple(s.replace("{i}", str(i)) for s in rule.spellings)
                yield Entry(path, layer, spellings, rule.axes)


def load(
    make: MakeModule,
    table: Table,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    mesh: Mesh | None = None,
    ignored: Iterable[str] = (),
    fresh: Iterable[str] = (),
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """Makes a module and fills it from checkpoint tensors, each cast to its parameter's dtype.

    make: builds the module from `rngs`; it is only traced, never run, but for the parameters that match a
    pattern of `fresh`, which keep their random values. mesh: over which the parameters are split, by
    `sharding.state_sharding`; without one they go to the first device. name: what to call the checkpoint in
    errors. ignored: patterns of tensors that may be there besides the table's.

    Raises ValueError listing every problem at once: tensors that are missing, unexpected or of the wrong
    shape, and parameters that no rule or several rules set.
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    paths = [path for path, _ in nnx.to_flat_state(abstract)]
    kept = {path for path in paths if any(re.fullmatch(p, ".".join(map(str, path))) for p in fresh)}
    shardings = _shardings(abstract, mesh)
    # Problems are found before anything is computed.
    state = load_state(abstract, table, tensors, name=name, mesh=mesh, ignored=ignored, kept=kept)
    values = _fresh_values(make, rngs, kept, shardings) if kept else {}
    filled = [(path, v.replace(values[path]) if path in kept else v) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def load_state(
    abstract: nnx.State,
    table: Table,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    mesh: Mesh | None = None,
    ignored: Iterable[str] = (),
    kept: Collection[tuple] = (),
) -> nnx.State:
    """The state, possibly of shapes alone, with the values of checkpoint tensors; arguments as for `load`.

    kept: paths of parameters that no tensor sets; they stay as they are.
    """
    variables = dict(nnx.to_flat_state(abstract))
    shapes = {path: variable.get_value().shape for path, variable in variables.items()}
    entries = [entry for entry in _expand(table, shapes) if entry.path not in kept]
    tensors = dict(tensors)
    for copy, original in table.copies.items():
        if copy in tensors and original not in tensors:
            tensors[original] = tensors.pop(copy)
    sources = _match(table, tensors, entries, shapes, kept, tuple(ignored), name)

    shardings, values = _shardings(abstract, mesh), {}
    for entry, source in zip(entries, sources, strict=True):
        shape, dtype = shapes[entry.path], variables[entry.path].get_value().dtype
        where = shardings[entry.path]
        if entry.layer is None:
            values[entry.path] = _read(tensors[source], entry.axes, shape, dtype, where)
            continue
        if entry.layer == 0:
            values[entry.path] = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=where)(shape, dtype)
        one = _read(tensors[source], entry.axes, shape[1:], dtype, _without_first(where))
        stacked = _put_layer(values[entry.path], one, entry.layer, where)
        # Reading would run ahead of writing, and hold many tensors at once.
        values[entry.path] = jax.block_until_ready(stacked)
    filled = [(path, v if path in kept else v.replace(values[path])) for path, v in variables.items()]
    return nnx.from_flat_state(filled)


def _shardings(abstract: nnx.State, mesh: Mesh | None) -> dict[tuple, jax.sharding.Sharding]:
    """Where each parameter is to lie: split over the mesh, or without one on the first device."""
    if mesh is None:
        where = SingleDeviceSharding(jax.local_devices()[0])
        return {path: where for path, _ in nnx.to_flat_state(abstract)}
    flat = nnx.to_flat_state(state_sharding(abstract, mesh))
    return {path: variable.get_value() for path, variable in flat}


def _match(
    table: Table,
    tensors: Mapping[str, Tensor],
    entries: list[Entry],
    shapes: Mapping[tuple, tuple[int, ...]],
    kept: Collection[tuple],
    ignored: tuple[str, ...],
    name: str,
) -> list[str]:
    """The tensor of every entry; ValueError with all that does not fit."""
    problems, sources = [], []
    for entry in entries:
        found = [spelling for spelling in entry.spellings if spelling in tensors]
        parameter = ".".join(map(str, entry.path))
        if len(found) != 1:
            what = "is given twice, as " + " and ".join(found) if found else "is missing"
            problems.append(f"  {entry.spellings[0]} {what} (for {parameter})")
        sources.append(found[0] if found else "")
        if found:
            shape = shapes[entry.path] if entry.layer is None else shapes[entry.path][1:]
            if entry.axes is not None:
                shape = tuple(shape[entry.axes.index(k)] for k in range(len(shape)))
            if shape != tensors[found[0]].shape:
                problems.append(f"  {found[0]} has shape {tensors[found[0]].shape}, needed is {shape}")
    times_set = Counter((entry.path, entry.layer) for entry in entries)
    problems += [
        f"  {'.'.join(map(str, path))} is set by {count} rules"
        for (path, _), count in times_set.items()
        if count > 1
    ]
    unset = shapes.keys() - set(kept) - {path for path, _ in times_set}
    problems += [f"  no tensor sets {'.'.join(map(str, path))}" for path in sorted(unset, key=str)]
    problems += [
        f"  {copy} differs from {original}, though the configuration ties them (tie_word_embeddings)"
        for copy, original in table.copies.items()
        if copy in tensors and original in sources and not _equal(tensors[copy], tensors[original])
    ]
    known = (*table.ignored, *map(re.escape, table.copies), *ignored)
    used = set(sources)
    problems += [
        f"  {key} is unexpected"
        for key in tensors
        if key not in used and not any(re.fullmatch(pattern, key) for pattern in known)
    ]
    if problems:
        raise ValueError(
            f"{name} does not fit the model ({len(problems)} problems): is it of the same sizes and family "
            "as the configuration?\n" + "\n".join(problems)
        )
    return sources


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, some rows at a time."""
    if a.shape != b.shape:
        return False
    rows = max(1, READ_BYTES // (4 * int(np.prod(a.shape[1:]))))
    others = (slice(None),) * (len(a.shape) - 1)
    count = a.shape[0]
    parts = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    return all(np.array_equal(a.read((part, *others)), b.read((part, *others))) for part in parts)


def _read(
    tensor: Tensor, axes: tuple[int, ...] | None, shape: tuple[int, ...], dtype: DTypeLike, where
) -> jax.Array:
    """The tensor as an array: each host reads what its devices hold, casting a few MiB at a time."""
    order = tuple(range(len(shape))) if axes is None else axes

    @functools.cache  # devices that hold the same part ask for it one by one
    def read_part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        index = tuple(slice(*b) for b in bounds)
        out = np.empty([s.stop - s.start for s in index], dtype)
        if not out.ndim:
            out[...] = tensor.read(())
            return out
        in_file = out.transpose(np.argsort(order))  # a view of `out`, dimensions as in the file
        ranges = [index[order.index(k)] for k in range(len(order))]
        rows = max(1, READ_BYTES // max(1, in_file[:1].nbytes))
        for start in range(0, len(in_file), rows):
            stop = min(start + rows, len(in_file))
            offset = ranges[0].start
            in_file[start:stop] = tensor.read((slice(offset + start, offset + stop), *ranges[1:]))
        return out

    def read(index: tuple[slice, ...]) -> np.ndarray:
        return read_part(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, where, read)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put_layer(stacked: jax.Array, one: jax.Array, layer: jax.Array, where) -> jax.Array:
    """Writes one layer's parameter into the stack, in place."""
    stacked = jax.lax.dynamic_update_index_in_dim(stacked, one, layer, 0)
    return jax.lax.with_sharding_constraint(stacked, where)


def _without_first(sharding):
    """The sharding of one layer of a stacked parameter."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding


def _fresh_values(make: MakeModule, rngs: nnx.Rngs, kept: set[tuple], shardings) -> dict[tuple, jax.Array]:
    """The random values of the parameters in `kept`; the others are never made."""
    graphdef, state = nnx.split(rngs)

    def make_kept(state):
        module = make(nnx.merge(graphdef, state))
        return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(module)) if path in kept}

    return jax.jit(make_kept, out_shardings={path: shardings[path] for path in kept})(state)


def export(state: nnx.State, table: Table) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under the checkpoint's names and in its shapes: the table backwards.

    Parameters outside the table are left out; copies that the checkpoint keeps are written too. All hosts
    call this together, and get all.
    """
    values = {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
    tensors = {}

    @functools.lru_cache(maxsize=1)  # its layers are entries that follow one another
    def whole(path: tuple) -> np.ndarray:
        return hosts.all_gather(values[path])

    for entry in _expand(table, {path: value.shape for path, value in values.items()}):
        value = whole(entry.path) if entry.layer is None else whole(entry.path)[entry.layer]
        if entry.axes is not None:
            value = value.transpose(np.argsort(entry.axes))
        tensors[entry.spellings[0]] = value.copy(order="C")  # savers write memory as it lies
    copies = {copy: tensors[of] for copy, of in table.copies.items() if of in tensors}
    return tensors | copies
