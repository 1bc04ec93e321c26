import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparqle_jax import flops
from sparqle_jax.encoders.wavlm import Attention, Config, Encoder, buckets
from tests.conftest import call

LARGE = Config(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    feat_extract_norm="layer",
    conv_dim=(8,) * 7,
    conv_bias=True,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    do_stable_layer_norm=True,
    num_buckets=8,
    max_bucket_distance=6,
)
BASE = dataclasses.replace(LARGE, feat_extract_norm="group", conv_bias=False, do_stable_layer_norm=False)


@pytest.fixture(scope="module", params=[BASE, LARGE], ids=["base", "large"])
def wavlm(request):
    encoder = Encoder(request.param, rngs=nnx.Rngs(0))
    # Small as they are at first, nothing would show a wrong one.
    encoder.position_bias.embedding[...] *= 100
    return encoder


def test_buckets():
    """By hand: distances up to 79 have their own bucket, those of 800 and more share the last."""
    by_offset = dict(zip(range(-999, 1000), buckets(1000, 320, 800), strict=True))
    assert [by_offset[-n] for n in (0, 1, 79, 80, 799, 800, 999)] == [0, 1, 79, 80, 159, 159, 159]
    assert [by_offset[n] for n in (1, 79, 80, 800)] == [161, 239, 240, 319]
    # Half of the logarithmic buckets lie below the geometric mean of 80 and 800.
    assert (by_offset[-252], by_offset[-253]) == (119, 120)


@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_biases_are_those_of_the_offsets(wavlm, num_frames):
    biases = wavlm._bias(num_frames)
    table = np.asarray(wavlm.position_bias.embedding[...])
    numbers = buckets(num_frames, 8, 6)
    assert biases.shape == (2, num_frames, num_frames)
    for query in range(num_frames):
        for key in range(num_frames):
            bucket = numbers[key - query + num_frames - 1]
            np.testing.assert_array_equal(biases[:, query, key], table[bucket])


def test_attention_by_hand():
    """One query of one head at a time, in NumPy."""
    rng = np.random.default_rng(0)
    attention = Attention(8, 2, dtype=np.float32, param_dtype=np.float32, rngs=nnx.Rngs(0))
    for _, variable in nnx.to_flat_state(nnx.state(attention)):
        variable.set_value(rng.normal(size=variable.get_value().shape).astype(np.float32))
    x, bias = rng.normal(size=(5, 8)), rng.normal(size=(2, 5, 5))
    mask = np.array([1, 1, 1, 1, 0], bool)

    def project(layer, x):
        return x @ np.asarray(layer.kernel[...], float) + np.asarray(layer.bias[...], float)

    heads = []
    for head, part in enumerate((slice(0, 4), slice(4, 8))):
        query, key, value = (
            project(p, x)[:, part] for p in (attention.query, attention.key, attention.value)
        )
        rows = []
        for i in range(5):
            gates = project(attention.gates, x[i, part])
            first, second = (1 / (1 + np.exp(-gates[g].sum())) for g in (slice(0, 4), slice(4, 8)))
            gate = first * (second * float(attention.gate_scale[0, head, 0, 0]) - 1) + 2
            scores = np.where(mask, key @ query[i] / 2 + gate * bias[head, i], -np.inf)
            weights = np.exp(scores - scores.max())
            rows.append(weights / weights.sum() @ value)
        heads.append(np.stack(rows))
    expected = project(attention.out, np.concatenate(heads, 1))
    x, bias = x[None].astype(np.float32), bias.astype(np.float32)
    np.testing.assert_allclose(attention(x, mask[None, None, None], bias)[0], expected, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_and_a_batch_nothing(wavlm):
    rng = np.random.default_rng(0)
    lengths = [3200, 1999, 720, 400]
    waveform = rng.normal(size=(4, 3200)).astype(np.float32)
    mask = np.arange(3200) < np.array(lengths)[:, None]
    frames, frames_mask = call(wavlm.__call__, waveform, mask)
    states, _ = call(wavlm.hidden_states, waveform, mask)
    assert states.shape == (3, *frames.shape)
    np.testing.assert_allclose(states[-1][frames_mask], frames[frames_mask], atol=1e-5)
    np.testing.assert_array_equal(frames_mask.sum(1), wavlm.config.num_frames(np.array(lengths)))
    other = np.pad(np.where(mask, waveform, 5), ((0, 0), (0, 400)), constant_values=-5).astype(np.float32)
    longer, longer_mask = call(wavlm.__call__, other, np.pad(mask, ((0, 0), (0, 400))))
    for row, length in enumerate(lengths):
        alone, alone_mask = call(wavlm.__call__, waveform[row, None, :length])
        assert alone_mask.all()
        count = alone.shape[1]
        assert frames_mask[row].sum() == longer_mask[row].sum() == count
        np.testing.assert_allclose(frames[row, :count], alone[0], atol=1e-4)
        np.testing.assert_allclose(longer[row, :count], alone[0], atol=1e-4)


@pytest.mark.parametrize("samples", [400, 2777])
def test_flops(wavlm, samples):
    graph, state = nnx.split(wavlm)
    waveform = jax.ShapeDtypeStruct((3, samples), np.float32)
    program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0]).trace(state, waveform)
    assert flops.count(program.jaxpr) == flops.Flops(wavlm.config.flops(3, samples))


def test_config_of_transformers():
    values = {"model_type": "wavlm", "conv_dim": [4] * 7, "num_buckets": 64, "hidden_dropout": 0.1}
    assert Config.from_dict(values, {}) == Config(conv_dim=(4,) * 7, num_buckets=64, normalize="variance")
    assert Config().max_bucket_distance == 800
    with pytest.raises(ValueError, match="the width 16 is not a multiple of the number of attention heads 3"):
        Encoder(dataclasses.replace(BASE, num_attention_heads=3), rngs=nnx.Rngs(0))
