"""HuBERT against transformers in PyTorch, on random weights that it saves."""

import numpy as np
import pytest
import torch
from transformers import HubertConfig, HubertModel

from sparqle_jax import pretrained
from tests.conftest import call, with_compat

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=[16] * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
PRE_NORM = dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
# As facebook/hubert-base-ls960, -large-ll60k and -xlarge-ll60k: x-large has heads of 80 and is deeper.
STYLES = {
    "base": SIZES,
    "large": SIZES | PRE_NORM,
    "x-large": SIZES | PRE_NORM | dict(hidden_size=80, num_hidden_layers=5, num_attention_heads=1),
    "odd kernel, no projection norm": SIZES | dict(num_conv_pos_embeddings=15, feat_proj_layer_norm=False),
}


@pytest.fixture(scope="module", params=STYLES)
def models(request, tmp_path_factory):
    """(PyTorch's model, ours from the folder that it saved)."""
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**STYLES[request.param])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at 1 and 0, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("hubert")
    model.save_pretrained(folder)
    return model, pretrained.load_encoder(folder, normalize=None)


@pytest.fixture
def waveform():
    return np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)


def test_without_padding(models, waveform):
    theirs, ours = models
    with torch.no_grad():
        expected = theirs(torch.from_numpy(waveform), output_hidden_states=True)
    frames, _ = call(ours.__call__, waveform)
    np.testing.assert_allclose(frames, expected.last_hidden_state, atol=1e-4)
    states, _ = call(ours.hidden_states, waveform)
    np.testing.assert_allclose(states[-1], expected.last_hidden_state, atol=1e-4)
    for layer in range(ours.config.num_hidden_layers):
        np.testing.assert_allclose(states[layer], expected.hidden_states[layer], atol=1e-4)


def test_padded_batch_as_transformers_does_it(models, waveform):
    theirs, ours = models
    mask = np.arange(5000) < np.array([[5000], [3217], [400]])
    waveform = waveform * mask
    with torch.no_grad():
        expected = theirs(torch.from_numpy(waveform), torch.from_numpy(mask).long()).last_hidden_state
    frames, frames_mask = call(with_compat(ours, "transformers").__call__, waveform, mask)
    np.testing.assert_allclose(frames[frames_mask], expected[np.array(frames_mask)], atol=1e-4)


def test_padded_batch_gives_what_transformers_gives_alone(models, waveform):
    """For base models this is not what transformers gives for the batch: it counts padding in a norm."""
    theirs, ours = models
    lengths = [5000, 3217, 400]
    mask = np.arange(5000) < np.array(lengths)[:, None]
    frames, frames_mask = call(ours.__call__, waveform, mask)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(waveform[row, None, :length])).last_hidden_state[0]
        np.testing.assert_allclose(frames[row][frames_mask[row]], expected, atol=1e-4)


def test_old_checkpoint_file(models, waveform, tmp_path):
    """pytorch_model.bin, with the old spelling of weight norm."""
    theirs, ours = models
    theirs.config.save_pretrained(tmp_path)
    state = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    again = pretrained.load_encoder(tmp_path, normalize=None)
    np.testing.assert_array_equal(call(again.__call__, waveform)[0], call(ours.__call__, waveform)[0])
