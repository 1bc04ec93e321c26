"""Attention: which implementation is used, and that the fused one is asked for the same."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparqle_jax import layers


def arrays(dtype, head: int = 16) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(3, length, 2, head)), dtype) for length in (5, 7, 7)]


@pytest.mark.parametrize(
    ("platform", "dtype", "head", "fused"),
    [
        ("gpu", jnp.bfloat16, 64, True),
        ("gpu", jnp.float16, 128, True),
        ("gpu", jnp.float32, 64, False),
        ("gpu", jnp.bfloat16, 20, False),
        ("gpu", jnp.bfloat16, 256, False),
        ("tpu", jnp.bfloat16, 64, False),
        ("cpu", jnp.bfloat16, 64, False),
    ],
)
def test_cudnn_is_asked_for_on_gpus_in_16_bits(platform, dtype, head, fused, monkeypatch):
    """By the devices that the program is for, not by those that are here."""
    mesh = SimpleNamespace(abstract_device=SimpleNamespace(platform=platform))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert layers._has_cudnn(arrays(dtype, head)[0]) == fused


@pytest.mark.parametrize("rows", [1, 3])
def test_the_fused_one_sees_the_same_keys(rows, monkeypatch):
    """Its lengths in place of the mask, in XLA's implementation, which is there everywhere; gradients too."""
    query, key, value = arrays(jnp.float32)
    lengths = np.array([7, 3, 1])[:rows]
    mask = (np.arange(7) < lengths[:, None])[:, None, None]
    attend = jax.nn.dot_product_attention
    asked = []

    def stand_in(*args, implementation=None, **options):
        asked.append(implementation)
        return attend(*args, implementation="xla", **options)

    def loss(arrays):
        return jnp.sin(layers.attention(*arrays, mask, seen_first=True)).sum()

    expected = jax.value_and_grad(loss)((query, key, value))
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(layers, "_has_cudnn", lambda query: True)
    found = jax.value_and_grad(loss)((query, key, value))
    assert asked == ["cudnn"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    empty = layers.attention(query, key, value, np.zeros((3, 1, 1, 7), bool), seen_first=True)
    assert np.isfinite(empty).all()


@pytest.mark.parametrize("queries", [1, 5])
def test_a_mask_with_holes_is_not_fused(queries, monkeypatch):
    """Nor is that of one query over a cache whose prompts are padded on the left, which has the shape of one
    that is the same for all queries."""
    query, key, value = arrays(jnp.float32)
    query = query[:, :queries]
    mask = np.random.default_rng(1).random((3, 1, queries, 7)) < 0.5
    expected = layers.attention(query, key, value, mask)
    monkeypatch.setattr(layers, "_has_cudnn", lambda query: True)
    monkeypatch.setattr(layers, "_cudnn_attention", lambda *_: pytest.fail("fused"))
    np.testing.assert_array_equal(layers.attention(query, key, value, mask), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_causal_attention_is_that_of_a_triangular_mask(fused, monkeypatch):
    _, key, value = arrays(jnp.float32)
    attend = jax.nn.dot_product_attention
    expected = attend(value, key, value, mask=np.tri(7, dtype=bool)[None, None])
    monkeypatch.setattr(layers, "_has_cudnn", lambda query: fused)
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation=None, **options: attend(*args, **options),
    )
    np.testing.assert_allclose(layers.attention(value, key, value, causal=True), expected, atol=1e-6)
