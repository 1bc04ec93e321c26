"""The training loop: restore, step, log, validate, save, stop."""

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparqle_jax import audio, commands, flops, hosts
from sparqle_jax.checkpoint import Checkpoints
from sparqle_jax.data.dataset import CorruptRecord
from sparqle_jax.data.pipeline import Examples, batches
from sparqle_jax.data.plan import Batch
from sparqle_jax.metrics import Log, Validation
from sparqle_jax.model import partition
from sparqle_jax.sharding import MESH_AXES, batch_sharding, state_sharding
from sparqle_jax.stages import Stage
from sparqle_jax.start import Start
from sparqle_jax.step import Program, TrainState, abstract_state, make_optimizer, make_update, state_shardings

HOST_FAILED = 1000  # a "signal", larger than all, by which a host tells the others that it can't go on


class Stopped(Exception):
    """Training was asked to stop, by a signal of this number, and has saved a checkpoint."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.status = 128 + number


class HostFailed(Exception):
    """Another host has found something with which training can't go on."""


def train(
    model: nnx.Module,
    stage: Stage,
    folder: epath.Path,
    mesh: Mesh,
    *,
    seed: int,
    identity: dict[str, Any],
    start_from: Start | None = None,
    workers: int = 0,
    profile: int = 0,
) -> nnx.Module:
    """The model after `stage.config.steps` steps, from the last checkpoint in `folder` if there is one.

    The model given can't be used any more. identity: of the run (see `Checkpoints`). start_from: the state to
    begin with when there is no checkpoint; None: the model as given, before its first step. profile: how
    many steps to trace for xprof, from the third on. All hosts call this together.
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
        if state is None and start_from is not None:
            state = start_from.load(abstract_state(trained, optimizer, shardings))
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
        began = time.monotonic()
        programs = compile_steps(update, state, frozen, stage, mesh)
        compiling = time.monotonic() - began
        hosts.print_once(f"{stage.name}: compiled in {compiling:.0f} s")
        validation = Validation(graph, stage.valid_sets, mesh)
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
        running: deque[tuple[int, float, Future]] = deque()  # steps that the devices may still be at
        with (
            _signals() as signalled,
            ThreadPoolExecutor(1) as arrivals,
            Log(folder, stage, schedule, programs, start) as log,
        ):
            log.compiled(compiling)
            if config.eval_every and not start:  # finds out as well whether that fits
                log.validated(0, validation(state.trained, frozen))

            def settle(leave: int) -> int:
                """Waits for all steps but the last few, and returns the signal that came with them."""
                came = 0
                while len(running) > leave:
                    step, ready, arrival = running.popleft()
                    values, done = arrival.result()
                    came = max(came, int(values.pop("signal")))
                    if came == HOST_FAILED:
                        raise failure or HostFailed(
                            f"{stage.name}: another host has failed; its log says why."
                        )
                    if not values.pop("finite"):
                        checkpoints.save(step - 1, state)
                        checkpoints.wait()
                        raise FloatingPointError(_explain(step, values, stage, folder))
                    log.finished(step, values, ready, done)
                return came

            failure = None
            for step in range(start + 1, config.steps + 1):
                program, number = programs[plan.batch(step - 1).bucket], signalled()
                try:
                    batch = next(inputs) if failure is None else program.blank(mesh)
                except CorruptRecord as error:
                    # The others learn it from this step, and meanwhile are in the next one.
                    batch, number, failure = program.blank(mesh), HOST_FAILED, error
                ready = time.monotonic()
                if traced and step == traced[0] and hosts.is_first():
                    jax.profiler.start_trace(str(folder / "profile"))
                state, metrics = program.run(state, frozen, batch, control(mesh, seed, step, number))
                running.append((step, ready, arrivals.submit(_arrived, metrics)))
                save = step % config.save_every == 0 or step == config.steps
                last_traced = bool(traced) and step == traced[-1]
                # While a step runs the next one waits on the device, and no more: a signal is known soon.
                came = settle(0 if save or last_traced else 1)
                if last_traced and hosts.is_first():
                    jax.profiler.stop_trace()
                if save or came:
                    came = max(came, settle(0))
                    scores = None
                    if config.eval_every and step % config.eval_every == 0:
                        scores = log.validated(step, validation(state.trained, frozen))
                    with log.saving(step):
                        log.flush()
                        checkpoints.save(step, state, scores)
                        if step == config.steps or came:
                            checkpoints.wait()
                if step == config.steps:
                    came = max(came, hosts.max_over_hosts(signalled()))
                if came:
                    raise Stopped(f"{stage.name} stopped at step {step} of {config.steps}", came)
    return nnx.merge(graph, state.trained, frozen)


def compile_steps(
    update: Callable, state: TrainState, frozen: nnx.State, stage: Stage, mesh: Mesh
) -> list[Program]:
    """A program for each bucket. Compiled ahead, so that a batch of another shape is an error, and not
    another minute of compiling; all at once, as the compiler uses few cores for one."""
    steps = []
    for batch in stage.plan.one_of_each():
        hosts.print_once(
            f"{stage.name}: compiling a step of {len(batch.indices)} recordings of up to "
            f"{batch.num_samples / audio.SAMPLE_RATE:.2f} s for {mesh.size} x "
            f"{mesh.devices.flat[0].device_kind} ..."
        )
        arrays = abstract_batch(stage.examples, batch, mesh)
        with jax.set_mesh(mesh):
            traced = update.trace(state, frozen, arrays, control(mesh, 0, 1, 0))
            steps.append((traced.lower(), flops.count(traced.jaxpr).model, arrays))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda step: Program(step[0].compile(), *step[1:]), steps))


def _arrived(metrics: dict[str, jax.Array]) -> tuple[dict[str, float], float]:
    """The metrics of a step as soon as it is done, and when that was. In a thread of its own: the one that
    hands over the next steps would see it late."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    return values, time.monotonic()


def abstract_batch(examples: Examples, batch: Batch, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a whole batch, found by reading some of its recordings."""
    size = len(batch.indices)
    return {
        name: jax.ShapeDtypeStruct((size, *rows.shape[1:]), rows.dtype, sharding=batch_sharding(mesh))
        for name, rows in examples.rows(batch, range(min(8, size)), 0).items()
    }


def control(mesh: Mesh, seed: int, step: int, number: int) -> dict[str, Any]:
    """A step's input besides its batch (see `make_update`): `number` is this host's signal, or 0."""
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
