"""Several hosts that train together: one process each, all running the same program.

The first host decides what is a matter of files and clocks, and does what is done once; the others are told.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def join(where: Sequence[str]) -> None:
    """Makes this process one of several. To be called before anything else of JAX is.

    where: nothing on TPU pods, GKE and Slurm, where JAX finds out by itself; else the address of the first
    process (host:port), the number of processes, and the number of this one.
    Raises ValueError for anything else, RuntimeError when the others can't be reached.
    """
    if len(where) not in (0, 3):
        raise ValueError(
            f"--distributed {' '.join(where)}: give nothing, or ADDRESS:PORT NUMBER_OF_PROCESSES NUMBER."
        )
    # SIGTERM is the training loop's: see `train`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if where:
        address, number, index = where
        if not (number.isdecimal() and index.isdecimal() and int(index) < int(number)):
            raise ValueError(f"--distributed: {index} is no number of one of {number} processes, from 0.")
        jax.distributed.initialize(address, int(number), int(index))
    else:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this host is the one that writes and prints."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints on the first host."""
    if is_first():
        print(text, flush=True)


def broadcast(number: int) -> int:
    """The number that the first host has. All hosts must call this."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def max_over_hosts(number: int) -> int:
    """The largest of the numbers that the hosts have. All hosts must call this."""
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def all_gather(array: jax.Array | np.ndarray) -> np.ndarray:
    """All of an array, also of one that is split over hosts; all of them must call this then."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = _gather(array.sharding.mesh)(array)
    return np.asarray(array)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
