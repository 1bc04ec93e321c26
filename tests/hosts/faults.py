"""A run of two processes that is killed again and again, and must end as one that never was.

    python -m tests.hosts.faults [--kills 20] [--seed 0]

Each fault is drawn: SIGKILL of one process or of all, or SIGTERM; in the start-up, between steps, or while a
checkpoint is written. After each the same command starts again. In the end the adapter must be bit for bit
that of a run without faults, the metrics of every step equal, and each example seen once in every epoch.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from sparqle_jax.data.dataset import Corpus, DataSet
from sparqle_jax.data.pipeline import Waveforms
from sparqle_jax.data.plan import BatchPlan, choose_buckets
from sparqle_jax.demo import datasets
from tests import cluster
from tests.hosts.test_hosts import CHANGES
from tests.test_train import arguments, metrics

BATCH = 8
# Trains, and writes down what every step was fed with: a line with its number and a digest of each row.
RECORDING = """
import dataclasses, hashlib, json, os, sys
import numpy as np
from sparqle_jax import loop, train
compile = loop.compile_steps
def recorded(run):
    def step(state, frozen, batch, control):
        rows = {s.index[0].start: s.data for s in batch["waveform"].addressable_shards}
        digests = [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for s in rows.values() for x in s]
        with open(os.environ["SEEN"] + str(train.jax.process_index()), "a") as file:
            file.write(json.dumps([int(control["step"]), digests]) + "\\n")
        return run(state, frozen, batch, control)
    return step
loop.compile_steps = lambda *args: [dataclasses.replace(p, run=recorded(p.run)) for p in compile(*args)]
sys.exit(train.main(sys.argv[1:]))
"""
FAULTS = ("SIGKILL of one", "SIGKILL of all", "SIGTERM")
MOMENTS = ("in the start-up", "between steps", "in a save")
STOPPED = 128 + signal.SIGTERM


def start(run: Path, data: Path, steps: int) -> list:
    changes = (
        *CHANGES,
        "stage1=null",
        f"stage2.steps={steps}",
        "stage2.evaluate=false",
        "stage2.save_every=5",
    )
    return cluster.start(2, 2, arguments(run, data, *changes), ("-c", RECORDING))


def wait_for_moment(moment: str, run: Path, processes: list, rng: random.Random) -> None:
    """Returns at the moment of the fault, or when a process has ended before it."""
    checkpoints, log = run / "stage2" / "checkpoints", run / "stage2" / "metrics.jsonl"
    if moment == "in the start-up":
        time.sleep(rng.uniform(0, 10))
        return
    steps = _steps(log)
    while _alive(processes) and _steps(log) == steps:
        time.sleep(0.01)
    if moment == "in a save":
        while _alive(processes) and not any(checkpoints.glob("*tmp*")):
            time.sleep(0.001)
    else:
        time.sleep(rng.uniform(0, 3))


def _steps(file: Path) -> int:
    """The steps in a metrics.jsonl: its first row, of compiling, is written when others may compile still."""
    return file.read_text().count('"loss"') if file.exists() else 0


def _alive(processes: list) -> bool:
    return all(process.poll() is None for process in processes)


def strike(fault: str, processes: list, rng: random.Random) -> None:
    if fault == "SIGKILL of one":
        rng.choice(processes).kill()
    elif fault == "SIGKILL of all":
        for process in processes:
            process.kill()
    else:
        rng.choice(processes).send_signal(signal.SIGTERM)


def draw(kills: int, rng: random.Random) -> list[tuple[str, str]]:
    """Faults and their moments in random order: each pair comes before any comes again."""
    drawn: list[tuple[str, str]] = []
    while len(drawn) < kills:
        pairs = [(fault, moment) for fault in FAULTS for moment in MOMENTS]
        rng.shuffle(pairs)
        drawn += pairs
    return drawn[:kills]


def suffer(run: Path, processes: list, rng: random.Random, fault: str, moment: str, patient: bool) -> str:
    """Strikes training at a moment, and says how it went.

    patient: those that are left when another has died end by themselves, after JAX's 100 s; else they are
    killed, as a scheduler does.
    """
    wait_for_moment(moment, run, processes, rng)
    assert _alive(processes), cluster.finish(processes)
    strike(fault, processes, rng)
    began, agreed = time.monotonic(), fault == "SIGTERM" and moment != "in the start-up"
    if not (agreed or patient):
        time.sleep(2)
        for process in processes:
            process.kill()
    results = cluster.finish(processes, 600)
    statuses = [status for status, _ in results]
    assert set(statuses) == {STOPPED} if agreed else 0 not in statuses, results
    step = _steps(run / "stage2" / "metrics.jsonl")
    return f"{fault} {moment}, at step {step}: {statuses} after {time.monotonic() - began:.1f} s"


def seen(file: Path) -> dict[int, list[str]]:
    """What the processes fed to each step, the last time that they did it: digests of rows, by step."""
    steps: dict[int, list[str]] = {}
    for process in range(2):
        lines = Path(f"{file}{process}").read_text().splitlines()
        for step, digests in dict(json.loads(line) for line in lines).items():
            steps.setdefault(step, []).extend(digests)
    return steps


def check_examples(steps: dict[int, list[str]], data: Path, num_steps: int) -> None:
    """Every step had the rows of its batch, and every epoch each example once."""
    corpus = Corpus([DataSet(str(data / "train"))])
    plan = BatchPlan(corpus.num_samples, choose_buckets(corpus.num_samples, 1), BATCH, seed=0)
    waveforms = Waveforms(corpus, 3.0)
    digests = [
        hashlib.sha256(waveforms.rows([i], plan.buckets[0].num_samples)["waveform"][0].tobytes()).hexdigest()
        for i in range(len(corpus))
    ]
    assert sorted(steps) == list(range(num_steps))
    for step, rows in steps.items():
        assert Counter(rows) == Counter(digests[i] for i in plan.batch(step).indices), step
    per_epoch = plan.batches_per_epoch
    for first in range(0, num_steps - per_epoch + 1, per_epoch):
        rows = [digest for step in range(first, first + per_epoch) for digest in steps[step]]
        assert Counter(rows) == Counter(digests), f"the epoch from step {first} on"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.hosts.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, steps = random.Random(args.seed), 100 + 5 * args.kills  # a kill comes every one or two steps
    with tempfile.TemporaryDirectory() as folder:
        data, whole, run = (Path(folder) / name for name in ("data", "whole", "run"))
        datasets.make_world(data, train=24, test=8, seed=0)
        os.environ["SEEN"] = str(Path(folder) / "seen-whole-")
        began = time.monotonic()
        for status, output in cluster.finish(start(whole, data, steps), 1200):
            assert status == 0, output
        print(f"without faults: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)

        os.environ["SEEN"] = str(Path(folder) / "seen-")
        struck: set[str] = set()
        for number, (fault, moment) in enumerate(draw(args.kills, rng), 1):
            patient = fault == "SIGKILL of one" and fault not in struck
            struck.add(fault)
            told = suffer(run, start(run, data, steps), rng, fault, moment, patient)
            print(f"{number}: {told}", flush=True)
        for status, output in cluster.finish(start(run, data, steps), 1200):
            assert status == 0, output

        ours, theirs = ((r / "stage2" / "adapter.safetensors").read_bytes() for r in (run, whole))
        assert ours == theirs, "the adapters differ"
        assert metrics(run, "stage2") == metrics(whole, "stage2")
        check_examples(seen(Path(folder) / "seen-"), data, steps)
    print(
        f"{args.kills} faults: the adapter is bit for bit the same, and no example was seen twice or missed."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
