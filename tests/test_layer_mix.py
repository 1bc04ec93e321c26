"""A mix of all layers, over an encoder of each kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparqle_jax import encoders, flops
from sparqle_jax.encoders.layer_mix import LayerMix
from sparqle_jax.model import is_trained
from sparqle_jax.sharding import batch_sharding, make_mesh, state_sharding
from tests.conftest import call

SPEECH = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=(8,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)
SIZES = {
    "hubert": SPEECH,
    "wavlm": SPEECH | dict(feat_extract_norm="layer", do_stable_layer_norm=True, num_buckets=8),
    "whisper": dict(
        num_mel_bins=8,
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        max_source_positions=12,
    ),
}


@pytest.fixture(scope="module", params=SIZES)
def mix(request):
    part = encoders.FAMILIES[request.param]
    encoder = part.Encoder(part.Config(**SIZES[request.param]), rngs=nnx.Rngs(0))
    return LayerMix(encoder, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def batch():
    waveform = np.random.default_rng(0).normal(0, 0.1, (8, 3200)).astype(np.float32)
    return waveform, np.arange(3200) < np.arange(3200, 400, -350)[:, None]


def test_it_begins_with_the_mean(mix, batch):
    states, states_mask = call(mix.encoder.hidden_states, *batch)
    frames, mask = call(mix.__call__, *batch)
    np.testing.assert_array_equal(mask, states_mask)
    np.testing.assert_allclose(frames, np.mean(states, 0), atol=1e-5)
    again, _ = call(mix.hidden_states, *batch)
    np.testing.assert_array_equal(again, states)


def test_its_weights_are_a_softmax(mix, batch):
    other = nnx.clone(mix)
    other.weights[...] = jnp.log(jnp.array([1.0, 2.0, 3.0, 4.0]))
    states, _ = call(mix.encoder.hidden_states, *batch)
    expected = sum((i + 1) * np.asarray(state) for i, state in enumerate(states)) / 10
    np.testing.assert_allclose(call(other.__call__, *batch)[0], expected, atol=1e-5)
    other.weights[...] = jnp.array([-99.0, -99.0, -99.0, 0.0])
    expected, mask = call(mix.encoder.__call__, *batch)  # the last layer is the encoder's output
    np.testing.assert_allclose(call(other.__call__, *batch)[0][mask], expected[mask], atol=1e-5)


def test_it_trains_its_weights_alone(mix, batch):
    class Model:
        encoder = mix

    names = [path for path, _ in nnx.to_flat_state(nnx.state(mix)) if is_trained(Model, ("encoder", *path))]
    assert names == [("weights",)]
    graph, state = nnx.split(mix)

    def loss(state):
        frames, mask = nnx.merge(graph, state)(*batch)
        return jnp.where(mask[..., None], jnp.sin(frames), 0).sum()

    gradients = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(state)))
    for path, gradient in gradients.items():
        norm = np.abs(gradient.get_value()).max()
        assert norm > 0.01 if path == ("weights",) else norm == 0, path
    # By hand: of frame f = sum_l w_l h_l with equal w, d/d logit_l = mean of cos(f) (h_l - f).
    states, _ = call(mix.encoder.hidden_states, *batch)
    frames, mask = (np.asarray(x) for x in call(mix.__call__, *batch))
    by_hand = (np.cos(frames) * (np.asarray(states) - frames))[:, mask].sum((1, 2)) / 4
    np.testing.assert_allclose(gradients[("weights",)].get_value(), by_hand, rtol=1e-3, atol=1e-4)


def test_what_trains_inside_trains_still(mix):
    class Trained:
        TRAINED = (r"lora\..*",)
        config, dtype = mix.config, mix.dtype

    assert LayerMix(Trained, rngs=nnx.Rngs(0)).TRAINED == ("weights", r"encoder\.lora\..*")


def test_it_costs_no_matrix_product(mix):
    graph, weights, rest = nnx.split(mix, lambda path, _: path == ("weights",), ...)

    def loss(weights, rest, waveform):
        return jnp.sin(nnx.merge(graph, weights, rest)(waveform)[0]).sum()

    waveform = jax.ShapeDtypeStruct((3, 1777), np.float32)
    program = jax.jit(jax.value_and_grad(loss)).trace(weights, rest, waveform)
    assert flops.count(program.jaxpr) == flops.Flops(mix.config.flops(3, 1777))


def test_on_eight_devices(mix, batch):
    mesh = make_mesh((2, 2, 2))
    graph, state = nnx.split(mix)
    split = jax.device_put(state, state_sharding(state, mesh))
    program = jax.jit(lambda state, *batch: nnx.merge(graph, state)(*batch))
    with jax.set_mesh(mesh):
        frames, mask = program(split, *jax.device_put(batch, batch_sharding(mesh)))
    expected, expected_mask = program(state, *batch)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(frames, expected, atol=1e-5)
