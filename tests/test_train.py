"""Training through its command: what it leaves, that it resumes exactly, what it finds at the start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparqle_jax import checkpoint, loop, train
from sparqle_jax import metrics as metrics_module
from sparqle_jax.config import read_config
from sparqle_jax.data.dataset import CorruptRecord, DataSet
from sparqle_jax.data.plan import BatchPlan, choose_buckets
from sparqle_jax.demo.__main__ import MODELS
from sparqle_jax.sharding import make_mesh
from sparqle_jax.sparqle import SparQLe
from tests.test_pipeline import sparse_data

CONFIG = str(Path(__file__).parents[1] / "configs" / "tiny.py")
SIZES = dict(
    num_queries=4,
    span_frames=150,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)

# Kills its own process in the middle of stage 2, between two checkpoints.
KILLED = """
import os, signal, sys
from sparqle_jax import metrics, train
write = metrics.Log._write
def write_or_die(self, step, *args):
    write(self, step, *args)
    if self.file.parent.name == "stage2" and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
metrics.Log._write = write_or_die
train.main(sys.argv[1:])
"""


def arguments(run: Path, world: Path, *more: str) -> list[str]:
    changes = [
        f"run={run}",
        f"data.train={world / 'train'}",
        "data.frames=null",  # the encoder hears every batch; tests/test_demo.py keeps its frames
        "data.valid=" + json.dumps({"seen": str(world / "seen")}),
        f"adapter={json.dumps({'kind': 'qformer', **SIZES})}",
        "stage1.embed_dim=8",
        'eval_languages=["fr"]',
    ]
    for stage in ("stage1", "stage2"):
        changes += [
            f"{stage}.steps=4",
            f"{stage}.batch_size=8",
            f"{stage}.save_every=2",
            f"{stage}.log_every=1",
        ]
    return [CONFIG, *(arg for change in (*changes, *more) for arg in ("--set", change))]


class TimedLog(metrics_module.Log):
    """A Log, and by its stage how long it was in use."""

    lasted: ClassVar[dict[str, float]] = {}

    def __enter__(self):
        self.entered = time.monotonic()
        return super().__enter__()

    def __exit__(self, *args):
        self.lasted[self.stage.name] = time.monotonic() - self.entered
        super().__exit__(*args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_world) -> Path:
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Log", TimedLog)
        assert train.main([*arguments(run, small_world), "--profile", "1"]) == 0
    return run


SPEED = {"step_seconds", "data_wait", "audio_seconds_per_second", "model_tflops_per_second"}
TIMES = {"seconds", "save_seconds", "valid_seconds"}
SPEED |= TIMES | {"compile_seconds"}


def metrics(run: Path, stage: str) -> list[dict]:
    """What was written of each step, but for how fast it was."""
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in SPEED} for row in rows]
    return [row for row in rows if row.keys() != {"step"}]


def test_a_run_leaves_what_it_promises(whole):
    for stage, parts in (("stage1", {"stc", "stm", "stg"}), ("stage2", {"tokens"})):
        rows = metrics(whole, stage)
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert parts | {"loss", "gradient_norm", "lr"} <= rows[0].keys()
        assert list((whole / stage / "tensorboard").iterdir())
        assert list((whole / stage / "profile").rglob("*.xplane.pb"))
    scores = json.loads((whole / "stage2" / "results.json").read_text())
    assert scores["seen"].keys() == {"transcribe", "fr"}
    assert json.loads((whole / "stage1" / "results.json").read_text())["seen"].keys() == {
        "loss",
        "stc",
        "stm",
        "stg",
    }
    rows = metrics(whole, "stage1")
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][part] for part in ("stc", "stm", "stg")), rel=1e-5)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_times_are_all_of_the_time(stage, whole):
    """Steps and saves together are the time that the stage took, each counted once."""
    rows = [json.loads(line) for line in (whole / stage / "metrics.jsonl").read_text().splitlines()]
    parts = {key: sum(row.get(key, 0) for row in rows) for key in TIMES}
    assert sum(parts.values()) == pytest.approx(TimedLog.lasted[stage], rel=0.02)
    assert parts["save_seconds"] > 0
    for row in rows:
        assert ("seconds" in row) == ("loss" in row)
        if "seconds" in row:  # of one step each
            assert row["step_seconds"] == pytest.approx((1 - row["data_wait"]) * row["seconds"])


def test_a_step_takes_from_its_batch_to_its_metrics(tmp_path, monkeypatch):
    """By hand: the second batch comes late, the fourth step after a save, and a row has two steps."""
    batch = SimpleNamespace(indices=np.arange(2), num_samples=16_000, bucket=0)
    plan = SimpleNamespace(batch=lambda number: batch, num_samples=np.full(2, 8_000))
    stage = SimpleNamespace(name="stage2", config=SimpleNamespace(steps=4, log_every=2), plan=plan)
    now = iter([100.0, 116.0])
    clock = SimpleNamespace(monotonic=lambda: next(now), time=lambda: 0.0)
    monkeypatch.setattr(metrics_module, "time", clock)
    programs = [SimpleNamespace(model_flops=6e12)]
    with metrics_module.Log(tmp_path, stage, lambda step: 0.1, programs, 0) as log:
        for step, ready, done in ((1, 101.0, 103.0), (2, 105.0, 107.0), (3, 106.0, 110.0)):
            log.finished(step, {"loss": 1.0, "skipped": 0}, ready, done)
        with log.saving(3):
            pass
        log.finished(4, {"loss": 1.0, "skipped": 0}, 109.0, 118.0)
    first, save, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert save == {"step": 3, "save_seconds": 6.0}
    for row, seconds, waited in ((first, 7.0, 3.0), (second, 5.0, 0.0)):
        assert row["seconds"] == seconds
        assert row["step_seconds"] == (seconds - waited) / 2
        assert row["data_wait"] == waited / seconds
        assert row["audio_seconds_per_second"] == 2 * 1.0 / seconds
        assert row["model_tflops_per_second"] == pytest.approx(2 * 6 / seconds)


@pytest.mark.slow
def test_what_a_run_costs_is_said_before_it_starts(small_world, tmp_path, capsys):
    """Hours by the lengths themselves, parameters and bytes by what a run then leaves."""
    run = tmp_path / "run"
    changes = arguments(run, small_world, "stage1=null", "stage2.steps=11", "stage2.evaluate=false")
    assert train.main(changes) == 0
    captured = capsys.readouterr()
    data = DataSet(small_world / "train")
    line = re.search(
        r"stage2: 11 steps on 8 x cpu, ([\d.]+) epochs of ([\d.]+) h; ([\d.]+) million parameters train, "
        r"[\d.]+ million are frozen; into (.*), with up to 3 checkpoints of ([\d.]+) MB",
        captured.out,
    )
    assert float(line[1]) == pytest.approx(11 * 8 / len(data), rel=0.35)  # batches of short ones are larger
    assert float(line[2]) == pytest.approx(data.num_samples.sum() / 16_000 / 3600, rel=0.005)
    weights = sum(x.size for x in load_file(run / "stage2" / "adapter.safetensors").values())
    assert float(line[3]) == pytest.approx(weights / 1e6, rel=0.001)
    assert line[4] == str(run / "stage2")
    assert float(line[5]) == pytest.approx(3 * 4 * weights / 1e6, rel=0.001)  # and two moments
    assert re.search(r"stage2: about 0:0\d:\d\d \(h:mm:ss\) left", captured.err)


def test_no_room_for_the_checkpoints(small_world, tmp_path, monkeypatch, capsys):
    space = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(checkpoint, "shutil", SimpleNamespace(disk_usage=lambda _: space))
    with pytest.raises(SystemExit) as raised:
        train.main(arguments(tmp_path / "run", small_world, "stage1=null", "stage2.keep=20"))
    assert raised.value.code == 2
    told = capsys.readouterr().err
    assert re.search(
        r"needs room for 21 checkpoints of .* MB, 0 of which are there, but the disk has 1 MB", told
    )
    assert not (tmp_path / "run").exists()


def test_a_cpu_beside_an_accelerator_must_be_asked_for(small_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.quiet, "accelerators", lambda: ["/dev/nvidia0"])
    monkeypatch.setenv("JAX_PLATFORMS", "")
    with pytest.raises(SystemExit) as raised:
        train.main(arguments(tmp_path / "run", small_world))
    assert raised.value.code == 2
    told = capsys.readouterr().err
    assert "this machine has /dev/nvidia0, but JAX finds only its CPU" in told
    assert "set JAX_PLATFORMS=cpu" in told


def test_the_adapter_left_is_the_one_trained(whole):
    adapter = load_file(whole / "stage2" / "adapter.safetensors")
    stage1 = load_file(whole / "stage1" / "adapter.safetensors")
    assert not np.array_equal(adapter["adapter.query_tokens"], stage1["adapter.query_tokens"])
    sparqle = SparQLe.from_pretrained(whole / "stage2")
    assert sparqle.model.adapter.config.num_queries == SIZES["num_queries"]


@pytest.mark.slow
def test_stopped_and_killed_it_ends_with_the_same_numbers(whole, small_world, tmp_path, monkeypatch):
    run = tmp_path / "stopped"
    write = metrics_module.Log._write

    def write_and_stop(self, step, row):
        write(self, step, row)
        if step == 2 and "loss" in row:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(metrics_module.Log, "_write", write_and_stop)
        assert train.main(arguments(run, small_world)) == 130
    assert not (run / "stage1" / "adapter.safetensors").exists()

    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-c", KILLED, *arguments(run, small_world)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert metrics(run, "stage2")[-1]["step"] == 3

    with open(run / "stage2" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # what a power cut may leave
    assert train.main(arguments(run, small_world)) == 0
    for stage in ("stage1", "stage2"):
        assert metrics(run, stage) == metrics(whole, stage)
        ours, theirs = (load_file(r / stage / "adapter.safetensors") for r in (run, whole))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], name)
        results = [json.loads((r / stage / "results.json").read_text()) for r in (run, whole)]
        assert results[0] == results[1]


# Fills the disk of the run before compiling, or after a step.
FILLED = """
import os, sys
from pathlib import Path
from sparqle_jax import loop, metrics, train
moment, ballast = sys.argv[1:3]
def fill():
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
compile, write = loop.compile_steps, metrics.Log._write
def compile_and_fill(*args):
    if moment == "compile":
        fill()
    return compile(*args)
def write_and_fill(self, step, row):
    write(self, step, row)
    if str(step) == moment and "loss" in row:
        fill()
loop.compile_steps, metrics.Log._write = compile_and_fill, write_and_fill
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["compile", "3"])
def test_a_disk_that_is_full_and_has_room_again(moment, small_world, small_disk):
    """While compiling (its cache, metrics.jsonl, TensorBoard's file), and in a save: status 3 and a
    message; then the same command ends with the numbers of a run that had room. Orbax logs a traceback of
    its own when a write fails; there is none of ours."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    changes = arguments(small_disk / "run", small_world, "stage1=null", "stage2.evaluate=false")
    command = [sys.executable, "-c", FILLED, moment, str(small_disk / "ballast"), *changes]
    full = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert full.returncode == train.FAILED, full.stderr
    assert "No space left" in full.stderr
    assert not re.search(r"sparqle_jax/\w+\.py", full.stderr)
    (small_disk / "ballast").unlink()
    assert train.main(changes) == 0
    again = arguments(small_disk / "other", small_world, "stage1=null", "stage2.evaluate=false")
    assert train.main(again) == 0
    ours, other = (
        load_file(small_disk / name / "stage2" / "adapter.safetensors") for name in ("run", "other")
    )
    for name in other:
        np.testing.assert_array_equal(ours[name], other[name], name)
    assert metrics(small_disk / "run", "stage2") == metrics(small_disk / "other", "stage2")


class TestStart:
    """A run from the full state of another (`start=`)."""

    @pytest.mark.slow
    def test_with_nothing_changed_it_ends_with_the_same_numbers(self, whole, small_world, tmp_path, capsys):
        changes = arguments(tmp_path / "run", small_world, f"start={whole}@2")
        assert train.main(changes) == 0
        assert f"starts from:\n  {whole}@2, stage2, step 2: nothing changed\n" in capsys.readouterr().out
        assert not (tmp_path / "run" / "stage1").exists()
        assert metrics(tmp_path / "run", "stage2") == metrics(whole, "stage2")[2:]
        ours, theirs = (load_file(r / "stage2" / "adapter.safetensors") for r in (tmp_path / "run", whole))
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], name)

    @pytest.mark.slow
    def test_longer_stopped_and_from_there_again(self, whole, small_world, tmp_path, monkeypatch):
        """4 steps become 10, with another learning rate; from the 6th of these a run is cooled down. Stopped,
        the same command goes on, also when the run that it started from is gone."""
        source = tmp_path / "source"
        shutil.copytree(whole, source)
        write = metrics_module.Log._write

        def write_and_stop(self, step, row):
            write(self, step, row)
            if step == 6 and "loss" in row:
                signal.raise_signal(signal.SIGINT)

        optim = ["stage2.optim.schedule=constant", "stage2.optim.warmup_steps=0", "stage2.optim.lr=0.002"]
        quiet = ["stage2.evaluate=false", "stage2.keep=4", *optim]
        run, cold = tmp_path / "longer", tmp_path / "cooled"
        longer = arguments(run, small_world, f"start={source}", "stage2.steps=10", *quiet)
        with monkeypatch.context() as patch:
            patch.setattr(metrics_module.Log, "_write", write_and_stop)
            assert train.main(longer) == 130
        shutil.rmtree(source)
        assert train.main(longer) == 0
        rows = metrics(run, "stage2")
        assert [row["step"] for row in rows] == [5, 6, 7, 8, 9, 10]
        assert [row["lr"] for row in rows] == pytest.approx([0.002] * 6)
        assert rows[0]["loss"] < metrics(whole, "stage2")[0]["loss"]  # it goes on, and does not begin again

        changes = ["stage2.steps=11", "stage2.optim.cooldown_steps=3", "stage2.optim.final_lr_factor=0"]
        cooled = arguments(cold, small_world, f"start={run}@6", *quiet, *changes)
        assert train.main(cooled) == 0
        rows = metrics(cold, "stage2")
        assert [row["step"] for row in rows] == [7, 8, 9, 10, 11]
        assert [row["lr"] for row in rows] == pytest.approx([0.002] * 3 + [0.002 * 2 / 3, 0.002 / 3])
        first, second = json.loads((cold / "stage2" / "config.json").read_text())["ancestry"]
        assert first.startswith(f"{run}@6, stage2, step 6: ")
        assert "config.stage2.steps is 10 there, 11 here" in first
        assert second.startswith(f"{source}, stage2, step 4: ")
        assert "config.stage2.optim.lr is " in second
        assert json.loads((cold / "config.json").read_text())["start"] == f"{run}@6"
        card = (cold / "stage2" / "README.md").read_text()
        assert f"- Trained from the state of {first}\n- Trained from the state of {second}\n" in card
        assert f"- Trained on: {small_world / 'train'}\n" in card
        assert "- Encoder, frozen: hubert\n- LLM, frozen: llm\n- Adapter: qformer, 0.02365 million" in card
        assert train.main(cooled) == 0
        (cold / "stage2" / "README.md").write_text("my own")
        SparQLe.from_pretrained(cold / "stage2").save_pretrained(cold / "stage2")
        assert (cold / "stage2" / "README.md").read_text() == "my own"

    @pytest.mark.parametrize(
        ("start", "changes", "message"),
        [
            ("nowhere", [], "nowhere has no checkpoint of stage1 or stage2"),
            ("WHOLE@3", [], "stage2 of .* has checkpoints of the steps 2, 4 alone"),
            ("WHOLE", [], "has done 4 steps of stage2, and stage2.steps=4 are wanted in all"),
            ("WHOLE", ["stage2.steps=8", "adapter.num_queries=5"], "is of another model: config.adapter.num"),
        ],
    )
    def test_mistakes(self, start, changes, message, whole, small_world, tmp_path, capsys):
        text = start.replace("WHOLE", str(whole))
        with pytest.raises(SystemExit) as raised:
            train.main(arguments(tmp_path / "run", small_world, f"start={text}", *changes))
        assert raised.value.code == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage2.optim.lr=0.5", "config.stage2.optim.lr is 0.001 there, 0.5 here"),
        ("seed=1", "config.seed is 0 there, 1 here"),
        ("data.train=DATA/seen", "holds another run: data is"),
    ],
)
def test_another_configuration_does_not_go_on_in_a_runs_folder(whole, small_world, change, message, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments(whole, small_world, change.replace("DATA", str(small_world))))
    assert message in capsys.readouterr().err


def test_a_run_goes_on_with_towers_elsewhere_but_not_with_others(whole, small_world, tmp_path, capsys):
    run, llm = tmp_path / "run", tmp_path / "llm"
    shutil.copytree(whole, run)
    shutil.copytree(MODELS / "llm", llm)
    elsewhere = [f"llm={llm}", "data.valid=" + json.dumps({"other": str(small_world / "seen")})]
    assert train.main(arguments(run, small_world, *elsewhere)) == 0
    weights = load_file(llm / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        train.main(arguments(run, small_world, f"llm={llm}"))
    assert re.search(r"holds another run: llm.hash is '\w+' there, '\w+' here", capsys.readouterr().err)
    shutil.copy(MODELS / "llm" / "model.safetensors", llm)
    template = llm / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(SystemExit):
        train.main(arguments(run, small_world, f"llm={llm}"))
    assert "holds another run: llm tokenizer and template is" in capsys.readouterr().err


def test_other_data_under_the_same_name_do_not_go_on(whole, small_world, tmp_path, capsys):
    run, data = tmp_path / "moved", tmp_path / "data"
    shutil.copytree(whole, run)
    shutil.copytree(small_world / "train", data)
    moved = [str(run / "config.json"), "--set", f"run={run}", "--set", f"data.train={data}"]
    assert train.main(moved) == 0  # the same, though moved
    shutil.rmtree(data)
    shutil.copytree(small_world / "seen", data)
    with pytest.raises(SystemExit):
        train.main(moved)
    assert "holds another run: data is" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mixture_in_buckets_compiles_a_step_for_each(small_world, tmp_path, capsys, monkeypatch):
    one = make_mesh((1, 1, 1), jax.devices()[:1])
    monkeypatch.setattr(train, "make_mesh", lambda sizes: one)
    mixture = {
        "a": {"folder": str(small_world / "train"), "weight": 1.0},
        "b": {"folder": str(small_world / "seen"), "weight": 1.0, "tasks": {"fr": 1.0}},
    }
    changes = [
        "stage1=null",
        f"data.train={json.dumps(mixture)}",
        "data.buckets=[1.9, 3.0]",
        "stage2.batch_size=1",  # with which no bucket is joined with another
        "stage2.steps=9",
        "stage2.save_every=3",
        "stage2.keep=1",
        "stage2.eval_every=3",
        "stage2.evaluate=false",
    ]
    assert train.main(arguments(tmp_path / "run", small_world, *changes)) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"compiling a step of (\d+) recordings of up to ([\d.]+) s", printed) == [
        ("1", "1.90"),
        ("1", "3.00"),
    ]
    rows = metrics(tmp_path / "run", "stage2")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
    assert all(0 < row["padding"] < 0.6 for row in rows if "loss" in row)
    tested = {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}
    assert list(tested) == [0, 3, 6, 9]
    kept = {int(path.name) for path in (tmp_path / "run" / "stage2" / "checkpoints").glob("[0-9]*")}
    best = min((3, 6, 9), key=tested.get)
    assert kept == {9, best}


def make_corrupt(source: Path, folder: Path) -> tuple[set[int], int]:
    """A copy of a data set with records that can't be read: which, and a seed whose first batch has none, so
    that they are not found before the first step."""
    shutil.copytree(source, folder)
    (shard,) = folder.glob("speech-train*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1000] = bytes(1000)
    shard.write_bytes(content)
    data, bad = DataSet(folder), set()
    for i in range(len(data)):
        try:
            data.samples(i)
        except CorruptRecord:
            bad.add(i)
    buckets = choose_buckets(data.num_samples, 1)
    firsts = (
        (seed, BatchPlan(data.num_samples, buckets, 8, seed=seed).batch(0).indices) for seed in range(100)
    )
    return bad, next(seed for seed, first in firsts if bad.isdisjoint(first))


def test_a_corrupt_record_stops_training_and_is_skipped_when_told_to(small_world, tmp_path, capsys):
    bad, seed = make_corrupt(small_world / "train", tmp_path / "data")
    changes = ["stage1=null", f"data.train={tmp_path / 'data'}", "stage2.steps=3", "stage2.evaluate=false"]
    changes.append(f"seed={seed}")
    assert train.main(arguments(tmp_path / "one", small_world, *changes)) == 3
    assert re.search(r"can't be read, record \d+ of .* in speech-train", capsys.readouterr().err)
    skip = [*changes, "data.skip_corrupt=true"]
    assert train.main(arguments(tmp_path / "other", small_world, *skip)) == 0
    rows = metrics(tmp_path / "other", "stage2")
    assert rows[-1]["skipped"] == len(bad)  # once in this epoch
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_a_step_that_is_not_finite_stops_and_can_be_done_again(small_world, tmp_path, capsys):
    changes = ("stage1=null", "stage2.optim.lr=1e38", "stage2.optim.warmup_steps=0", "stage2.log_every=100")
    for _ in range(2):  # the same command does that step again
        assert train.main(arguments(tmp_path / "run", small_world, *changes)) == 3
        assert "the loss of step 2 is nan" in capsys.readouterr().err
        stage = tmp_path / "run" / "stage2"
        told = json.loads((stage / "not_finite.json").read_text())
        lengths = DataSet(small_world / "train").num_samples
        batch = BatchPlan(lengths, choose_buckets(lengths, 1), 8, seed=0).batch(1)
        assert told["step"] == 2
        assert told["examples"] == [DataSet(small_world / "train")[i].id for i in batch.indices]
        assert [path.name for path in (stage / "checkpoints").glob("[0-9]*")] == ["1"]


@pytest.fixture(scope="module")
def sparse(small_world, tmp_path_factory) -> Path:
    """24 utterances: 8 with a German translation, and then 2 in which nobody speaks."""

    def keep(i, utterance):
        translations = {"de": utterance.translations["de"]} if i < 8 else {}
        return ("", {}) if i >= 22 else (utterance.text, translations)

    return sparse_data(small_world, tmp_path_factory.mktemp("sparse") / "sparse", keep).folder


def test_what_each_stage_can_use_is_said_at_the_start(sparse, small_world, tmp_path, capsys):
    mixture = {
        "some": {"folder": str(sparse), "tasks": {"de": 1.0}},
        "all": {"folder": str(small_world / "seen")},
    }
    changes = [f"data.train={json.dumps(mixture)}", 'stage2.tasks={"transcribe": 0.5, "fr": 0.5}']
    (_, *sets) = arguments(tmp_path / "run", small_world, *changes)
    run = train.Run(read_config(CONFIG, sets[1::2]))
    said = capsys.readouterr().out
    assert (
        "stage1: data.train.some has 24 utterances: transcribe 22; 2 have no text and are left out\n" in said
    )
    assert "stage1: data.train.all has 8 utterances: transcribe 8\n" in said
    assert "stage2: data.train.some has 24 utterances: de 8; 16 have none of these and are left out\n" in said
    assert "stage2: data.train.all has 8 utterances: transcribe 8, fr 8\n" in said
    for stage, usable in zip(run.stages, (range(22), range(8)), strict=True):
        indices = np.concatenate([rows.ravel() for rows in stage.plan.epoch(0)])
        assert set(indices.tolist()) <= {*usable, *range(24, 32)}
        assert len(indices) + stage.plan.left_out == len(usable) + 8


def test_test_sets_with_few_references_and_silence_are_evaluated(sparse, capsys):
    scores = train._evaluate_answers(SparQLe.from_pretrained(), {"test": DataSet(sparse)}, ("de",))
    said = capsys.readouterr().out
    assert scores["test"].keys() == {"transcribe", "de"}
    assert "test: 8 of 24 utterances have a reference in de\n" in said
    assert re.search(r"test: nobody speaks in 2 \(.*\): \d got words, \d+ in all", said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encoder=nowhere", "nowhere has no config.json"),
        ("llm=nowhere", "nowhere"),
        ("data.train=nowhere", "nowhere is no data set"),
        ("stage1.tokenizer=nowhere", "nowhere is no folder"),
        ("data.max_seconds=1.2", "or longer than data.max_seconds=1.2: 000"),
        ("data.buckets=[1.2]", "recordings are longer than the longest bucket, 1.20 s"),
        ("data.batch_multiple=3", "batch_size=8 is not a multiple of data.batch_multiple=3"),
        ('stage2.tasks={"it": 1}', "has no translations into 'it'; it has ['de', 'es', 'fr']"),
        (
            'data.train={"mine": {"folder": "DATA/train", "tasks": {"it": 1}}}',
            "has no translations into 'it'",
        ),
        ('data.train={"a": {"folder": "A", "weight": 1}, "b": {"folder": "B"}}', "has weights, but not for"),
        ('eval_languages=["it"]', "has no translations into 'it'"),
        ('eval_languages=["klingonish"]', "'klingonish' is neither a language's name nor its code"),
        ("adapter.hidden=3", "adapter.hidden: there is no such key; valid here: hidden_size, "),
        ("adapter.max_position_embeddings=4", "make max_position_embeddings larger"),
        ("mesh.data=3", "a mesh of data=3, fsdp=1, model=1 needs 3 devices, but there are 8"),
        ("mesh.fsdp=3", "a mesh of data=-1, fsdp=3, model=1 needs a multiple of 3 devices"),
        ("stage2.batch_size=12", "batches of 12 can't be split into 8 equal parts"),
        ("stage2.accumulate=2", "batches of 8 can't be split into 16 equal parts"),
        ("stage1.eval_every=3", "eval_every=3 is not a multiple of save_every=2"),
        ("run=DATA/train/dataset_info.json/run", "nothing can be written to run="),
        ("stage2.batch_size=25", "24 examples, fewer than a batch of 25"),
        ("data.max_text_tokens=3", "tokens, more than data.max_text_tokens=3"),
    ],
)
def test_mistakes_are_found_before_the_first_step(tmp_path, small_world, change, message, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path / "run", small_world, change.replace("DATA", str(small_world))))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # so that the mended configuration may have it
