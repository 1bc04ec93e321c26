"""The mesh of devices, and where parameters and batches lie on it.

One table says on which mesh axis each named dimension of a parameter lies. Training, tests and ahead-of-time
compilation all make their mesh here.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")  # over which the examples of a batch are split

# Names of parameter dimensions (metadata `axes`) -> mesh axis. What is not here is not split.
MESH_AXIS_OF = {"embed": "fsdp", "heads": "model", "mlp": "model", "vocab": "model"}


def make_mesh(sizes: tuple[int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, model of these sizes; one of them may be -1: what is left.

    Of several TPU slices, each has its part of the data axis, so that between slices, where the network is
    slow, nothing but gradients travels. Raises ValueError when the sizes do not multiply to the number of
    devices, and when the slices do not divide the data axis.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _whole_shape(sizes, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        data, *inner = shape
        if data % slices:
            raise ValueError(
                f"a mesh of {_named(shape)} can't lie on {slices} slices: data={data} is not a multiple of "
                "them; fsdp and model stay inside a slice."
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(np.asarray(grid), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _whole_shape(sizes: tuple[int, int, int], num_devices: int) -> tuple[int, int, int]:
    """The sizes, with the one that is -1 computed."""
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"a mesh of {_named(sizes)}: sizes must be positive, and at most one of them -1.")
    shape = tuple(num_devices // given if size == -1 else size for size in sizes)
    if math.prod(shape) != num_devices:
        needs = f"needs a multiple of {given}" if -1 in sizes else f"needs {given}"
        raise ValueError(
            f"a mesh of {_named(sizes)} {needs} devices, but there are {num_devices}: the three sizes "
            "(mesh.data, mesh.fsdp, mesh.model; -1 is what is left) must multiply to the number of devices."
        )
    return shape


def _named(sizes: tuple[int, ...]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [B, ...] over data and fsdp; B must be a multiple of `batch_parts`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(x: jax.Array) -> jax.Array:
    """Inside a program for a mesh (`jax.set_mesh`): keeps x [B, ...] split by examples and by nothing else.

    The compiler then gathers weights for the examples of a device, and never activations. Without a mesh, or
    for a batch that can't be split, it is x itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def state_sharding(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The sharding of every parameter of a (possibly abstract) state, by MESH_AXIS_OF.

    Raises ValueError, naming all of them, for dimensions that their mesh axis does not divide, and for
    parameters with two dimensions on the same mesh axis.
    """
    problems = []

    def sharding(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        shape = variable.get_value().shape
        axes = variable.get_metadata("axes")
        axes = (None,) * (len(shape) - len(axes)) + tuple(axes)  # stacked layers: a dimension in front
        spec = [MESH_AXIS_OF.get(axis) for axis in axes]
        name = ".".join(map(str, path))
        for size, axis in zip(shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                problems.append(f"  {name} {shape}: {size} is not a multiple of {axis}={mesh.shape[axis]}")
            if axis is not None and spec.count(axis) > 1:
                problems.append(f"  {name} {shape}: {size} is not the only dimension on {axis} ({axes})")
        return variable.replace(NamedSharding(mesh, PartitionSpec(*([] if problems else spec))))

    flat = [(path, sharding(path, variable)) for path, variable in nnx.to_flat_state(state)]
    if problems:
        raise ValueError(
            "these parameters can't be split over the mesh; choose other sizes of its axes:\n"
            + "\n".join(problems)
        )
    return nnx.from_flat_state(flat)


def gathered(shardings: nnx.State) -> nnx.State:
    """The same shardings, but whole over fsdp: for parameters that are few, and gathered once a step."""

    def gather(sharding: NamedSharding) -> NamedSharding:
        axes = [None if axis == "fsdp" else axis for axis in sharding.spec]
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))

    return jax.tree.map(gather, shardings)


def like_parameters(tree: Any, parameters: nnx.State, shardings: nnx.State, mesh: Mesh) -> Any:
    """The shardings of a tree such as an optimizer's state: copies of the parameters lie as those do.

    What is no copy of them (a count, say) is on every device.
    """
    structure = jax.tree.structure(parameters)

    def is_copy(part: Any) -> bool:
        return jax.tree.structure(part) == structure

    return jax.tree.map(lambda part: shardings if is_copy(part) else replicated(mesh), tree, is_leaf=is_copy)
