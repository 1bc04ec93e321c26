import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_jax.model import RULES, SparQLe, partition
from sparqle_jax.sharding import make_mesh, state_sharding
from tests.conftest import call

SAMPLES, TEXT = 1600, 8


def stage1_batch(rng, size: int = 3) -> dict:
    return dict(
        waveform=rng.normal(size=(size, SAMPLES)).astype(np.float32),
        waveform_mask=np.arange(SAMPLES) < rng.integers(400, SAMPLES, (size, 1)),
        text=rng.integers(4, 70, (size, TEXT)).astype(np.int32),
        text_mask=np.arange(TEXT) < rng.integers(2, TEXT + 1, (size, 1)),
        recording_id=np.arange(size) % (size - 1),
    )


def stage2_batch(rng, size: int = 3) -> dict:
    batch = stage1_batch(rng, size)
    batch = {name: batch[name] for name in ("waveform", "waveform_mask")}
    for name, length, left in (("before", 4, True), ("after", 5, True), ("answer", 6, False)):
        batch[name] = rng.integers(0, 97, (size, length)).astype(np.int32)
        mask = np.arange(length) < rng.integers(1, length + 1, (size, 1))
        batch[f"{name}_mask"] = mask[:, ::-1] if left else mask
    return batch


def padded(batch: dict, rng, **padding: int) -> dict:
    """The batch with more padding, filled with anything: prompts on the left, the rest on the right."""
    out = dict(batch)
    for name, count in padding.items():
        where = (0, 0), ((count, 0) if name in ("before", "after") else (0, count))
        out[name] = np.pad(batch[name], where, constant_values=3)
        out[f"{name}_mask"] = np.pad(batch[f"{name}_mask"], where)
        noise = rng.integers(0, 70, out[name].shape).astype(out[name].dtype)
        out[name] = np.where(out[f"{name}_mask"], out[name], noise)
    return out


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_padding_changes_no_stage_1_loss(aligner, seed):
    rng = np.random.default_rng(seed)
    batch = stage1_batch(rng)
    other = padded(batch, rng, waveform=640, text=3)
    key = jax.random.key(0)  # the same negatives: they depend on similarities, not on padding
    loss, parts = call(aligner.loss, batch, key, train=False)
    other_loss, other_parts = call(aligner.loss, other, key, train=False)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-4)
    for name in ("stc", "stm", "stg"):
        np.testing.assert_allclose(parts[name], other_parts[name], rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_padding_changes_no_stage_2_loss(sparqle, seed):
    rng = np.random.default_rng(seed)
    batch = stage2_batch(rng)
    other = padded(batch, rng, waveform=640, before=2, after=1, answer=3)
    loss, metrics = call(sparqle.loss, batch)
    other_loss, other_metrics = call(sparqle.loss, other)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-4)
    assert metrics["tokens"] == other_metrics["tokens"] == batch["answer_mask"].sum()


def test_an_example_in_a_batch_is_read_as_alone(sparqle):
    """Prompt embeddings and loss, against the same example without any padding."""
    rng = np.random.default_rng(0)
    batch = stage2_batch(rng, 2)
    embeddings, mask = call(sparqle.embed_prompt, batch)
    losses, tokens = [], []
    for row in range(2):
        alone = {}
        for name in ("waveform", "before", "after", "answer"):
            alone[name] = batch[name][row][batch[f"{name}_mask"][row]][None]
            alone[f"{name}_mask"] = np.ones(alone[name].shape, bool)
        losses.append(call(sparqle.loss, alone)[0])
        tokens.append(alone["answer"].size)
        expected, _ = call(sparqle.embed_prompt, alone)
        np.testing.assert_allclose(embeddings[row][mask[row]], expected[0], atol=1e-5)
    np.testing.assert_allclose(call(sparqle.loss, batch)[0], np.average(losses, weights=tokens), rtol=1e-5)


def test_hard_negatives_come_from_the_key(aligner):
    batch = stage1_batch(np.random.default_rng(0), 6)
    losses = [
        call(aligner.loss, batch, jax.random.key(seed), train=False)[1]["stm"].item() for seed in (0, 0, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) > 1


def test_published_behaviour(tiny, sparqle):
    """Inverted encoder mask, and an adapter that looks at all frames: as for golden `frames_published_*`."""
    numbers = tiny.numbers[1]
    mask = numbers["wav_mask"].astype(bool)
    published = tiny.sparqle(compat="published")
    for waveform, given_mask, frames in (
        (numbers["wav"] * mask, mask, numbers["frames_published_padded"]),
        (numbers["wav"], None, numbers["frames_published_unpadded"]),
    ):
        expected = sparqle.projection(call(sparqle.adapter.__call__, frames))
        np.testing.assert_allclose(call(published.embed_speech, waveform, given_mask), expected, atol=1e-4)
        exact = call(sparqle.embed_speech, waveform, given_mask)
        assert np.abs(exact - expected).max() > 1e-3
    with pytest.raises(ValueError, match="compat must be None or 'published', got 'paper'"):
        SparQLe(sparqle.encoder, sparqle.adapter, sparqle.projection, sparqle.llm, compat="paper")


class TestPartition:
    def test_towers_are_frozen_and_the_rest_is_trained(self, aligner, sparqle):
        for model, trained_parts, frozen_parts in (
            (aligner, {"adapter", "heads"}, {"encoder"}),
            (sparqle, {"adapter", "projection"}, {"encoder", "llm"}),
        ):
            graph, trained, frozen = partition(model)
            assert {path[0] for path, _ in nnx.to_flat_state(trained)} == trained_parts
            assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == frozen_parts
            again = nnx.state(nnx.merge(graph, trained, frozen))
            assert jax.tree.structure(again) == jax.tree.structure(nnx.state(model))

    def test_every_parameter_needs_one_rule(self, sparqle):
        with pytest.raises(ValueError, match=r"projection.bias: 0 rules\n  projection.kernel: 0 rules"):
            partition(sparqle, [rule for rule in RULES if "projection" not in rule[0]])
        with pytest.raises(ValueError, match=r"projection.bias: 2 rules"):
            partition(sparqle, [*RULES, (r".*\.bias", "frozen")])


def test_sharded_equals_one_device(aligner, sparqle):
    """With the batch split over 8 devices and the parameters over 4: both losses, and stage 2's gradients."""
    mesh = make_mesh((2, 4, 1))
    rng = np.random.default_rng(0)
    key = jax.random.key(0)

    def run(model, batch, function):
        graph, trained, frozen = partition(model)
        program = jax.jit(lambda trained, frozen, batch: function(graph, trained, frozen, batch))
        expected = program(trained, frozen, batch)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(state, state_sharding(state, mesh)) for state in (trained, frozen)]
            split = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
            return expected, program(*placed, jax.device_put(batch, split))

    def stage1_loss(graph, trained, frozen, batch):
        return nnx.merge(graph, trained, frozen).loss(batch, key)[0]

    def stage2_loss(graph, trained, frozen, batch):
        return nnx.merge(graph, trained, frozen).loss(batch)[0]

    def stage2_gradients(graph, trained, frozen, batch):
        return jax.value_and_grad(lambda t: stage2_loss(graph, t, frozen, batch))(trained)

    one, sharded = run(aligner, stage1_batch(rng, 8), stage1_loss)
    np.testing.assert_allclose(one, sharded, rtol=1e-5)
    (one, gradients), (sharded, sharded_gradients) = run(sparqle, stage2_batch(rng, 8), stage2_gradients)
    np.testing.assert_allclose(one, sharded, rtol=1e-5)
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradients)))
    for a, b in zip(jax.tree.leaves(sharded_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * norm)
