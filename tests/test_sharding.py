"""The mesh, and that a step does the same on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparqle_jax.adapters.qformer import Adapter as QFormer
from sparqle_jax.adapters.qformer import Config as QFormerConfig
from sparqle_jax.aligner import STAGE_1_LOSSES, Aligner, AlignmentHeads
from sparqle_jax.config import OptimConfig
from sparqle_jax.data.pipeline import SKIPPED
from sparqle_jax.encoders.hubert import Config as HubertConfig
from sparqle_jax.encoders.hubert import Encoder as Hubert
from sparqle_jax.llms.decoder import LLM as Decoder
from sparqle_jax.llms.decoder import Config as DecoderConfig
from sparqle_jax.model import Projection, SpeechLLM, partition
from sparqle_jax.sharding import batch_sharding, make_mesh, state_sharding
from sparqle_jax.step import TrainState, make_optimizer, make_update, state_shardings
from tests.batches import stage1_batch, stage2_batch

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
# All widths are multiples of 8, which is how far they are split.
HUBERT = HubertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    conv_dim=(16, 16),
    conv_stride=(20, 8),
    conv_kernel=(20, 8),
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
QFORMER = QFormerConfig(
    num_queries=4,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)
LLM = DecoderConfig(
    vocab_size=104,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def make_aligner(qformer: QFormerConfig, losses=STAGE_1_LOSSES, in_parts: int = 1) -> Aligner:
    rngs = nnx.Rngs(0)
    adapter = QFormer(qformer, 32, vocab_size=71, rngs=rngs)
    heads = AlignmentHeads(16, 8, rngs=rngs)
    return Aligner(Hubert(HUBERT, rngs=rngs), adapter, heads, losses=losses, accumulate=in_parts)


def make_sparqle(qformer: QFormerConfig) -> SpeechLLM:
    rngs = nnx.Rngs(0)
    adapter = QFormer(qformer, 32, rngs=rngs)
    projection = Projection(qformer, 32, rngs=rngs)
    return SpeechLLM(Hubert(HUBERT, rngs=rngs), adapter, projection, Decoder(LLM, rngs=rngs))


MODELS = {"stage1": (make_aligner, stage1_batch), "stage2": (make_sparqle, stage2_batch)}


def one_step(stage, shape, qformer=QFORMER, *, accumulate: int = 1, devices=None, **options):
    """The TrainState after one step of 16 examples on a mesh, and its metrics."""
    make_model, make_batch = MODELS[stage]
    mesh = make_mesh(shape, devices)
    graph, trained, frozen = partition(make_model(qformer, **options))
    optimizer, _ = make_optimizer(OptimConfig(lr=1e-3, warmup_steps=0), 10)
    shardings = state_shardings(trained, optimizer, mesh)
    trained = jax.device_put(trained, shardings.trained)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trained)
    state = TrainState(jax.device_put(jnp.int32(0), shardings.step), trained, moments)
    frozen = jax.device_put(frozen, state_sharding(frozen, mesh))
    batch = make_batch(np.random.default_rng(0), 16) | {SKIPPED: np.zeros(16, bool)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    control = {"seed": np.uint32(0), "step": np.int32(0), "signal": np.zeros(1, np.int32)}
    with jax.set_mesh(mesh):
        update = make_update(graph, optimizer, shardings, accumulate=accumulate)
        return update(state, frozen, batch, control)


@pytest.fixture(scope="module")
def on_one() -> dict:
    """What one device makes of a step."""
    return {stage: one_step(stage, (1, 1, 1), devices=jax.devices()[:1]) for stage in MODELS}


def assert_same_step(one, other):
    """Loss, gradients (Adam's first moments) and parameters agree to 1e-5 of each array's largest value.

    The gradients of keys' biases are left out: attention does not change with them, so they are rounding.
    Parameters whose gradient is near Adam's epsilon are left out: it makes whole steps of rounding there.
    """
    (state, metrics), (other_state, other_metrics) = one, other
    assert metrics.keys() == other_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    moments, other_moments = (arrays(optax.tree.get(s.optimizer, "mu")) for s in (state, other_state))
    parameters, other_parameters = arrays(state.trained), arrays(other_state.trained)
    assert parameters.keys() == other_parameters.keys() == moments.keys()
    certain = 0
    for path, gradient in moments.items():
        if path[-2:] != ("key", "bias"):
            assert_near(other_moments[path], gradient, f"gradient of {path}")
        large = np.abs(gradient) > 1e-7  # a tenth of the gradient; epsilon is 1e-8
        certain += large.sum()
        if large.any():
            assert_near(other_parameters[path][large], parameters[path][large], f"parameter {path}")
    assert certain > 0.4 * sum(x.size for x in parameters.values())


def arrays(state: nnx.State) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


def assert_near(actual: np.ndarray, expected: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", MODELS)
@pytest.mark.parametrize("shape", MESHES)
def test_a_step_is_the_same_on_every_mesh(stage, shape, on_one):
    step = one_step(stage, shape)
    assert_same_step(on_one[stage], step)
    state = step[0]
    kernel = state.trained["adapter"]["layers"]["query_mlp"]["up"]["kernel"].get_value()
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == (16 // shape[1], 32 // shape[2])


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Without dropout, which draws other numbers in parts; parts have other numbers of tokens."""
    qformer = QFORMER.model_copy(update=dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    whole = one_step("stage2", (1, 1, 1), qformer, devices=jax.devices()[:1])
    assert_same_step(whole, one_step("stage2", (2, 1, 1), qformer, accumulate=4, devices=jax.devices()[:2]))


@pytest.mark.slow
@pytest.mark.parametrize("losses", [("stc", "stm", "stg"), ("stm",)], ids="+".join)
def test_stage_1_in_parts_is_the_whole_batch(losses):
    """Features of all parts are compared, and the same negatives drawn: as in GradCache."""
    qformer = QFORMER.model_copy(update=dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    whole = one_step("stage1", (1, 1, 1), qformer, devices=jax.devices()[:1], losses=losses)
    parts = one_step("stage1", (2, 1, 1), qformer, devices=jax.devices()[:2], losses=losses, in_parts=4)
    assert_same_step(whole, parts)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 1), (2, 4, 1)), ((2, 2, -1), (2, 2, 2)), ((4, 2, 1), (4, 2, 1))],
)
def test_one_size_may_be_what_is_left(sizes, shape):
    assert tuple(make_mesh(sizes).shape.values()) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, -1, 1), "data=3, fsdp=-1, model=1 needs a multiple of 3 devices, but there are 8"),
        ((4, 1, 1), "data=4, fsdp=1, model=1 needs 4 devices, but there are 8"),
        ((-1, -1, 1), "at most one of them -1"),
        ((0, -1, 1), "sizes must be positive"),
    ],
)
def test_a_mesh_that_is_not_all_devices_is_an_error(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def test_what_an_axis_does_not_divide_is_named_with_both_sizes():
    abstract = nnx.eval_shape(lambda: Decoder(dataclasses.replace(LLM, vocab_size=97), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"embeddings.embedding \(97, 32\): 97 is not a multiple of model=8"):
        state_sharding(nnx.state(abstract), make_mesh((1, 1, 8)))


def test_two_dimensions_on_one_axis_are_an_error():
    state = nnx.State({"square": nnx.Param(jnp.zeros((8, 8)), axes=("heads", "mlp"))})
    with pytest.raises(ValueError, match=r"square \(8, 8\): 8 is not the only dimension on model"):
        state_sharding(state, make_mesh((1, 4, 2)))
