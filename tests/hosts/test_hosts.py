"""Several processes train together through the command, as the hosts of a pod do."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sparqle_jax.demo.__main__ import MODELS
from tests import cluster
from tests.test_train import arguments, make_corrupt, metrics

DEVICES = 4
CHANGES = ("mesh.data=2", "mesh.fsdp=2", "stage1.evaluate=false", 'stage1.losses=["stc", "stm"]')


def train_on(processes: int, run: Path, world: Path, *changes: str) -> None:
    started = cluster.start(processes, DEVICES // processes, arguments(run, world, *CHANGES, *changes))
    for status, output in cluster.finish(started):
        assert status == 0, output


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_world) -> dict[int, Path]:
    """The same run by 1, 2 and 4 processes of together 4 devices, over two of which parameters are split."""
    folder = tmp_path_factory.mktemp("hosts")
    for processes in (1, 2, 4):
        train_on(processes, folder / str(processes), small_world)
    return {processes: folder / str(processes) for processes in (1, 2, 4)}


def assert_same_run(one: Path, other: Path) -> None:
    """Losses agree to 1e-5, scores are equal, and so are adapters up to what Adam makes of rounding."""
    for stage in ("stage1", "stage2"):
        rows, other_rows = metrics(one, stage), metrics(other, stage)
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        for row, other_row in zip(rows, other_rows, strict=True):
            assert row.keys() == other_row.keys()
            for name in row:
                assert other_row[name] == pytest.approx(row[name], rel=1e-5), (stage, row["step"], name)
        ours, theirs = (load_file(run / stage / "adapter.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys()
        differences = [np.abs(ours[name] - theirs[name]).ravel() for name in ours]
        assert np.mean(np.concatenate(differences) > 1e-5) < 0.01
    scores = [json.loads((run / "stage2" / "results.json").read_text()) for run in (one, other)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_as_one_does(processes, runs):
    assert_same_run(runs[1], runs[processes])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_of_four_processes_goes_on_with_fewer(processes, runs, small_world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[4], run)
    shutil.rmtree(run / "stage2" / "checkpoints" / "4")
    for name in ("results.json", "adapter.safetensors", "config.json"):
        (run / "stage2" / name).unlink()
    train_on(processes, run, small_world)
    assert_same_run(runs[1], run)


def test_sigterm_to_one_process_stops_all_at_the_same_step_with_a_checkpoint(small_world, tmp_path):
    run = tmp_path / "run"
    changes = (*CHANGES, "stage1=null", "stage2.steps=100000", "stage2.save_every=100000")
    started = cluster.start(2, 2, arguments(run, small_world, *changes))
    log = run / "stage2" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert all(process.poll() is None for process in started), cluster.finish(started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    (status, output), (other_status, _) = cluster.finish(started)
    assert (status, other_status) == (128 + signal.SIGTERM,) * 2, output
    (saved,) = (int(path.name) for path in (run / "stage2" / "checkpoints").glob("[0-9]*"))
    assert f"stage2 stopped at step {saved} of 100000; the same command goes on" in output


def test_a_record_that_one_process_can_not_read_stops_all_of_them(small_world, tmp_path):
    _, seed = make_corrupt(small_world / "train", tmp_path / "data")
    data = f"data.train={tmp_path / 'data'}"
    changes = (*CHANGES, "stage1=null", "stage2.steps=3", data, f"seed={seed}")  # an epoch
    started = cluster.start(2, 2, arguments(tmp_path / "run", small_world, *changes))
    results = cluster.finish(started)
    assert [status for status, _ in results] == [3, 3], results
    outputs = sorted((output for _, output in results), key=lambda output: "another host" in output)
    assert "can't be read, record" in outputs[0]
    assert "stage2: another host has failed; its log says why" in outputs[1]


def test_an_adapter_to_start_from_and_workers_serve_several_processes(runs, small_world, tmp_path):
    adapter = runs[1] / "stage1" / "adapter.safetensors"
    changes = ("stage1=null", f"init_from={adapter}", "adapter=null", "data.workers=1")
    train_on(2, tmp_path / "run", small_world, *changes, "stage2.steps=2", "stage2.evaluate=false")
    assert [row["step"] for row in metrics(tmp_path / "run", "stage2")] == [1, 2]


def test_a_folder_that_only_the_first_process_sees_is_an_error(small_world, tmp_path):
    """Each has a working directory of its own, and the run's folder is given relative to that."""
    towers = (
        f"encoder={MODELS / 'hubert'}",
        f"llm={MODELS / 'llm'}",
        f"stage1.tokenizer={MODELS / 'words'}",
    )
    started = cluster.start(2, 2, arguments(Path("run"), small_world, *CHANGES, *towers), apart=tmp_path)
    for status, output in cluster.finish(started):
        assert status == 2
        assert "run=run is not the same folder on all hosts" in output
