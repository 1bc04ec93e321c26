import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_jax.llms.decoder import LLM as Decoder
from sparqle_jax.llms.decoder import Config as DecoderConfig
from sparqle_jax.llms.decoder import RopeScaling, rope_frequencies
from sparqle_jax.sharding import make_mesh, state_sharding
from tests.conftest import call

CONFIG = DecoderConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
WINDOWED = dataclasses.replace(CONFIG, sliding_windows=(None, 3), qk_norm=True, qkv_bias=True)


@pytest.fixture(scope="module", params=[CONFIG, WINDOWED], ids=["plain", "windowed"])
def decoder(request):
    return Decoder(request.param, rngs=nnx.Rngs(0))


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 37, (2, 10)).astype(np.int32)


def test_embeddings_or_ids(decoder, ids):
    from_ids, _ = call(decoder.__call__, ids)
    from_embeddings, _ = call(decoder.__call__, call(decoder.embed, ids))
    np.testing.assert_allclose(from_ids, from_embeddings, atol=1e-6)


def test_causal(decoder, ids):
    hidden, _ = call(decoder.__call__, ids)
    other = ids.copy()
    other[:, 6] = (other[:, 6] + 1) % 37
    hidden_of_other, _ = call(decoder.__call__, other)
    np.testing.assert_allclose(hidden[:, :6], hidden_of_other[:, :6], atol=1e-6)
    assert np.abs(hidden - hidden_of_other)[:, 6:].max() > 1e-3


def test_cached_steps_equal_the_whole(decoder, ids):
    """In pieces of 4, 1 and 5 tokens, in a cache with room to spare."""
    mask = np.ones(ids.shape, bool)
    mask[1, 2:5] = False
    whole, _ = call(decoder.__call__, ids, mask)
    cache, pieces = decoder.init_cache(2, 13), []
    for piece in (slice(0, 4), slice(4, 5), slice(5, 10)):
        hidden, cache = call(decoder.__call__, ids[:, piece], mask[:, piece], cache)
        pieces.append(hidden)
    assert int(cache.length) == 10
    np.testing.assert_allclose(np.concatenate(pieces, 1)[mask], np.asarray(whole)[mask], atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(real=st.lists(st.booleans(), min_size=10, max_size=10).filter(any), seed=st.integers(0, 2**16))
def test_padding_anywhere_changes_nothing(decoder, real, seed):
    """Tokens with holes of padding between them have the states that they have without."""
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(0, 37, (1, 10)).astype(np.int32), np.array([real])
    hidden, _ = call(decoder.__call__, ids, mask)
    count = mask.sum()
    packed = np.zeros((1, 10), np.int32)
    packed[0, :count] = ids[mask]
    expected, _ = call(decoder.__call__, packed, np.arange(10)[None] < count)
    np.testing.assert_allclose(np.asarray(hidden)[mask], expected[0, :count], atol=1e-5)


def test_sliding_window():
    """With one layer and a window of 3, a token depends on itself and the two before it."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, sliding_windows=(3,))
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    ids = np.arange(8, dtype=np.int32)[None]
    other = ids.copy()
    other[0, 2] = 30
    difference = call(decoder.__call__, ids)[0] - call(decoder.__call__, other)[0]
    moved = (np.abs(difference).max(-1) > 1e-6)[0].tolist()
    assert moved == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 4)])
def test_sharded_equals_one_device(ids, shape):
    """On every axis of the mesh at once, and with the heads of keys split four ways."""
    decoder = Decoder(dataclasses.replace(CONFIG, vocab_size=40), rngs=nnx.Rngs(0))
    graph, state = nnx.split(decoder)
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape)])
    run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids)[0])
    with jax.set_mesh(mesh):
        sharded = run(jax.device_put(state, state_sharding(state, mesh)), ids)
    np.testing.assert_allclose(sharded, run(state, ids), atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(ids, remat):
    def gradients(remat):
        decoder = Decoder(CONFIG, remat=remat, rngs=nnx.Rngs(0))
        graph, state = nnx.split(decoder)
        loss = jax.jit(lambda state: jnp.square(nnx.merge(graph, state)(ids)[0]).mean())
        return jax.tree.leaves(jax.grad(loss)(state))

    for a, b in zip(gradients(None), gradients(remat), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_ids_outside_the_vocabulary_are_not_another_tokens(decoder):
    hidden, _ = call(decoder.__call__, np.array([[1, 37], [-1, 2], [3, 36]], np.int32))
    assert np.isnan(hidden).all((1, 2)).tolist() == [True, True, False]
    assert np.isfinite(hidden[2]).all()


def test_bfloat16_stays_near_float32(ids):
    exact = Decoder(CONFIG, rngs=nnx.Rngs(0))
    rounded = Decoder(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(exact)))
    hidden, _ = call(rounded.__call__, ids)
    assert hidden.dtype == jnp.bfloat16
    assert call(rounded.logits, hidden).dtype == jnp.float32
    np.testing.assert_allclose(hidden.astype(jnp.float32), call(exact.__call__, ids)[0], atol=0.1)


class TestConfig:
    def test_defaults_and_families(self):
        llama = DecoderConfig.from_dict({"model_type": "llama"})
        assert (llama.num_key_value_heads, llama.head_dim, llama.rope_theta) == (32, 128, 10_000.0)
        assert DecoderConfig.from_dict({"model_type": "mistral"}).sliding_windows == (4096,) * 32
        assert not DecoderConfig.from_dict({"model_type": "mistral", "sliding_window": None}).sliding_windows
        qwen2 = DecoderConfig.from_dict({"model_type": "qwen2", "sliding_window": 8})
        assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.sliding_windows) == (True, False, ())
        qwen2 = DecoderConfig.from_dict(
            dict(
                model_type="qwen2",
                num_hidden_layers=3,
                use_sliding_window=True,
                sliding_window=8,
                max_window_layers=1,
            )
        )
        assert qwen2.sliding_windows == (None, 8, 8)
        qwen3 = DecoderConfig.from_dict({"model_type": "qwen3", "num_key_value_heads": 8})
        assert (qwen3.qk_norm, qwen3.head_dim, qwen3.qkv_bias) == (True, 128, False)

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ],
    )
    def test_rope_of_transformers_4_and_5(self, rope):
        config = DecoderConfig.from_dict({"model_type": "llama", "max_position_embeddings": 99, **rope})
        assert config.rope_theta == 5e5
        assert config.rope_scaling == RopeScaling("linear", 2.0, original_max_position_embeddings=99)

    def test_what_is_not_supported(self):
        with pytest.raises(ValueError, match=r"'yarn' is not supported; supported: \['default', 'linear'"):
            DecoderConfig.from_dict({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}})
        with pytest.raises(ValueError, match="rope type 'linear' needs a factor"):
            DecoderConfig.from_dict({"model_type": "llama", "rope_scaling": {"rope_type": "linear"}})
        with pytest.raises(ValueError, match=r"model_type='gemma' is not supported; supported: \['llama'"):
            DecoderConfig.from_dict({"model_type": "gemma"})
        with pytest.raises(ValueError, match="4 is not a multiple of num_key_value_heads=3"):
            dataclasses.replace(CONFIG, num_key_value_heads=3)


def test_rope_of_llama_3_1_by_hand():
    """Wavelengths under 8192/4 stay, those over 8192 are 8 times as long, between them it is interpolated."""
    config = dataclasses.replace(
        CONFIG, head_dim=128, rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", 8.0)
    )
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    wavelengths = 2 * np.pi / plain
    frequencies = rope_frequencies(config)
    short, long = wavelengths < 2048, wavelengths > 8192
    np.testing.assert_allclose(frequencies[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(frequencies[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert between.any()
    smooth = (8192 / wavelengths[between] - 1) / 3
    expected = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    np.testing.assert_allclose(frequencies[between], expected, rtol=1e-5)
