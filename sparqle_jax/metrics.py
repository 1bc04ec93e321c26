"""The numbers of a run as it goes: progress bar, metrics.jsonl, TensorBoard, losses on validation sets."""

import datetime
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np
import optax
import tqdm
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import directory_check

from sparqle_jax import audio, commands, hosts
from sparqle_jax.chips import chip_of
from sparqle_jax.data.pipeline import SKIPPED, Examples, batches
from sparqle_jax.data.plan import BatchPlan
from sparqle_jax.sharding import batch_sharding, replicated
from sparqle_jax.stages import Stage
from sparqle_jax.step import Program


class Validation:
    """Mean losses on validation sets: over their whole batches, of tokens over all tokens."""

    def __init__(self, graph: nnx.GraphDef, valid_sets: Mapping[str, tuple[Examples, BatchPlan]], mesh: Mesh):
        self.valid_sets, self.mesh = valid_sets, mesh
        self._loss = jax.jit(
            lambda trained, frozen, batch, seed: nnx.merge(graph, trained, frozen).loss(
                batch, jax.random.key(seed), train=False
            ),
            out_shardings=replicated(mesh),
        )

    def __call__(self, trained: nnx.State, frozen: nnx.State) -> dict[str, dict[str, float]]:
        """The losses by validation set: "loss", and its parts by name."""
        return {name: self._mean(trained, frozen, *test) for name, test in self.valid_sets.items()}

    def _mean(
        self, trained: nnx.State, frozen: nnx.State, examples: Examples, plan: BatchPlan
    ) -> dict[str, float]:
        number, rows = plan.batches_per_epoch, []
        inputs = batches(examples, plan, seed=0, stop=number, sharding=batch_sharding(self.mesh))
        for step in tqdm.trange(
            number, desc="valid", unit="batch", leave=False, disable=not hosts.is_first()
        ):
            batch = next(inputs)
            del batch[SKIPPED]
            with jax.set_mesh(self.mesh):
                loss, parts = jax.device_get(self._loss(trained, frozen, batch, np.uint32(step)))
            rows.append({"loss": float(loss), **{part: float(value) for part, value in parts.items()}})
        weights = [row.pop("tokens", 1.0) for row in rows]
        return {key: float(np.average([row[key] for row in rows], weights=weights)) for key in rows[0]}


ESTIMATE_AFTER = 10  # steps, when the time left is first said


class Board:
    """TensorBoard's files of a run. Written as we go: tensorboardX's SummaryWriter has a thread for it, which
    ends in a traceback when the disk is full."""

    def __init__(self, folder: epath.Path, start: int):
        directory_check(str(folder))
        self.can_append = commands.can_append(folder)
        self.events = EventsWriter(str(folder / "events"))
        # What an earlier process wrote of the steps from here on is not shown.
        self.events.write_event(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, row: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self.events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        if self.can_append:  # to a bucket the whole file is sent each time
            self.events.flush()


class Log:
    """The numbers of a run as it goes: progress bar, metrics.jsonl and TensorBoard, on the first host.

    Times are those of the devices: a step takes from when its batch was there and the step before it was done
    to when its metrics have arrived. `seconds` of a row are all since the row before, with waiting for data
    (`data_wait` is its share) and without saves and validation, which have rows of their own; together they
    are the time that the run took.
    """

    def __init__(
        self,
        folder: epath.Path,
        stage: Stage,
        schedule: optax.Schedule,
        programs: list[Program],
        start: int,
    ):
        self.file, self.stage = folder / "metrics.jsonl", stage
        self.schedule, self.programs = schedule, programs
        chip = chip_of(jax.devices()[0].device_kind)
        self.peak = None if chip is None else chip.peak / chip.devices * jax.device_count()
        # What a killed run wrote after its last checkpoint is done again; its last line may be half a line.
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        self.lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        self.skipped = max((json.loads(line).get("skipped", 0) for line in self.lines), default=0)
        self.board = None
        if hosts.is_first():
            commands.write_text(self.file, "".join(self.lines))
            self.board = Board(folder / "tensorboard", start + 1)
        self.bar = tqdm.tqdm(
            total=stage.config.steps,
            initial=start,
            desc=stage.name,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not hosts.is_first(),
        )
        self.start, self.training_seconds = start, 0.0
        self.done = time.monotonic()  # when the last step, save or validation ended
        self._begin()

    def _begin(self) -> None:
        self.steps, self.samples, self.padded, self.flops, self.seconds, self.waited = 0, 0, 0, 0, 0.0, 0.0

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            self.flush()
            self.board.events.close()
        self.bar.close()

    def flush(self) -> None:
        """Brings what was written to a bucket, whose files can't be appended to."""
        if self.board is not None and not commands.can_append(self.file):
            commands.write_text(self.file, "".join(self.lines))
            self.board.events.flush()

    def compiled(self, seconds: float) -> None:
        """Writes how long compiling took, before the first step."""
        self._write(self.start, {"compile_seconds": seconds})

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Writes how long training waits for a checkpoint, within."""
        yield
        self._write(step, {"save_seconds": self._since()})

    def _since(self) -> float:
        """Seconds since the last step, save or validation ended, of which the next one is not a part."""
        before, self.done = self.done, time.monotonic()
        return self.done - before

    def finished(self, step: int, values: dict[str, float], ready: float, done: float) -> None:
        """Counts a step, and writes every `log_every`th and the last: its metrics, and the speed since.

        ready, done: when its batch was there and when its metrics had arrived, by time.monotonic.
        """
        self.waited += max(0.0, ready - self.done)
        self.seconds += done - self.done
        self.training_seconds += done - self.done
        self.done = done
        planned = self.stage.plan.batch(step - 1)
        self.steps += 1
        self.samples += int(self.stage.plan.num_samples[planned.indices].sum())
        self.padded += planned.indices.size * planned.num_samples
        self.flops += self.programs[planned.bucket].model_flops
        self.skipped += int(values.pop("skipped"))
        self.bar.update()
        if step - self.start == ESTIMATE_AFTER:
            self._say_time_left(step)
        if step % self.stage.config.log_every and step < self.stage.config.steps:
            return
        seconds = max(self.seconds, 1e-9)
        speed = {
            "seconds": self.seconds,
            "step_seconds": (self.seconds - self.waited) / self.steps,
            "data_wait": self.waited / seconds,
            "audio_seconds_per_second": self.samples / audio.SAMPLE_RATE / seconds,
            "model_tflops_per_second": self.flops / seconds / 1e12,
        }
        if self.peak is not None:
            speed["mfu"] = self.flops / seconds / self.peak
        row = values | {
            "lr": float(self.schedule(step - 1)),
            "padding": 1 - self.samples / self.padded,
            **speed,
        }
        if self.skipped:
            row["skipped"] = self.skipped
        shown = {name: f"{value:.3f}" for name, value in values.items() if name != "tokens"}
        shown["audio"] = f"{speed['audio_seconds_per_second']:.0f}x"
        if "mfu" in speed:
            shown["mfu"] = f"{speed['mfu']:.1%}"
        self.bar.set_postfix(shown, refresh=False)
        self._write(step, row)
        self._begin()

    def validated(self, step: int, losses: dict[str, dict[str, float]]) -> dict[str, float]:
        """Writes the losses on validation sets, and their mean, valid_loss, which it returns."""
        row = {"valid_loss": float(np.mean([parts["loss"] for parts in losses.values()]))}
        by_set = {f"valid/{name}/{k}": v for name, parts in losses.items() for k, v in parts.items()}
        self._write(step, row | by_set | {"valid_seconds": self._since()})
        self.bar.write(f"step {step}: valid_loss {row['valid_loss']:.4f}", file=sys.stderr)
        return row

    def _say_time_left(self, step: int) -> None:
        seconds = self.training_seconds / (step - self.start) * (self.stage.config.steps - step)
        left = datetime.timedelta(seconds=round(seconds))
        self.bar.write(
            f"{self.stage.name}: about {left} (h:mm:ss) left, without saves and validation", file=sys.stderr
        )

    def _write(self, step: int, row: dict[str, float]) -> None:
        if self.board is None:
            return
        self.lines.append(json.dumps({"step": step, **row}) + "\n")
        if commands.can_append(self.file):
            with open(self.file, "a") as file:
                file.write(self.lines[-1])
        self.board.write(step, row)
