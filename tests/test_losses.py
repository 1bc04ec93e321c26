import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparqle_jax import losses


def test_similarity_is_that_of_the_best_query():
    speech = jnp.array([[[1.0, 0], [0, 1]], [[1, 0], [1, 0]]])
    text = jnp.array([[0.0, 1], [0.6, 0.8]])
    expected = [[1.0, 0.8], [0.0, 0.6]]
    np.testing.assert_allclose(losses.similarity(speech, text, 0.5), np.array(expected) / 0.5, rtol=1e-6)


def test_contrastive_loss_by_hand():
    """Two texts of recording 7 share its target: 0.45 each, and 0.1 / 3 for all by smoothing."""
    similarities = jnp.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 3]])
    targets = np.array([[0.45, 0.45, 0], [0.45, 0.45, 0], [0, 0, 0.9]]) + 0.1 / 3
    logs = np.log(np.exp(similarities) / np.exp(similarities).sum(1, keepdims=True))
    expected = -(targets * logs).sum(1).mean()  # the matrix is symmetric: both directions are equal
    actual = losses.contrastive_loss(similarities, jnp.array([7, 7, 4]))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


class TestNegatives:
    ids = jnp.array([1, 1, 2, 3])

    def test_never_of_the_same_recording(self):
        similarities = jax.random.normal(jax.random.key(0), (4, 4))
        draw = jax.jit(jax.vmap(lambda key: losses.draw_negatives(key, similarities, self.ids)))
        speech, text = draw(jax.random.split(jax.random.key(1), 500))
        for drawn in (speech, text):
            assert (self.ids[drawn] != self.ids).all()

    def test_drawn_as_likely_as_similar(self):
        """For a recording by its row of speech by text, for a text by its column."""
        similarities = jnp.log(jnp.array([[9.0, 9, 3, 1], [9, 9, 1, 1], [1, 1, 9, 2], [4, 1, 1, 9]]))
        draw = jax.jit(jax.vmap(lambda key: losses.draw_negatives(key, similarities, self.ids)))
        speech, text = draw(jax.random.split(jax.random.key(1), 4000))
        for drawn, expected in ((text, [0, 0, 0.75, 0.25]), (speech, [0, 0, 0.2, 0.8])):
            share = [(np.asarray(drawn)[:, 0] == j).mean() for j in range(4)]
            np.testing.assert_allclose(share, expected, atol=0.03)

    def test_a_batch_of_one_recording_has_none(self):
        ids, similarities = jnp.array([5, 5]), jnp.zeros((2, 2))
        speech, text = losses.draw_negatives(jax.random.key(0), similarities, ids)
        assert speech.shape == text.shape == (2,)
        logits = jnp.array([[0.0, 1]] * 2 + [[3.0, 0]] * 4)
        expected = -jnp.log(jax.nn.softmax(jnp.array([0.0, 1]))[1])
        np.testing.assert_allclose(losses.matching_loss(logits, ids), expected, rtol=1e-6)
        assert np.isfinite(jax.grad(lambda x: losses.contrastive_loss(x, ids))(similarities)).all()


def test_matching_loss_by_hand():
    """Pairs should be called 1, the others 0; all six count the same."""
    logits = jnp.array([[0.0, 2], [0, 2], [0, 1], [0, 1], [1, 0], [1, 0]])
    right = [np.exp(2) / (1 + np.exp(2))] * 2 + [1 / (1 + np.e)] * 2 + [np.e / (1 + np.e)] * 2
    actual = losses.matching_loss(logits, jnp.array([0, 1]))
    np.testing.assert_allclose(actual, -np.log(right).mean(), rtol=1e-6)


class TestTokenLoss:
    def inputs(self, length):
        rng = np.random.default_rng(0)
        hidden = jnp.asarray(rng.normal(size=(3, length, 5)), jnp.float32)
        table = jnp.asarray(rng.normal(size=(5, 11)), jnp.float32)
        targets = rng.integers(0, 11, (3, length))
        mask = np.arange(length) < np.array([[length], [length // 2], [1]])
        return hidden, table, targets, mask

    @pytest.mark.parametrize("block", [4, 7, 32])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_equals_the_plain_formula(self, block, smoothing):
        hidden, table, targets, mask = self.inputs(10)

        def plain(table):
            logs = jax.nn.log_softmax(hidden @ table)
            likelihood = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
            per_token = -(1 - smoothing) * likelihood - smoothing * logs.mean(-1)
            return per_token[mask].mean()

        def blocked(table):
            return losses.token_loss(
                hidden, targets, mask, lambda x: x @ table, label_smoothing=smoothing, block=block
            )

        for a, b in zip(jax.value_and_grad(plain)(table), jax.value_and_grad(blocked)(table), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_averages_over_the_tokens_of_the_batch(self):
        """Ten long answers and one short: each token weighs the same, not each answer."""
        hidden, table, targets, mask = self.inputs(6)
        whole = losses.token_loss(hidden, targets, mask, lambda x: x @ table)
        parts = [
            losses.token_loss(hidden[i, None], targets[i, None], mask[i, None], lambda x: x @ table)
            for i in range(3)
        ]
        np.testing.assert_allclose(whole, np.average(parts, weights=mask.sum(1)), rtol=1e-5)

    def test_never_holds_all_logits(self):
        """Forward and backward, no array holds the logits of more than `block` positions."""
        hidden, table, targets, mask = self.inputs(64)

        def loss(hidden):
            return losses.token_loss(hidden, targets, mask, lambda x: x @ table, block=8)

        sizes = [
            np.prod(shape)
            for shape in _shapes(jax.make_jaxpr(jax.value_and_grad(loss))(hidden).jaxpr)
            if shape and shape[-1] == 11 and len(shape) >= 3
        ]
        assert sizes
        assert max(sizes) == 3 * 8 * 11

    def test_no_target_at_all_is_zero(self):
        hidden, table, targets, mask = self.inputs(6)
        assert losses.token_loss(hidden, targets, mask & False, lambda x: x @ table) == 0


def _shapes(jaxpr):
    """The shapes of all values in a program, its inner programs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)
