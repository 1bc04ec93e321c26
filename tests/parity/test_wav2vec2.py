"""wav2vec 2.0, which is HuBERT by file, against transformers in PyTorch, on random weights that it saves."""

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining, Wav2Vec2Model

from sparqle_jax import pretrained
from tests.conftest import call

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=[16] * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    codevector_dim=16,
    proj_codevector_dim=16,
)
PRE_NORM = dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
# As facebook/wav2vec2-base, -large (post-norm too, and deeper) and -large-lv60 (pre-norm).
STYLES = {
    "base": SIZES,
    "large": SIZES | dict(num_hidden_layers=5, num_attention_heads=2),
    "large-lv60": SIZES | PRE_NORM,
}


@pytest.fixture(scope="module", params=STYLES)
def theirs(request):
    torch.manual_seed(0)
    model = Wav2Vec2Model(Wav2Vec2Config(**STYLES[request.param])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at 1 and 0, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wav2vec2")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return pretrained.load_encoder(folder, normalize=None)


@pytest.fixture
def waveform():
    return np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)


LENGTHS = [5000, 3217, 400]
MASK = np.arange(5000) < np.array(LENGTHS)[:, None]


def test_without_padding(theirs, ours, waveform):
    with torch.no_grad():
        expected = theirs(torch.from_numpy(waveform), output_hidden_states=True)
    frames, _ = call(ours.__call__, waveform)
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
    frames, frames_mask = call(ours.__call__, waveform, MASK)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(waveform[row, None, :length])).last_hidden_state[0]
        np.testing.assert_allclose(frames[row][frames_mask[row]], expected, atol=1e-4)


@pytest.mark.parametrize("kind", [Wav2Vec2ForCTC, Wav2Vec2ForPreTraining])
def test_files_of_models_with_heads(kind, theirs, ours, waveform, tmp_path):
    model = kind(theirs.config)
    model.wav2vec2.load_state_dict(theirs.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    again = pretrained.load_encoder(tmp_path, normalize=None)
    np.testing.assert_array_equal(call(again.__call__, waveform)[0], call(ours.__call__, waveform)[0])
