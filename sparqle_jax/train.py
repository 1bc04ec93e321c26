"""Trains a model: stage 1, stage 2, or one after the other.

    python -m sparqle_jax.train configs/tiny.py --set stage2.optim.lr=1e-4
    python -m sparqle_jax.train configs/sparqle.py --set run=gs://bucket/run --distributed   # on every host

Everything goes into the folder `run` of the configuration: the configuration itself (config.json), and for
each stage its checkpoints, metrics.jsonl, TensorBoard's files, at its end its scores (results.json) and what
was trained (adapter.safetensors; after stage 2 a model folder for `transcribe` and `evaluate`). The same
command again goes on from the last checkpoint; it ends with the numbers of a run that was never stopped.

Exit status: 0 done; 130 stopped by Ctrl-C and 143 by SIGTERM, with a checkpoint; 2 a mistake in the
configuration; 3 training can't go on: the numbers, the data or the disk are at fault, not the machine.
"""

import argparse
import dataclasses
import errno
import functools
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter

from sparqle_jax import assemble, audio, commands, flops, hosts, pretrained, prompts, tensors
from sparqle_jax.aligner import Aligner
from sparqle_jax.checkpoint import CheckpointError, Checkpoints, differences, fingerprint
from sparqle_jax.chips import chip_of
from sparqle_jax.config import Config, OptimConfig, Stage1Config, StageConfig, read_config
from sparqle_jax.data.dataset import Corpus, CorruptRecord, DataSet
from sparqle_jax.data.frames import keep_frames
from sparqle_jax.data.pipeline import (
    SKIPPED,
    TRANSCRIBE,
    AlignmentExamples,
    Examples,
    InstructionExamples,
    Waveforms,
    batches,
    check_tasks,
    have_any,
)
from sparqle_jax.data.plan import Batch, Plan, choose_buckets
from sparqle_jax.evaluate import evaluate, silence_line, table, without_speech
from sparqle_jax.model import SpeechLLM, min_samples, partition
from sparqle_jax.sharding import (
    MESH_AXES,
    batch_parts,
    batch_sharding,
    gathered,
    like_parameters,
    make_mesh,
    replicated,
    state_sharding,
)
from sparqle_jax.sparqle import ModelConfig, SparQLe, Tower

IDENTITY = "identity.json"  # in the run's folder: what must be the same when it goes on
# Keys of the configuration that may be others when a run goes on; of folders, their contents are compared.
FREE = (
    r"run|margin|mesh\..*|encoder\.folder|llm|init_from|stage1\.tokenizer|data\.workers|data\.frames|data\.test\..*"
    r"|data\.train\..*\.folder|stage\d\.(save_every|keep|log_every)"
)
HOST_FAILED = 1000  # a "signal", larger than all, by which a host tells the others that it can't go on
FAILED = 3  # the exit status when it is no use to try again


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "trained", "optimizer"], meta_fields=[]
)
@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds: the number of steps done, what trains, and the optimizer's state."""

    step: jax.Array
    trained: nnx.State
    optimizer: optax.OptState


class Stopped(Exception):
    """Training was asked to stop, by a signal of this number, and has saved a checkpoint."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.status = 128 + number


class HostFailed(Exception):
    """Another host has found something with which training can't go on."""


@dataclasses.dataclass
class Stage:
    """What a stage is trained and tested on. tests: by name, examples and the plan of their batches."""

    name: str
    config: StageConfig
    examples: AlignmentExamples | InstructionExamples
    plan: Plan
    tests: dict[str, tuple[Examples, Plan]]


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW as the configuration says, and its learning rate by step."""
    warmup = min(config.warmup_steps, steps - 1)
    falling = {
        "cosine": optax.cosine_decay_schedule(config.lr, steps - warmup, config.final_lr),
        "linear": optax.linear_schedule(config.lr, config.final_lr * config.lr, steps - warmup),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    schedule = optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), falling], [warmup])

    def is_matrix(trained: nnx.State) -> nnx.State:
        return nnx.map_state(lambda path, variable: variable.replace(path[-1] == "kernel"), trained)

    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=is_matrix),
    )
    return optimizer, schedule


def state_shardings(trained: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each array of the TrainState of these (possibly abstract) parameters lies."""
    parameters = state_sharding(trained, mesh)
    moments = jax.eval_shape(optimizer.init, trained)
    return TrainState(replicated(mesh), parameters, like_parameters(moments, trained, parameters, mesh))


def make_update(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    *,
    accumulate: int = 1,
) -> Callable:
    """One step: (TrainState, frozen, batch, control) -> (TrainState, metrics). The TrainState is donated.

    control: seed uint32, the run's; step int32, the number of steps done before this one; signal int32 [...],
    which any host may set, and all get in the metrics. A step whose loss or gradient is not finite changes
    nothing, nor does any step after it: metrics["finite"] tells.
    shardings: of the TrainState (`state_shardings`); to be compiled within `jax.set_mesh`. accumulate: into
    how many parts a batch is cut whose gradients are summed.
    """

    def gradients_of(trained: nnx.State, frozen: nnx.State, batch: dict, key: jax.Array):
        def loss_of(trained: nnx.State):
            return nnx.merge(graph, trained, frozen).loss(batch, key)

        return jax.value_and_grad(loss_of, has_aux=True)(trained)

    def accumulated(trained: nnx.State, frozen: nnx.State, batch: dict, key: jax.Array):
        total = batch["answer_mask"].sum()

        def add(carry, part):
            number, batch = part
            (loss, parts), gradients = gradients_of(trained, frozen, batch, jax.random.fold_in(key, number))
            share = parts["tokens"] / jnp.maximum(total, 1)  # the mean is over the tokens of all parts
            return jax.tree.map(lambda sum, x: sum + share * x, carry, (loss, gradients)), None

        # Each part has an equal share of the examples of every device.
        cut = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
        (loss, gradients), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), cut))
        return (loss, {"tokens": total}), gradients

    def update(state: TrainState, frozen: nnx.State, batch: dict, control: dict):
        batch = dict(batch)
        skipped = batch.pop(SKIPPED)
        key = jax.random.fold_in(jax.random.key(control["seed"]), state.step)
        compute = gradients_of if accumulate == 1 else accumulated
        # What trains is small beside the towers: gathered once, it costs less than in every layer and pass.
        whole = jax.lax.with_sharding_constraint(state.trained, gathered(shardings.trained))
        (loss, parts), gradients = compute(whole, frozen, batch, key)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings.trained)
        norm = optax.tree.norm(gradients)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.step == control["step"])
        new = TrainState(state.step + 1, trained, optimizer_state)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        metrics = {"loss": loss, **parts, "gradient_norm": norm, "skipped": skipped.sum()}
        return new, metrics | {"finite": finite, "signal": control["signal"].max()}

    everywhere = NamedSharding(shardings.step.mesh, PartitionSpec())
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, everywhere))


def train(
    model: nnx.Module,
    stage: Stage,
    folder: epath.Path,
    mesh: Mesh,
    *,
    seed: int,
    identity: dict[str, Any],
    workers: int = 0,
    profile: int = 0,
) -> nnx.Module:
    """The model after `stage.config.steps` steps, from the last checkpoint in `folder` if there is one.

    The model given can't be used any more. identity: of the run (see `Checkpoints`). profile: how many steps
    to trace for xprof, from the third on. All hosts call this together.
    Raises Stopped after Ctrl-C or SIGTERM on any host, when a checkpoint is saved; FloatingPointError for a
    loss or gradient that is not finite, when the state before that step is saved; CheckpointError and
    CorruptRecord; ValueError for a checkpoint of another run.
    """
    config, plan = stage.config, stage.plan
    graph, trained, frozen = partition(model)
    optimizer, schedule = make_optimizer(config.optim, config.steps)
    shardings = state_shardings(trained, optimizer, mesh)
    frozen = jax.device_put(frozen, state_sharding(frozen, mesh))
    with Checkpoints(folder / "checkpoints", identity, keep=config.keep) as checkpoints:
        state = checkpoints.restore(abstract_state(trained, optimizer, shardings))
        if state is None:
            trained = jax.device_put(trained, shardings.trained)
            moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trained)
            state = TrainState(jax.device_put(jnp.int32(0), shardings.step), trained, moments)
            del moments  # a step takes the state's memory for the next one
        del trained, model
        start = int(state.step)
        if start == config.steps:
            return nnx.merge(graph, state.trained, frozen)
        update = make_update(graph, optimizer, shardings, accumulate=config.summed_parts)
        programs = _compile(update, state, frozen, stage, mesh)
        tester = Tester(graph, stage.tests, mesh)
        inputs = batches(
            stage.examples,
            plan,
            seed=seed,
            start=start,
            stop=config.steps,
            workers=workers,
            sharding=batch_sharding(mesh),
        )
        traced = range(min(start + 3, config.steps), min(start + 2 + profile, config.steps) + 1)
        running: deque[tuple[int, Any]] = deque()  # steps that the devices may still be at
        with _signals() as signalled, _Log(folder, stage, schedule, programs, start) as log:
            if config.test_every and not start:  # finds out as well whether that fits
                log.tested(0, tester(state.trained, frozen))

            def settle(leave: int) -> int:
                """Waits for all steps but the last few, and returns the signal that came with them."""
                came = 0
                while len(running) > leave:
                    step, metrics = running.popleft()
                    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                    came = max(came, int(values.pop("signal")))
                    if came == HOST_FAILED:
                        raise failure or HostFailed(
                            f"{stage.name}: another host has failed; its log says why."
                        )
                    if not values.pop("finite"):
                        checkpoints.save(step - 1, state)
                        checkpoints.wait()
                        raise FloatingPointError(_explain(step, values, stage, folder))
                    log.finished(step, values)
                return came

            failure = None
            for step in range(start + 1, config.steps + 1):
                program, number = programs[plan.batch(step - 1).bucket], signalled()
                try:
                    with log.waiting():
                        batch = next(inputs) if failure is None else program.blank(mesh)
                except CorruptRecord as error:
                    # The others learn it from this step, and meanwhile are in the next one.
                    batch, number, failure = program.blank(mesh), HOST_FAILED, error
                if traced and step == traced[0] and hosts.is_first():
                    jax.profiler.start_trace(str(folder / "profile"))
                state, metrics = program.run(state, frozen, batch, _control(mesh, seed, step, number))
                running.append((step, metrics))
                save = step % config.save_every == 0 or step == config.steps
                last_traced = bool(traced) and step == traced[-1]
                # While a step runs the next one waits on the device, and no more: a signal is known soon.
                came = settle(0 if save or last_traced else 1)
                if last_traced and hosts.is_first():
                    jax.profiler.stop_trace()
                if save or came:
                    came = max(came, settle(0))
                    tested = None
                    if config.test_every and step % config.test_every == 0:
                        tested = log.tested(step, tester(state.trained, frozen))
                    log.flush()
                    checkpoints.save(step, state, tested)
                if step == config.steps:
                    came = max(came, hosts.largest(signalled()))
                if came:
                    checkpoints.wait()
                    raise Stopped(f"{stage.name} stopped at step {step} of {config.steps}", came)
    return nnx.merge(graph, state.trained, frozen)


def abstract_state(
    trained: nnx.State, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """The shapes of a TrainState, and where its arrays lie."""
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(optimizer.init, trained))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


@dataclasses.dataclass(frozen=True)
class Program:
    """A step for the batches of one bucket, compiled; the model's floating-point operations in it; and the
    shapes of its batches."""

    run: Callable
    model_flops: int
    batch: dict[str, jax.ShapeDtypeStruct]

    def blank(self, mesh: Mesh) -> dict[str, jax.Array]:
        """A batch of zeros, for a host that has none and must not leave the others alone in a step."""
        sharding = batch_sharding(mesh)
        return {
            name: jax.make_array_from_callback(
                x.shape, sharding, lambda index, x=x: np.zeros(sharding.shard_shape(x.shape), x.dtype)
            )
            for name, x in self.batch.items()
        }


def _compile(
    update: Callable, state: TrainState, frozen: nnx.State, stage: Stage, mesh: Mesh
) -> list[Program]:
    """A program for each bucket. Compiled ahead, so that a batch of another shape is an error, and not
    another minute of compiling; all at once, as the compiler uses few cores for one."""
    began, steps = time.monotonic(), []
    for batch in stage.plan.one_of_each():
        hosts.say(
            f"{stage.name}: compiling a step of {len(batch.indices)} recordings of up to "
            f"{batch.num_samples / audio.SAMPLE_RATE:.2f} s for {mesh.size} x "
            f"{mesh.devices.flat[0].device_kind} ..."
        )
        arrays = _abstract_batch(stage.examples, batch, mesh)
        with jax.set_mesh(mesh):
            traced = update.trace(state, frozen, arrays, _control(mesh, 0, 1, 0))
            steps.append((traced.lower(), flops.count(traced.jaxpr).model, arrays))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(lambda step: Program(step[0].compile(), *step[1:]), steps))
    hosts.say(f"{stage.name}: compiled in {time.monotonic() - began:.0f} s")
    return programs


def _abstract_batch(examples: Examples, batch: Batch, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a whole batch, found by reading some of its recordings."""
    size = len(batch.indices)
    return {
        name: jax.ShapeDtypeStruct((size, *rows.shape[1:]), rows.dtype, sharding=batch_sharding(mesh))
        for name, rows in examples.rows(batch, range(min(8, size)), 0).items()
    }


def _control(mesh: Mesh, seed: int, step: int, number: int) -> dict[str, Any]:
    """What a step is told besides its batch (see `make_update`): `number` is this host's signal, or 0."""
    sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    signals = jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.array([number], np.int32))
    return {"seed": np.uint32(seed), "step": np.int32(step - 1), "signal": signals}


def _explain(step: int, values: dict[str, float], stage: Stage, folder: epath.Path) -> str:
    """Writes down what a step that is not finite was made of, and says so."""
    batch = stage.plan.batch(step - 1)
    ids = [stage.examples.corpus[index].id for index in batch.indices]
    file = folder / "not_finite.json"
    if hosts.is_first():
        commands.write_text(file, json.dumps({"step": step, **values, "examples": ids}, indent=1) + "\n")
    return (
        f"{stage.name}: the loss of step {step} is {values['loss']}, the norm of its gradient "
        f"{values['gradient_norm']}; its examples are {', '.join(ids[:8])}{', ...' * (len(ids) > 8)} (all in "
        f"{file}). The state before it is saved: the same command does that step again. Look at "
        "those recordings, or begin again in another folder (--set run=) with a smaller learning rate "
        "(optim.lr) or a longer warm-up (optim.warmup_steps)."
    )


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Catches Ctrl-C and SIGTERM meanwhile; the function given says which has come, 0 for none.

    A second Ctrl-C interrupts at once.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def remember(number: int, _) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        if came:  # whoever shuts a host down may send several SIGTERMs
            return
        came.append(number)
        print("\nstopping after this step, with a checkpoint ...", file=sys.stderr, flush=True)

    before = [signal.signal(number, remember) for number in numbers]
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)


class Tester:
    """The mean losses on test sets: over their whole batches, of tokens over all tokens."""

    def __init__(self, graph: nnx.GraphDef, tests: Mapping[str, tuple[Examples, Plan]], mesh: Mesh):
        self.tests, self.mesh = tests, mesh
        self._loss = jax.jit(
            lambda trained, frozen, batch, seed: nnx.merge(graph, trained, frozen).loss(
                batch, jax.random.key(seed), train=False
            ),
            out_shardings=replicated(mesh),
        )

    def __call__(self, trained: nnx.State, frozen: nnx.State) -> dict[str, dict[str, float]]:
        """By test set: "loss", and its parts by name."""
        return {name: self._mean(trained, frozen, *test) for name, test in self.tests.items()}

    def _mean(
        self, trained: nnx.State, frozen: nnx.State, examples: Examples, plan: Plan
    ) -> dict[str, float]:
        number, rows = plan.batches_per_epoch, []
        inputs = batches(examples, plan, seed=0, stop=number, sharding=batch_sharding(self.mesh))
        for step in tqdm.trange(number, desc="test", unit="batch", leave=False, disable=not hosts.is_first()):
            batch = next(inputs)
            del batch[SKIPPED]
            with jax.set_mesh(self.mesh):
                loss, parts = jax.device_get(self._loss(trained, frozen, batch, np.uint32(step)))
            rows.append({"loss": float(loss), **{part: float(value) for part, value in parts.items()}})
        weights = [row.pop("tokens", 1.0) for row in rows]
        return {key: float(np.average([row[key] for row in rows], weights=weights)) for key in rows[0]}


class _Log:
    """The numbers of a run as it goes: progress bar, metrics.jsonl and TensorBoard, on the first host."""

    def __init__(
        self,
        folder: epath.Path,
        stage: Stage,
        schedule: optax.Schedule,
        programs: list[Program],
        start: int,
    ):
        self.file, self.stage, self.schedule, self.programs = (
            folder / "metrics.jsonl",
            stage,
            schedule,
            programs,
        )
        chip = chip_of(jax.devices()[0].device_kind)
        self.peak = None if chip is None else chip.peak / chip.devices * jax.device_count()
        # What a killed run wrote after its last checkpoint is done again; its last line may be half a line.
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        self.lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        self.skipped = max((json.loads(line).get("skipped", 0) for line in self.lines), default=0)
        self.board = None
        if hosts.is_first():
            commands.write_text(self.file, "".join(self.lines))
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm.tqdm(
            total=stage.config.steps,
            initial=start,
            desc=stage.name,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not hosts.is_first(),
        )
        self._begin()

    def _begin(self) -> None:
        self.began, self.steps, self.samples, self.padded, self.flops = time.monotonic(), 0, 0, 0, 0
        self.waited = 0.0

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            self.board.close()
            self.flush()
        self.bar.close()

    def flush(self) -> None:
        """Brings what was written to a bucket, whose files can't be appended to."""
        if self.board is not None and not commands.can_append(self.file):
            commands.write_text(self.file, "".join(self.lines))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def finished(self, step: int, values: dict[str, float]) -> None:
        """Counts a step, and writes every `log_every`th and the last: its metrics, and the speed since."""
        planned = self.stage.plan.batch(step - 1)
        self.steps += 1
        self.samples += int(self.stage.plan.num_samples[planned.indices].sum())
        self.padded += planned.indices.size * planned.num_samples
        self.flops += self.programs[planned.bucket].model_flops
        self.skipped += int(values.pop("skipped"))
        self.bar.update()
        if step % self.stage.config.log_every and step < self.stage.config.steps:
            return
        seconds = max(time.monotonic() - self.began, 1e-9)
        speed = {
            "step_seconds": seconds / self.steps,
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

    def tested(self, step: int, losses: dict[str, dict[str, float]]) -> dict[str, float]:
        """Writes the losses on test sets, and their mean, test_loss, which it returns."""
        row = {"test_loss": float(np.mean([parts["loss"] for parts in losses.values()]))}
        self._write(
            step, row | {f"test/{name}/{k}": v for name, parts in losses.items() for k, v in parts.items()}
        )
        self._begin()  # the time that this took is no step's
        self.bar.write(f"step {step}: test_loss {row['test_loss']:.4f}", file=sys.stderr)
        return row

    def _write(self, step: int, row: dict[str, float]) -> None:
        if self.board is None:
            return
        self.lines.append(json.dumps({"step": step, **row}) + "\n")
        if commands.can_append(self.file):
            with open(self.file, "a") as file:
                file.write(self.lines[-1])
        for name, value in row.items():
            self.board.add_scalar(name, value, step)


class Run:
    """A run that has been checked whole, up to its first step; `train` trains its stages.

    All that can be wrong with devices, folders, recordings, texts, vocabularies and sizes is found here, and
    leaves no trace: FileNotFoundError and ValueError say what to change. All hosts make one together.
    """

    def __init__(self, config: Config):
        self.config = config
        self.mesh = make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.model))
        if config.data.frames is not None and jax.process_count() > 1:
            raise ValueError("data.frames are made by one host, and there are several: set it to null.")
        corpus = Corpus([DataSet(one.folder) for one in config.data.train.values()])
        self.identity: dict[str, Any] = {
            "config": _fixed(config.model_dump(mode="json")),
            "data": [data_set.fingerprint for data_set in corpus.data_sets],
        }
        _check_folder(config.run, self.identity)
        _check_writable(config.run)
        rngs = nnx.Rngs(config.seed)
        dtype = jnp.dtype(config.dtype)
        self.parts = assemble.parts_of(config)
        self._check_window()
        encoder = assemble.load_encoder(config.encoder.folder, self.parts, dtype=dtype, mesh=self.mesh)
        self.identity["encoder"] = _tower_identity(config.encoder.folder, encoder)
        speech = self._waveforms(corpus, encoder)
        self.tests = {name: DataSet(folder) for name, folder in config.data.test.items()}
        test_speech = {name: self._waveforms(Corpus([test]), encoder) for name, test in self.tests.items()}
        options: dict[str, Any] = dict(
            max_tokens=config.data.max_text_tokens, skip_corrupt=config.data.skip_corrupt
        )
        self.aligner = self.model = None
        self.stages: list[Stage] = []
        if config.stage1 is not None:
            tokenizer = prompts.load_tokenizer(config.stage1.tokenizer)
            self.identity["stage1.tokenizer"] = prompts.fingerprint(tokenizer)
            words = max(tokenizer.get_vocab().values()) + 1
            # One more token begins a text to generate.
            self.aligner = assemble.new_aligner(config, encoder, words + 1, self.mesh, rngs)
            vocab_size = self.aligner.adapter.vocab_size

            def aligned(speech: Waveforms, plan: Plan) -> AlignmentExamples:
                return AlignmentExamples(speech.corpus, speech, tokenizer, vocab_size, plan, **options)

            self._add_stage("stage1", config.stage1, speech, test_speech, aligned)
            _try(self.aligner, self.stages[-1])
        if config.stage2 is not None:
            remat = config.stage2.remat
            self.llm = pretrained.load_llm(config.llm, dtype=dtype, mesh=self.mesh, remat=remat)
            self.identity["llm"] = _tower_identity(config.llm, self.llm)
            vocab_size = self.llm.config.vocab_size
            self.prompter = prompts.Prompter.from_folder(config.llm, vocab_size)
            self.identity["llm tokenizer and template"] = prompts.fingerprint(self.prompter.tokenizer)
            tasks = _tasks(config)

            def instructed(speech: Waveforms, plan: Plan) -> InstructionExamples:
                training = speech.corpus is corpus
                some = tasks if training else [_tasks_of(speech.corpus, config.stage2.tasks)]
                return InstructionExamples(
                    speech.corpus, speech, self.prompter, vocab_size, some, plan, **options
                )

            self._add_stage("stage2", config.stage2, speech, test_speech, instructed)
            for test in self.tests.values():
                check_tasks(test, config.test_languages)
            if self.aligner is None:
                self.model = assemble.new_speech_llm(config, encoder, self.llm, self.mesh, rngs)
            else:
                self.model = self._stage2_model(rngs)
            _try(self.model, self.stages[-1])
        if (start := config.init_from) is not None:
            self.identity["init_from"] = {"hash": tensors.hash_of(start), "path": str(start)}
        _check_folder(config.run, self.identity)
        if config.data.frames is not None:
            frames = keep_frames(config.data.frames, speech, encoder)
            for stage in self.stages:
                stage.examples.speech = frames
        _claim_folder(config, self.identity)

    def _check_window(self) -> None:
        """Raises ValueError for recordings longer than the encoder hears at once."""
        _, encoder = pretrained.encoder_config(self.config.encoder.folder)
        most, seconds = encoder.max_samples, self.config.data.max_seconds
        if most is not None and round(seconds * audio.SAMPLE_RATE) > most:
            raise ValueError(
                f"data.max_seconds={seconds:g} is more than the {most / audio.SAMPLE_RATE:g} s that the "
                f"encoder in {self.config.encoder.folder} hears at once: set data.max_seconds to that, and "
                "prepare the data with --max-seconds."
            )

    def _waveforms(self, corpus: Corpus, encoder: nnx.Module) -> Waveforms:
        shortest = min_samples(encoder.config, self.parts.adapter)
        return Waveforms(corpus, self.config.data.max_seconds, min_samples=shortest)

    def _add_stage(
        self,
        name: str,
        config: StageConfig,
        speech: Waveforms,
        test_speech: dict[str, Waveforms],
        make_examples: Callable[[Waveforms, Plan], AlignmentExamples | InstructionExamples],
    ) -> None:
        plan = make_plan(self.config, speech.corpus, config)
        _say_counts(self.config, speech.corpus, name, config)
        parts = batch_parts(self.mesh)
        needed = parts * config.accumulate
        for bucket in plan.buckets:
            if bucket.batch_size % needed:
                raise ValueError(
                    f"{name}: batches of {bucket.batch_size} can't be split into {needed} equal parts "
                    f"(mesh.data * mesh.fsdp = {parts}, times accumulate): make batch_size and "
                    f"data.batch_multiple multiples of {needed}, or choose another mesh."
                )
        tests = {}
        for test, waveforms in test_speech.items():
            (data_set,) = waveforms.corpus.data_sets
            tasks = None if name == "stage1" else _tasks_of(waveforms.corpus, config.tasks)
            used = data_set.has_speech if tasks is None else have_any(data_set, tasks)
            if not used.any():
                hosts.say(f"{name}: in data.test.{test} nobody speaks: it has no part in the loss.")
                continue
            test_plan = _test_plan(waveforms, used, config.batch_size, parts, test)
            tests[test] = (make_examples(waveforms, test_plan), test_plan)
        self.stages.append(Stage(name, config, make_examples(speech, plan), plan, tests))

    def train(self, profile: int = 0) -> dict[str, Any]:
        """Trains what is not trained yet, and returns the scores by stage. Raises as the function `train`."""
        train_stage = {"stage1": self._train_stage1, "stage2": self._train_stage2}
        return {stage.name: train_stage[stage.name](stage, profile) for stage in self.stages}

    def _stage2_model(self, rngs: nnx.Rngs) -> SpeechLLM:
        """Stage 2 on what stage 1 has trained."""
        lora = self.config.stage2.lora
        return assemble.from_aligner(self.aligner, self.llm, lora_config=lora, rngs=rngs)

    def _run(self, model: nnx.Module, stage: Stage, folder: epath.Path, profile: int) -> nnx.Module:
        config = self.config
        return train(
            model,
            stage,
            folder,
            self.mesh,
            seed=config.seed,
            identity=self.identity,
            workers=config.data.workers,
            profile=profile,
        )

    def _train_stage1(self, stage: Stage, profile: int) -> dict[str, Any]:
        folder = _stage_folder(self.config, stage.name)
        self.aligner = self._run(self.aligner, stage, folder, profile)
        assemble.save(self.aligner, folder / "adapter.safetensors")
        if not stage.config.evaluate:
            return {}
        graph, trained, frozen = partition(self.aligner)
        return _once(folder / "results.json", lambda: Tester(graph, stage.tests, self.mesh)(trained, frozen))

    def _train_stage2(self, stage: Stage, profile: int) -> dict[str, Any]:
        config, folder = self.config, _stage_folder(self.config, stage.name)
        if self.aligner is not None:
            self.model = self._stage2_model(nnx.Rngs(config.seed))
        self.model = self._run(self.model, stage, folder, profile)
        settings = ModelConfig(
            encoder=Tower.of(config.encoder.folder),
            llm=Tower.of(config.llm),
            max_seconds=config.data.max_seconds,
            max_new_tokens=config.max_new_tokens,
            margin=config.margin,
            dtype=config.dtype,
        )
        sparqle = SparQLe(self.model, self.prompter, settings, self.mesh)
        sparqle.save_pretrained(folder)
        if not stage.config.evaluate:
            return {}
        return _once(
            folder / "results.json",
            lambda: _evaluate_answers(sparqle, self.tests, config.test_languages),
        )


def _tasks(config: Config) -> list[dict[str, float]]:
    """The tasks of stage 2 for each training set, by weight."""
    return [one.tasks or config.stage2.tasks for one in config.data.train.values()]


def _tasks_of(corpus: Corpus, tasks: dict[str, float]) -> dict[str, float]:
    """Those of the tasks that a test set has answers to."""
    there = (TRANSCRIBE, *corpus.data_sets[0].languages)
    return {task: weight for task, weight in tasks.items() if task in there} or {TRANSCRIBE: 1.0}


def _used(config: Config, corpus: Corpus, stage: StageConfig) -> list[np.ndarray]:
    """bool [N] for each training set: which of its utterances a stage trains on.

    In stage 1 those in which somebody speaks, in stage 2 those that have an answer to one of its tasks.
    Raises ValueError for a set in which there are none, and for a task that none of a set has.
    """
    if isinstance(stage, Stage1Config):
        used = [data_set.has_speech for data_set in corpus.data_sets]
        for data_set, some in zip(corpus.data_sets, used, strict=True):
            if not some.any():
                raise ValueError(
                    f"in no recording of {data_set.folder} anybody speaks: stage 1 can't use it."
                )
        return used
    for data_set, tasks in zip(corpus.data_sets, _tasks(config), strict=True):
        check_tasks(data_set, tasks)
    return [
        have_any(data_set, tasks) for data_set, tasks in zip(corpus.data_sets, _tasks(config), strict=True)
    ]


def _say_counts(config: Config, corpus: Corpus, name: str, stage: StageConfig) -> None:
    """Prints how many utterances of each training set a stage can use, and for which task."""
    used = _used(config, corpus, stage)
    tasks = [{TRANSCRIBE: 1.0}] * len(used) if isinstance(stage, Stage1Config) else _tasks(config)
    for key, data_set, some, asked in zip(config.data.train, corpus.data_sets, used, tasks, strict=True):
        counts = ", ".join(f"{task} {int((some & data_set.has(task)).sum())}" for task in asked)
        out = len(some) - int(some.sum())
        left_out = f"; {out} have {'no text' if name == 'stage1' else 'none of these'} and are left out"
        hosts.say(f"{name}: data.train.{key} has {len(some)} utterances: {counts}{left_out if out else ''}")


def make_plan(config: Config, corpus: Corpus, stage: StageConfig) -> Plan:
    """The batches of a stage. Raises ValueError as `Plan` does, and for a task that a data set lacks."""
    buckets = config.data.buckets
    used = np.concatenate(_used(config, corpus, stage))
    lengths = (
        choose_buckets(corpus.num_samples[used], buckets)
        if isinstance(buckets, int)
        else [round(seconds * audio.SAMPLE_RATE) for seconds in buckets]
    )
    weights = [one.weight for one in config.data.train.values() if one.weight is not None]
    plan = Plan(
        corpus.num_samples,
        lengths,
        stage.batch_size,
        seed=config.seed,
        multiple=config.data.batch_multiple,
        sizes=corpus.sizes,
        weights=weights or None,
        used=used,
    )
    if len(plan.buckets) < len(lengths):
        hosts.say(
            f"{len(plan.buckets)} buckets instead of {len(lengths)}: an epoch has too few examples for more "
            f"({plan.batches_per_epoch} batches of {stage.batch_size} and up)."
        )
    return plan


def _test_plan(waveforms: Waveforms, used: np.ndarray, batch_size: int, parts: int, name: str) -> Plan:
    """The batches of a test set, all of one length and a multiple of `parts` examples."""
    lengths = waveforms.corpus.num_samples
    number = int(used.sum())
    size = min(batch_size, number) // parts * parts
    if not size:
        raise ValueError(
            f"data.test.{name} has {number} utterances, too few to be split over mesh.data * mesh.fsdp "
            f"= {parts} devices: give more, leave it out, or choose another mesh."
        )
    return Plan(lengths, choose_buckets(lengths[used], 1), size, seed=0, used=used)


def _try(model: Aligner | SpeechLLM, stage: Stage) -> None:
    """Traces the loss of a batch of the longest recordings, without running it: sizes that do not fit raise
    ValueError here."""
    longest = stage.plan.one_of_each()[-1]
    batch = stage.examples.rows(longest, range(min(8, len(longest.indices))), 0)
    del batch[SKIPPED]
    graph, state = nnx.split(model)
    jax.eval_shape(lambda state, key: nnx.merge(graph, state).loss(batch, key), state, jax.random.key(0))


def _fixed(config: Any, key: str = "") -> Any:
    """What of a configuration must stay when a run goes on: all but the keys that are FREE."""
    if not isinstance(config, dict):
        return config
    paths = {name: f"{key}.{name}".removeprefix(".") for name in config}
    return {
        name: _fixed(value, paths[name])
        for name, value in config.items()
        if not re.fullmatch(FREE, paths[name])
    }


def _tower_identity(folder: Path, tower: nnx.Module) -> dict[str, Any]:
    """The hash of a tower's weights, which counts, and where they come from."""
    return {
        "hash": fingerprint(tower),
        "path": str(folder),
        "name": pretrained.hub_name(folder),
        "revision": pretrained.hub_revision(folder),
    }


def _check_folder(folder: epath.Path, identity: dict[str, Any]) -> None:
    """Raises ValueError, listing what differs, when the folder holds another run."""
    if not (folder / IDENTITY).is_file():
        return
    there = json.loads((folder / IDENTITY).read_text())
    wrong = differences({key: there.get(key) for key in identity}, json.loads(json.dumps(identity)))
    if wrong:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(wrong)}. ('data' are the contents of data.train, "
            "'encoder' and 'llm' the weights of the towers.) Choose another folder with --set run=FOLDER, or "
            "delete that one."
        )


def _check_writable(folder: epath.Path) -> None:
    """Raises ValueError when nothing can be written where a local folder is, or is to be made."""
    if "://" in str(folder):
        return
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written to run={folder} ({error}): choose another folder with --set run=."
        ) from error


def _claim_folder(config: Config, identity: dict[str, Any]) -> None:
    """The first host writes down which run the folder holds. Raises ValueError, on all hosts, when it can't,
    and when the others do not see it."""
    failed = ""
    if hosts.is_first() and not (config.run / IDENTITY).is_file():
        try:
            config.run.mkdir(parents=True, exist_ok=True)
            commands.write_text(config.run / "config.json", config.model_dump_json(indent=2) + "\n")
            commands.write_text(config.run / IDENTITY, json.dumps(identity, indent=1) + "\n")
        except Exception as error:  # of a disk, or of a bucket's library
            failed = f": {error}"
    if hosts.largest(bool(failed)):
        raise ValueError(f"nothing can be written to run={config.run}{failed}. Choose another: --set run=.")
    if hosts.largest(not (config.run / IDENTITY).is_file()):
        raise ValueError(
            f"run={config.run} is not the same folder on all hosts: give one that all of them reach, such as "
            "--set run=gs://BUCKET/RUN, or a disk that they share."
        )


def _stage_folder(config: Config, name: str) -> epath.Path:
    folder = config.run / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _once(file: epath.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, kept in a JSON file from the first time on."""
    if hosts.agreed(file.is_file()):
        return json.loads(file.read_text())
    made = make()
    if hosts.is_first():
        commands.write_text(file, json.dumps(made, indent=1) + "\n")
    return made


def _evaluate_answers(
    sparqle: SparQLe, tests: dict[str, DataSet], languages: tuple[str, ...]
) -> dict[str, Any]:
    results, lines = {}, []
    for name, test in tests.items():
        results[name], answers = evaluate(sparqle, test, languages)
        for task in languages:
            if (number := int(test.has(task).sum())) < len(test):
                lines.append(f"{name}: {number} of {len(test)} utterances have a reference in {task}")
        silent = np.flatnonzero(~test.has_speech)
        if len(silent):
            seconds = float(test.num_samples[silent].sum()) / audio.SAMPLE_RATE
            found = without_speech([answers[i][TRANSCRIBE] for i in silent], seconds)
            lines.append(f"{name}: {silence_line(found)}")
    if results:
        hosts.say("\n".join([table(results), *lines]))
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.train", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="a configuration, such as configs/tiny.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one key")
    parser.add_argument(
        "--distributed",
        nargs="*",
        metavar="WHERE",
        help="one of several hosts; they find each other on TPU pods, GKE and Slurm, and elsewhere by: the "
        "first one's ADDRESS:PORT, how many there are, and the number of this one",
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="traces so many steps of each stage for xprof"
    )
    args = parser.parse_args(argv)
    try:
        if args.distributed is not None:
            hosts.join(args.distributed)
        config = read_config(args.config, args.set)
        run = Run(config)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))  # with status 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if jax.config.jax_compilation_cache_dir is None:  # who goes on need not compile again
        jax.config.update("jax_compilation_cache_dir", str(config.run / "compiled"))
    try:
        run.train(args.profile)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there.", file=sys.stderr)
        return stopped.status
    except (FloatingPointError, CorruptRecord, CheckpointError, HostFailed) as error:
        print(error, file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"{config.run} can't be written to: {error}", file=sys.stderr)
        return FAILED
    hosts.say(f"done: {config.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
