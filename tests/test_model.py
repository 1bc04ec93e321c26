import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_jax import assemble
from sparqle_jax.aligner import Aligner
from sparqle_jax.model import SpeechLLM, partition
from sparqle_jax.prompts import collate
from sparqle_jax.sharding import make_mesh, state_sharding
from tests.batches import padded, stage1_batch, stage2_batch
from tests.conftest import call

KEY = jax.random.key(0)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_padding_changes_no_stage_1_loss(aligner, seed):
    rng = np.random.default_rng(seed)
    batch = stage1_batch(rng)
    other = padded(batch, rng, waveform=640, text=3)
    # The same key draws the same negatives: they depend on similarities, not on padding.
    loss, parts = call(aligner.loss, batch, KEY, train=False)
    other_loss, other_parts = call(aligner.loss, other, KEY, train=False)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-4)
    for name in ("stc", "stm", "stg"):
        np.testing.assert_allclose(parts[name], other_parts[name], rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_padding_changes_no_stage_2_loss(sparqle, seed):
    rng = np.random.default_rng(seed)
    batch = stage2_batch(rng)
    other = padded(batch, rng, waveform=640, before=2, after=1, answer=3)
    loss, metrics = call(sparqle.loss, batch, KEY, train=False)
    other_loss, other_metrics = call(sparqle.loss, other, KEY, train=False)
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
        losses.append(call(sparqle.loss, alone, KEY, train=False)[0])
        tokens.append(alone["answer"].size)
        expected, _ = call(sparqle.embed_prompt, alone)
        np.testing.assert_allclose(embeddings[row][mask[row]], expected[0], atol=1e-5)
    np.testing.assert_allclose(
        call(sparqle.loss, batch, KEY, train=False)[0], np.average(losses, weights=tokens), rtol=1e-5
    )


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
        expected = sparqle.projection(call(sparqle.adapter.__call__, frames)[0])
        batch = {"waveform": waveform} | ({} if given_mask is None else {"waveform_mask": given_mask})
        np.testing.assert_allclose(call(published.embed_speech, batch)[0], expected, atol=1e-4)
        exact, _ = call(sparqle.embed_speech, batch)
        assert np.abs(exact - expected).max() > 1e-3
    with pytest.raises(ValueError, match=r"compat must be one of \[None, 'published'\], got 'paper'"):
        SpeechLLM(sparqle.encoder, sparqle.adapter, sparqle.projection, sparqle.llm, compat="paper")


def test_a_prompt_that_ends_with_the_speech(sparqle):
    """Beside one that goes on after it: its answer follows the speech, not the padding."""
    batch = stage2_batch(np.random.default_rng(0), 2)
    batch["after_mask"] = np.array([[False] * 5, [True] * 5])
    alone = {name: value[:1] for name, value in batch.items()}
    alone |= {name: alone[name][:, :0] for name in ("after", "after_mask")}
    parts = [
        call(sparqle.loss, part, KEY, train=False) for part in (alone, {k: v[1:] for k, v in batch.items()})
    ]
    whole, _ = call(sparqle.loss, batch, KEY, train=False)
    weights = [metrics["tokens"] for _, metrics in parts]
    np.testing.assert_allclose(whole, np.average([loss for loss, _ in parts], weights=weights), rtol=1e-5)


def test_padding_may_hold_anything(aligner, sparqle):
    """Even ids that no vocabulary has, such as the -100 of transformers."""
    rng = np.random.default_rng(0)
    for model, batch, names in (
        (aligner, stage1_batch(rng), ["text"]),
        (sparqle, stage2_batch(rng), ["before", "after", "answer"]),
    ):
        other = batch | {name: np.where(batch[f"{name}_mask"], batch[name], -100) for name in names}
        losses = [call(model.loss, b, KEY, train=False)[0] for b in (batch, other)]
        assert np.isfinite(losses[0])
        assert losses[0] == losses[1]
        outside = batch | {names[0]: np.full_like(batch[names[0]], 97)}
        assert np.isnan(call(model.loss, outside, KEY, train=False)[0])


def test_frames_in_a_batch_stand_for_its_waveform(aligner, sparqle):
    rng = np.random.default_rng(0)
    for model, batch in ((aligner, stage1_batch(rng)), (sparqle, stage2_batch(rng))):
        expected, _ = call(model.loss, batch, KEY, train=False)
        frames, mask = call(model.encoder.__call__, batch.pop("waveform"), batch.pop("waveform_mask"))
        loss, _ = call(model.loss, batch | {"frames": frames, "frames_mask": mask}, KEY, train=False)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_stage_2_starts_from_stage_1(aligner, sparqle):
    """The same adapter without its text half; speech goes through it as before."""
    started = assemble.from_aligner(aligner, sparqle.llm, rngs=nnx.Rngs(0))
    waveform = np.random.default_rng(0).normal(size=(1, 1600)).astype(np.float32)
    frames, _ = call(aligner.encoder.__call__, waveform)
    expected = started.projection(call(aligner.adapter.__call__, frames)[0])
    np.testing.assert_allclose(call(started.embed_speech, {"waveform": waveform})[0], expected, atol=1e-5)
    assert started.adapter.vocab_size is None
    names = {path[1] for path, _ in nnx.to_flat_state(partition(started)[1]) if path[0] == "adapter"}
    assert names == {"frames_norm", "query_tokens", "embeddings_norm", "layers", "cross_attentions"}


def test_bfloat16_towers(tiny, sparqle):
    """Frozen weights and products in bfloat16: what trains, its gradients and the loss stay float32."""
    rounded, batch = tiny.sparqle(dtype=jnp.bfloat16), stage2_batch(np.random.default_rng(0))
    graph, trained, frozen = partition(rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}

    @jax.jit
    def loss(trained):
        return nnx.merge(graph, trained, frozen).loss(batch, KEY, train=False)[0]

    value, gradients = jax.value_and_grad(loss)(trained)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(value, call(sparqle.loss, batch, KEY, train=False)[0], rtol=1e-2)


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

    def test_a_parameter_of_no_part(self, sparqle):
        graph, state = nnx.split(sparqle)
        model = nnx.merge(graph, state)
        model.extra = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"extra\.bias trains"):
            partition(model)


@pytest.mark.slow
def test_sharded_equals_one_device(aligner, sparqle):
    """With the batch split over 8 devices and the parameters over 4: both losses, and stage 2's gradients."""
    mesh = make_mesh((2, 4, 1))
    rng = np.random.default_rng(0)

    def run(model, batch, function):
        graph, trained, frozen = partition(model)
        program = jax.jit(lambda trained, frozen, batch: function(graph, trained, frozen, batch))
        expected = program(trained, frozen, batch)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(state, state_sharding(state, mesh)) for state in (trained, frozen)]
            split = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
            return expected, program(*placed, jax.device_put(batch, split))

    def stage1_loss(graph, trained, frozen, batch):
        return nnx.merge(graph, trained, frozen).loss(batch, KEY)[0]

    def stage2_loss(graph, trained, frozen, batch):
        return nnx.merge(graph, trained, frozen).loss(batch, KEY)[0]

    def stage2_gradients(graph, trained, frozen, batch):
        return jax.value_and_grad(lambda t: stage2_loss(graph, t, frozen, batch))(trained)

    one, sharded = run(aligner, stage1_batch(rng, 8), stage1_loss)
    np.testing.assert_allclose(one, sharded, rtol=1e-5)
    (one, gradients), (sharded, sharded_gradients) = run(sparqle, stage2_batch(rng, 8), stage2_gradients)
    np.testing.assert_allclose(one, sharded, rtol=1e-5)
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradients)))
    for a, b in zip(jax.tree.leaves(sharded_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * norm)


def test_without_a_waveform_the_llm_answers_the_text_alone(sparqle):
    batch = collate([([1, 5, 6, 9], [7, 8])], vocab_size=97)
    embeddings, mask = sparqle.embed_prompt(batch)
    np.testing.assert_array_equal(embeddings, sparqle.llm.embed(np.array([[1, 5, 6, 9, 7, 8]])))
    assert mask.all()


def test_losses_that_are_left_out_change_no_other(aligner):
    losses = ("stm",)  # which needs the similarities of stc for its negatives
    batch = stage1_batch(np.random.default_rng(0))
    _, whole = call(aligner.loss, batch, KEY, train=False)
    some = Aligner(aligner.encoder, aligner.adapter, aligner.heads, losses=losses)
    total, parts = call(some.loss, batch, KEY, train=False)
    assert set(parts) == set(losses)
    for name in losses:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)
    np.testing.assert_allclose(total, sum(parts.values()), rtol=1e-6)


def test_an_unknown_loss_is_an_error(aligner):
    with pytest.raises(ValueError, match="choose among"):
        Aligner(aligner.encoder, aligner.adapter, aligner.heads, losses=("stx",))
