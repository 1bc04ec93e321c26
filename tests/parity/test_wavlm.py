"""WavLM against transformers in PyTorch, on random weights that it saves."""

import numpy as np
import pytest
import torch
from transformers import WavLMConfig, WavLMForCTC, WavLMForXVector, WavLMModel

from sparqle_jax import pretrained
from sparqle_jax.encoders import wavlm
from tests.conftest import call

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=[16] * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    num_buckets=16,  # 24 frames of 8,000 samples come into the last bucket
    max_bucket_distance=20,
)
# As microsoft/wavlm-base and -large.
STYLES = {
    "base": SIZES,
    "large": SIZES | dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True),
}


@pytest.fixture(scope="module", params=STYLES)
def theirs(request):
    torch.manual_seed(0)
    model = WavLMModel(WavLMConfig(**STYLES[request.param])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at 1 and 0, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.encoder.layers[0].attention.rel_attn_embed.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wavlm")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return pretrained.load_encoder(folder, normalize=None)


@pytest.fixture
def waveform():
    return np.random.default_rng(0).normal(size=(3, 8000)).astype(np.float32)


LENGTHS = [8000, 5217, 400]
MASK = np.arange(8000) < np.array(LENGTHS)[:, None]


def test_without_padding(theirs, ours, waveform):
    with torch.no_grad():
        expected = theirs(torch.from_numpy(waveform), output_hidden_states=True)
    frames, mask = call(ours.__call__, waveform)
    assert mask.all()
    np.testing.assert_allclose(frames, expected.last_hidden_state, atol=1e-4)
    states, _ = call(ours.hidden_states, waveform)
    np.testing.assert_allclose(states[-1], expected.last_hidden_state, atol=1e-4)
    for layer in range(ours.config.num_hidden_layers):
        np.testing.assert_allclose(states[layer], expected.hidden_states[layer], atol=1e-4)


def test_padded_batch_as_transformers_does_it(theirs, folder, waveform):
    ours = pretrained.load_encoder(folder, normalize=None, compat="transformers")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(waveform * MASK), torch.from_numpy(MASK).long()).last_hidden_state
    frames, frames_mask = call(ours.__call__, waveform * MASK, MASK)
    np.testing.assert_allclose(frames[frames_mask], expected[np.array(frames_mask)], atol=1e-4)


def test_padded_batch_gives_what_transformers_gives_alone(theirs, ours, waveform):
    """For base models this is not what transformers gives for the batch: it counts padding in a norm."""
    frames, frames_mask = call(ours.__call__, waveform, MASK)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(waveform[row, None, :length])).last_hidden_state[0]
        np.testing.assert_allclose(frames[row][frames_mask[row]], expected, atol=1e-4)


@pytest.mark.parametrize("kind", [WavLMForCTC, WavLMForXVector])
def test_files_of_models_with_heads(kind, theirs, ours, waveform, tmp_path):
    model = kind(theirs.config)
    model.wavlm.load_state_dict(theirs.state_dict())
    model.save_pretrained(tmp_path)
    again = pretrained.load_encoder(tmp_path, normalize=None)
    np.testing.assert_array_equal(call(again.__call__, waveform)[0], call(ours.__call__, waveform)[0])


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (320, 1280), (32, 128)])
def test_buckets(num_buckets, max_distance):
    """Of all offsets within a minute, borders included."""
    config = WavLMConfig(num_buckets=num_buckets, max_bucket_distance=max_distance, num_hidden_layers=1)
    with torch.device("meta"):
        attention = WavLMModel(config).encoder.layers[0].attention
    offsets = torch.arange(-2999, 3000)
    expected = attention._relative_positions_bucket(offsets)
    np.testing.assert_array_equal(wavlm.buckets(3000, num_buckets, max_distance), expected)
