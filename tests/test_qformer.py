import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_jax.adapters.qformer import Adapter as QFormer
from sparqle_jax.adapters.qformer import Config as QFormerConfig
from sparqle_jax.model import SpeechLLM
from sparqle_jax.published import sparqle as published
from tests.conftest import call

CONFIG = QFormerConfig(
    num_queries=4,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
)


@pytest.fixture(scope="module")
def qformer():
    return QFormer(CONFIG, 12, vocab_size=31, rngs=nnx.Rngs(0))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def changed(a, b) -> list[bool]:
    """Which positions of axis 1 differ."""
    return (np.abs(np.asarray(a) - np.asarray(b)).max((0, 2)) > 1e-6).tolist()


def test_cross_attention_in_every_second_layer(qformer):
    assert [qformer.layer(i)[1] is not None for i in range(3)] == [True, False, True]


class TestAttentionPatterns:
    """Each drawing in the docstrings: change one input, see which outputs move."""

    def test_queries_alone(self, qformer, rng):
        frames = rng.normal(size=(1, 5, 12)).astype(np.float32)
        other = frames.copy()
        other[:, 4] = rng.normal(size=12)
        queries, cache = call(qformer.encode_queries, frames)
        assert queries.shape == (1, 4, 16)
        assert [part.shape for part in cache] == [(3, 1, 4, 2, 8)] * 2
        assert changed(queries, call(qformer.encode_queries, other)[0]) == [True] * 4
        unseen = np.array([[True] * 4 + [False]])
        masked, _ = call(qformer.encode_queries, frames, unseen)
        assert changed(masked, call(qformer.encode_queries, other, unseen)[0]) == [False] * 4

    def test_text_alone_sees_both_ways(self, qformer):
        ids, mask = np.array([[1, 2, 3, 4]]), np.ones((1, 4), bool)
        first = call(qformer.encode_text, ids, mask)
        assert changed(first, call(qformer.encode_text, np.array([[1, 2, 3, 5]]), mask)) == [True] * 4

    def test_pairs_see_each_other(self, qformer, rng):
        frames = rng.normal(size=(1, 5, 12)).astype(np.float32)
        mask = np.array([[True, True, False]])
        queries = call(qformer.encode_pairs, frames, None, np.array([[1, 2, 3]]), mask)
        assert queries.shape == (1, 4, 16)
        other_text = call(qformer.encode_pairs, frames, None, np.array([[1, 5, 3]]), mask)
        assert changed(queries, other_text) == [True] * 4
        other_padding = call(qformer.encode_pairs, frames, None, np.array([[1, 2, 9]]), mask)
        assert changed(queries, other_padding) == [False] * 4
        other_frames = rng.normal(size=(1, 5, 12)).astype(np.float32)
        other = call(qformer.encode_pairs, other_frames, None, np.array([[1, 2, 3]]), mask)
        assert changed(queries, other) == [True] * 4

    def test_causal_text_sees_queries_and_the_past(self, qformer, rng):
        frames = rng.normal(size=(1, 5, 12)).astype(np.float32)
        _, cache = call(qformer.encode_queries, frames)
        _, other_cache = call(qformer.encode_queries, rng.normal(size=(1, 5, 12)).astype(np.float32))
        mask = np.ones((1, 4), bool)
        text = call(qformer.encode_text_causally, np.array([[30, 2, 3, 4]]), mask, cache)
        other = call(qformer.encode_text_causally, np.array([[30, 2, 9, 4]]), mask, cache)
        assert changed(text, other) == [False, False, True, True]
        other = call(qformer.encode_text_causally, np.array([[30, 2, 3, 4]]), mask, other_cache)
        assert changed(text, other) == [True] * 4
        assert call(qformer.lm_logits, text).shape == (1, 4, 31)


@settings(max_examples=15, deadline=None)
@given(num_frames=st.integers(1, 9), length=st.integers(1, 7), seed=st.integers(0, 2**16))
def test_padding_changes_nothing(qformer, num_frames, length, seed):
    rng = np.random.default_rng(seed)
    frames = rng.normal(size=(2, 12, 12)).astype(np.float32)
    ids = rng.integers(0, 31, (2, 10))
    frames_mask = np.broadcast_to(np.arange(12) < num_frames, (2, 12))
    mask = np.broadcast_to(np.arange(10) < length, (2, 10))
    other_frames = np.where(frames_mask[..., None], frames, 7.0)[:, :10].astype(np.float32)
    other_ids = np.where(mask, ids, 5)[:, :8]

    queries, cache = call(qformer.encode_queries, frames, frames_mask)
    other_queries, other_cache = call(qformer.encode_queries, other_frames, frames_mask[:, :10])
    np.testing.assert_allclose(queries, other_queries, atol=1e-5)
    pairs = call(qformer.encode_pairs, frames, frames_mask, ids, mask)
    other = call(qformer.encode_pairs, other_frames, frames_mask[:, :10], other_ids, mask[:, :8])
    np.testing.assert_allclose(pairs, other, atol=1e-5)
    text = call(qformer.encode_text, ids, mask)
    other = call(qformer.encode_text, other_ids, mask[:, :8])
    np.testing.assert_allclose(text[:, :length], other[:, :length], atol=1e-5)
    text = call(qformer.encode_text_causally, ids, mask, cache)
    other = call(qformer.encode_text_causally, other_ids, mask[:, :8], other_cache)
    np.testing.assert_allclose(text[:, :length], other[:, :length], atol=1e-5)


def test_without_the_text_half(rng):
    qformer = QFormer(CONFIG, 12, rngs=nnx.Rngs(0))
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(qformer))}
    assert not any("text" in name or "word" in name or "lm_" in name for name in names)
    queries, mask = qformer(rng.normal(size=(2, 5, 12)).astype(np.float32))
    assert queries.shape == (2, 4, 16)
    assert mask.shape == (2, 4)
    assert mask.all()
    with pytest.raises(ValueError, match="no text half"):
        qformer.encode_text(np.zeros((1, 2), int), np.ones((1, 2), bool))


def test_dropout_is_on_with_a_key_alone(qformer, rng):
    frames = rng.normal(size=(1, 5, 12)).astype(np.float32)
    first, second = (call(qformer.__call__, frames, None, jax.random.key(seed))[0] for seed in (0, 1))
    again, _ = call(qformer.__call__, frames, None, jax.random.key(0))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3
    samples = [call(qformer.__call__, frames, None, jax.random.key(seed))[0] for seed in range(100)]
    without, _ = call(qformer.__call__, frames)
    assert np.abs(np.mean(samples, 0) - without).mean() < np.abs(samples[0] - without).mean() / 2


def test_too_long_a_text(qformer):
    with pytest.raises(ValueError, match="padded to 21 tokens but the Q-Former has 20 position"):
        qformer.encode_text(np.zeros((1, 21), int), np.ones((1, 21), bool))


def test_sizes_that_can_not_be():
    with pytest.raises(ValueError, match="width 10 is not a multiple of the number of attention heads 4"):
        QFormer(QFormerConfig(hidden_size=10, num_attention_heads=4), 12, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"cross_attention_freq\n.*greater than 0"):
        QFormerConfig(cross_attention_freq=0)


PLACED = CONFIG.model_copy(update={"span_frames": 20})


def test_attention_is_the_weights_that_the_cross_attention_uses(rng):
    qformer = QFormer(PLACED, 12, rngs=nnx.Rngs(0))
    frames, mask = rng.normal(size=(2, 20, 12)).astype(np.float32), np.arange(20) < [[20], [11]]
    weights = call(qformer.attention, frames, mask)
    assert weights.shape == (2, 2, 4, 20)  # the cross-attentions of layers 0 and 2
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert weights[:, 1, :, 11:].max() == 0

    attention = qformer.layer(0)[1].attention
    x = rng.normal(size=(2, 4, 16)).astype(np.float32)
    keys, values = attention.keys_values(frames)
    by_hand = np.einsum("BNTC,BCNH->BTNH", attention.weights(x, frames, mask[:, None, None]), values)
    expected = attention(x, (keys, values), mask[:, None, None])
    np.testing.assert_allclose(attention.out(by_hand.reshape(2, 4, 16)), expected, atol=1e-5)


def test_with_places_queries_tell_frames_of_another_order_apart(rng):
    frames = rng.normal(size=(1, 20, 12)).astype(np.float32)
    for config, differ in ((PLACED, True), (CONFIG, False)):
        qformer = QFormer(config, 12, rngs=nnx.Rngs(0))
        there, back = (call(qformer.__call__, f)[0] for f in (frames, frames[:, ::-1]))
        assert bool(np.abs(there - back).max() > 1e-5) == differ  # small, as attention starts out even


def test_places_are_kept_with_the_adapter(tmp_path, tiny, sparqle):
    config = sparqle.adapter.config.model_copy(update={"span_frames": 150})
    model = SpeechLLM(sparqle.encoder, QFormer(config, 48, rngs=nnx.Rngs(0)), sparqle.projection, sparqle.llm)
    published.save(model, tmp_path / "a.safetensors")
    assert published.qformer_config(tmp_path / "a.safetensors") == (config, None)
