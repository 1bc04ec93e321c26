"""Checkpoints of training: what trains, the optimizer's state and the step, by Orbax.

Each says of which run it is (configuration, data, frozen towers), and has a checksum of every array, so that
one that was damaged on disk is found and the one before it used. It is written while training goes on,
appears only when it is whole, and can be read on any mesh and number of hosts.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from sparqle_jax import commands, hosts

Identity = dict[str, Any]  # of a run, as JSON: what must be the same when it goes on


class CheckpointError(Exception):
    """A checkpoint could not be written, or there are some and none can be used."""


DAMAGED = 4  # the exit status of this module's command for a checkpoint that is not as it was written


class Checkpoints:
    """The checkpoints in a folder: the last `keep`, and the one with the lowest test loss.

    identity: of this run; a checkpoint of another is an error. All hosts make one, and call its methods
    together. Use as a context manager: at the end it waits for what is still being written.
    Raises CheckpointError when the newest can't be read, or none of those that are there is whole.
    """

    def __init__(self, folder: epath.Path, identity: Identity, *, keep: int):
        self.folder, self.identity = folder.resolve(), json.loads(json.dumps(identity))
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["valid_loss"], n=1, keep_checkpoints_without_metrics=False
        )
        latest, problem = self._find_latest() if hosts.is_first() else (-1, "")
        if hosts.max_over_hosts(bool(problem)):
            raise CheckpointError(
                problem or f"the checkpoints in {folder} can't be used; see the first host."
            )
        self._latest = hosts.broadcast(latest)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )
        self._writing: Any = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        failed = None
        for end in (self.wait, self._checkpointer.close):  # Orbax raises a failed write once more
            try:
                end()
            except Exception as error:
                failed = failed or self._failed(self._latest, error)
        if failed is not None and kind is None:
            raise failed

    def restore(self, state: Any) -> Any | None:
        """The newest state that is whole, on the devices where the abstract `state` says; or None.

        Raises CheckpointError, listing the differences, when it is of another run.
        """
        if self._latest < 0:
            return None
        there = self._checkpointer.metadata(self._latest).custom_metadata["identity"]
        if wrong := differences(there, self.identity):
            raise CheckpointError(
                f"the checkpoints in {self.folder} are of another run: {'; '.join(wrong)}. Choose another "
                "folder with --set run=FOLDER, or delete that one."
            )
        return self._checkpointer.load(self._latest, abstract_state=state)

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Begins to write the state; the next save, or the end, waits until that is done.

        metrics: "valid_loss", where it was measured. Raises CheckpointError, for this or the one before.
        """
        self.wait()
        if step == self._latest:
            return
        self._check_room(step, state)
        try:
            self._writing = self._checkpointer.save_async(
                step,
                state,
                force=True,
                metrics=metrics,
                custom_metadata={"identity": self.identity, "checksums": checksums(state)},
            )
        except Exception as error:
            raise self._failed(step, error) from error
        self._latest = step

    def wait(self) -> None:
        """Waits until what is being written is whole. Raises CheckpointError when it can't be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except Exception as error:
                raise self._failed(self._latest, error) from error

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {error}. Those before it "
            "are as they were: see to it that there is room and the folder can be written to; the same "
            "command then goes on from the last of them."
        )

    def _check_room(self, step: int, state: Any) -> None:
        """On one's own disk an error at once, instead of a disk that is full for others as well."""
        if not self._is_local():
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = hosts.broadcast(min(shutil.disk_usage(self.folder).free >> 10, 2**31 - 1))  # KiB
        if free < 1.1 * needed / 1024 + 64:  # and what Orbax writes beside the arrays
            sizes = f"No space left: it takes {needed / 1e6:.1f} MB and the disk has {free >> 10} MiB left"
            raise self._failed(step, OSError(sizes))

    def _is_local(self) -> bool:
        return "://" not in str(self.folder)

    def _find_latest(self) -> tuple[int, str]:
        """The newest step whose checkpoint is as it was written, -1 for none; and what is wrong if that can't
        be told. Damaged ones are set aside."""
        steps = steps_in(self.folder)
        for step in reversed(steps):
            status, told = _read_apart(self.folder / str(step))
            if status == 0:
                return step, ""
            if status != DAMAGED:
                return -1, f"the checkpoint of step {step} in {self.folder} can't be read: {told}"
            aside = self.folder / f"damaged-{step}"
            if aside.exists():
                aside.rmtree()
            (self.folder / str(step)).rename(aside)
            print(
                f"WARNING: the checkpoint of step {step} in {self.folder} is damaged ({told}): it is now "
                f"{aside.name}, and the one before it is used.",
                file=sys.stderr,
                flush=True,
            )
        if steps:
            return -1, f"no checkpoint in {self.folder} is whole. To begin anew, delete that folder."
        return -1, ""


def steps_in(folder: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending, without those that are still being written."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(name) for name in names if name.isdecimal())
    if "://" in str(folder):  # in a bucket, one that is not whole has its name already
        steps = [step for step in steps if (folder / str(step) / "commit_success.txt").exists()]
    return steps


def check_room(folder: epath.Path, size: int, number: int) -> None:
    """Raises ValueError when a local disk has no room for so many checkpoints of `size` bytes; those that are
    there already count."""
    if "://" in str(folder):
        return
    kept = len(steps_in(folder))
    free, needed = shutil.disk_usage(commands.nearest(folder)).free, max(0, number - kept) * size
    if free < needed:
        raise ValueError(
            f"{folder} needs room for {number} checkpoints of {size / 1e6:.4g} MB, {kept} of which are "
            f"there, but the disk has {free / 1e6:.4g} MB left: make room, choose another folder (--set "
            "run=), or keep fewer (--set STAGE.keep=)."
        )


def _read_apart(folder: epath.Path) -> tuple[int, str]:
    """Reads a checkpoint in a process of its own, on a CPU: its exit status, and what it says.

    Orbax has all hosts read together, and would have them wait for one that fails.
    """
    read = subprocess.run(
        [sys.executable, "-m", "sparqle_jax.checkpoint", str(folder)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in read.stderr.splitlines() if line.strip()]
    return read.returncode, lines[-1] if lines else f"its reader ended with status {read.returncode}"


def check(folder: epath.Path) -> None:
    """Reads a checkpoint. Raises ValueError, or whatever Orbax does, when it is not as it was written."""
    metadata = ocp.metadata(folder)
    written = metadata.custom_metadata["checksums"]
    abstract = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metadata.metadata)
    found = checksums(ocp.load(folder, abstract_state=abstract))
    changed = sorted(k for k in written.keys() | found.keys() if written.get(k) != found.get(k))
    if changed:
        raise ValueError(f"changed since it was written: {', '.join(changed[:3])}")


def checksums(tree: Any) -> dict[str, int]:
    """A checksum of every array, by its path: of its bits and their places, whatever devices hold them."""
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    sums = _checksums(list(leaves.values()))
    return {name: int(value) for name, value in zip(leaves, sums, strict=True)}


def _name(path: tuple) -> str:
    """A path in a tree of attributes, keys and NNX variables, alike for a state and for what Orbax loads."""
    keys = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(key for key in keys if key not in ("value", "raw_value"))


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(array) for array in arrays]


def _checksum(array: jax.Array) -> jax.Array:
    """uint32: the sum, in any order, of a hash of each element's bits and its place; modulo 2 ** 32."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    # The finaliser of MurmurHash3: a sum that is linear in the bits may not see weights doubled.
    mixed = bits.astype(jnp.uint32) ^ (place * jnp.uint32(2654435761))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


def fingerprint(module: nnx.Module) -> str:
    """A hash of a module's parameters: names, shapes, dtypes and values, whatever devices hold them."""
    state = nnx.state(module)
    shapes = {_name(path): (x.shape, str(x.dtype)) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return hashlib.sha256(json.dumps([shapes, checksums(state)], sort_keys=True).encode()).hexdigest()[:16]


def differences(there: Any, wanted: Any, key: str = "") -> list[str]:
    """The differences of two JSON values: "key is this there, that here".

    Of things with a hash that is the same nothing else counts, such as where they come from.
    """
    if isinstance(there, dict) and isinstance(wanted, dict):
        if "hash" in there and there["hash"] == wanted.get("hash"):
            return []
        return [
            difference
            for k in sorted(there.keys() | wanted.keys())
            for difference in differences(there.get(k), wanted.get(k), f"{key}.{k}")
        ]
    return [] if there == wanted else [f"{key.removeprefix('.')} is {there!r} there, {wanted!r} here"]


def main(folder: str) -> int:
    """0 for a checkpoint that is as it was written, DAMAGED for one that is not; says why."""
    try:
        check(epath.Path(folder))
    except (PermissionError, ConnectionError, TimeoutError, MemoryError):
        raise  # these are not the checkpoint's fault
    except Exception as error:  # whatever a damaged file makes of its reader
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return DAMAGED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
