"""Checkpoints: whole or not at all, of this run or an error."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from sparqle_jax import checkpoint
from sparqle_jax.checkpoint import CheckpointError, Checkpoints, checksums
from sparqle_jax.sharding import batch_sharding, make_mesh, replicated

IDENTITY = {"config": {"stage2": {"optim": {"lr": 1e-4}}}, "llm": "0123"}


def make_state(value: float = 0.0, mesh=None) -> dict:
    state = {"weights": jnp.arange(4000.0).reshape(40, 100) + value, "step": jnp.int32(value)}
    if mesh is None:
        return state
    return jax.device_put(state, {"weights": batch_sharding(mesh), "step": replicated(mesh)})


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def open_checkpoints(folder, keep: int = 2, identity=IDENTITY) -> Checkpoints:
    return Checkpoints(epath.Path(folder), identity, keep=keep)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of the steps 1, 2 and 3."""
    with open_checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step))
    return tmp_path


def steps_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_state_comes_back_on_another_mesh(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, make_state(7, make_mesh((8, 1, 1))))
    like = make_state(0, make_mesh((2, 1, 1), jax.devices()[:2]))
    with open_checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(abstract(like))
    assert state["weights"].sharding == like["weights"].sharding
    np.testing.assert_array_equal(state["weights"], make_state(7)["weights"])
    assert int(state["step"]) == 7


def test_without_a_checkpoint_there_is_none(tmp_path):
    with open_checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None


def test_the_last_and_the_best_are_kept(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], 1):
            checkpoints.save(step, make_state(step), {"valid_loss": loss})
    assert steps_in(tmp_path) == {"2", "4", "5"}
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(6, make_state(6))
    assert steps_in(tmp_path) == {"2", "6"}


def damage_bytes(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("harm", [damage_bytes, truncate, lambda file: file.unlink()])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(saved, harm, capsys):
    files = (file for file in (saved / "3" / "state").rglob("*") if file.is_file())
    harm(max(files, key=lambda file: file.stat().st_size))
    with open_checkpoints(saved) as checkpoints:
        state = checkpoints.restore(abstract(make_state()))
        assert int(state["step"]) == 2
        assert "WARNING: the checkpoint of step 3" in capsys.readouterr().err
        checkpoints.save(3, make_state(3))  # its place is free again
    assert {"damaged-3", "3", "2"} <= steps_in(saved)


def test_where_none_is_whole_training_does_not_begin_anew_by_itself(saved):
    for file in saved.rglob("manifest.ocdbt"):
        truncate(file)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole. To begin anew, delete"):
        open_checkpoints(saved)
    assert steps_in(saved) == {"damaged-1", "damaged-2", "damaged-3"}


def test_a_reader_that_is_killed_says_nothing_of_the_checkpoint(saved, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(CheckpointError, match=r"step 3 in .* can't be read: its reader ended with status -9"):
        open_checkpoints(saved)
    assert steps_in(saved) == {"1", "2", "3"}


def test_values_that_changed_are_noticed_though_the_files_can_be_read(saved, monkeypatch):
    """As written, but for one number: what a disk without checksums may return."""
    with monkeypatch.context() as patch, open_checkpoints(saved, keep=3) as checkpoints:
        true = checksums(make_state(4))
        patch.setattr(checkpoint, "checksums", lambda state: true)
        state = make_state(4)
        checkpoints.save(4, state | {"weights": state["weights"].at[3, 7].add(1e-3)})
    with pytest.raises(ValueError, match="changed since it was written: weights"):
        checkpoint.check(epath.Path(saved / "4"))
    checkpoint.check(epath.Path(saved / "3"))


def test_checksums_see_order_and_not_where_arrays_lie():
    values = jnp.arange(16.0).at[3].set(0.0).at[0].set(3.0)
    mesh = make_mesh((8, 1, 1))
    spread = jax.device_put(jnp.arange(16.0), batch_sharding(mesh))
    assert checksums({"a": spread}) == checksums({"a": np.arange(16, dtype=np.float32)})
    assert checksums({"a": values}) != checksums({"a": jnp.arange(16.0)})
    ones = jnp.linspace(1, 2, 512)
    assert checksums({"a": ones}) != checksums({"a": 2 * ones})
    assert checksums({"a": jnp.zeros(3, jnp.bfloat16)}) != checksums({"a": jnp.ones(3, jnp.bfloat16)})


def test_the_checkpoint_of_another_run_is_an_error_that_lists_the_differences(saved):
    other = {"config": {"stage2": {"optim": {"lr": 2e-4}}}, "llm": "4567"}
    with open_checkpoints(saved, identity=other) as checkpoints:
        message = r"config.stage2.optim.lr is 0.0001 there, 0.0002 here; llm is '0123' there, '4567' here"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(abstract(make_state()))


def test_too_little_room_is_found_before_anything_is_written(saved, monkeypatch):
    with open_checkpoints(saved, keep=3) as checkpoints:
        large = {"weights": jax.ShapeDtypeStruct((1 << 45,), jnp.float32)}
        with pytest.raises(CheckpointError, match=r"step 4 could not be written .* No space left: it takes"):
            checkpoints._check_room(4, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), large))
    assert steps_in(saved) == {"1", "2", "3"}


# Files of this process can't be longer than a few kB, as when the disk is full while one is written.
FULL_DISK = """
import resource, signal, sys
from tests.test_checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = sys.argv[1]
with open_checkpoints(folder, keep=9) as checkpoints:
    checkpoints.save(4, make_state(4))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(5, make_state(5))
        checkpoints.save(6, make_state(6))
    except CheckpointError as error:
        print(error)
"""


def test_a_disk_that_is_full_stops_with_a_message_and_leaves_the_last_checkpoint(saved):
    run = subprocess.run([sys.executable, "-c", FULL_DISK, saved], capture_output=True, text=True)
    assert "the checkpoint of step 5 could not be written" in run.stdout, run.stderr
    with open_checkpoints(saved) as checkpoints:
        assert int(checkpoints.restore(abstract(make_state()))["step"]) == 4
    metadata = json.loads((saved / "4" / "_CHECKPOINT_METADATA").read_text())
    assert metadata["custom_metadata"]["identity"] == IDENTITY
