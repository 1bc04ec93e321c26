"""Where parameters lie on a mesh of devices: one table from their dimension names to mesh axes."""

import math

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "model")

# Names of parameter dimensions (metadata `axes`) -> mesh axis. What is not here is not split.
MESH_AXIS_OF = {"embed": "fsdp", "heads": "model", "mlp": "model", "vocab": "model"}


def make_mesh(shape: tuple[int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, model of these sizes; ValueError when they are not all the devices."""
    devices = jax.devices() if devices is None else devices
    if math.prod(shape) != len(devices):
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(
            f"a mesh of {sizes} needs {math.prod(shape)} devices, but there are {len(devices)}: "
            "the three sizes must multiply to the number of devices."
        )
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def state_sharding(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The sharding of every parameter of a (possibly abstract) state, by MESH_AXIS_OF.

    Raises ValueError, naming all of them, for dimensions that their mesh axis does not divide.
    """
    problems = []

    def sharding(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        shape = variable.get_value().shape
        axes = variable.get_metadata("axes")
        axes = (None,) * (len(shape) - len(axes)) + tuple(axes)  # stacked layers: a dimension in front
        spec = [MESH_AXIS_OF.get(axis) for axis in axes]
        for size, axis in zip(shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                name = ".".join(map(str, path))
                problems.append(f"  {name} {shape}: {size} is not a multiple of {axis}={mesh.shape[axis]}")
        return variable.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    flat = [(path, sharding(path, variable)) for path, variable in nnx.to_flat_state(state)]
    if problems:
        raise ValueError(
            "these parameters can't be split over the mesh; choose other sizes of its axes:\n"
            + "\n".join(problems)
        )
    return nnx.from_flat_state(flat)
