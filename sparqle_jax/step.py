"""One training step, a pure function: (TrainState, frozen, batch, control) -> (TrainState, metrics)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparqle_jax.config import OptimConfig
from sparqle_jax.data.pipeline import SKIPPED
from sparqle_jax.sharding import batch_sharding, gathered, like_parameters, replicated, state_sharding


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "trained", "optimizer"], meta_fields=[]
)
@dataclasses.dataclass
class TrainState:
    """The state that a checkpoint holds: the number of steps done, what trains, and the optimizer's state."""

    step: jax.Array
    trained: nnx.State
    optimizer: optax.OptState


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW as the configuration says, and its learning rate by step."""
    warmup = min(config.warmup_steps, steps - 1)
    final = config.final_lr_factor * config.lr
    falling = {
        "cosine": optax.cosine_decay_schedule(config.lr, steps - warmup, config.final_lr_factor),
        "linear": optax.linear_schedule(config.lr, final, steps - warmup),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    parts, begins = [optax.linear_schedule(0.0, config.lr, warmup), falling], [warmup]
    if config.cooldown_steps:
        cooldown = min(config.cooldown_steps, steps - warmup)
        parts.append(optax.linear_schedule(config.lr, final, cooldown))
        begins.append(steps - cooldown)
    schedule = optax.join_schedules(parts, begins)

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
