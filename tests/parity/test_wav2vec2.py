"""wav2vec 2.0, HuBERT and WavLM against transformers in PyTorch, on random weights that it saves."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sparqle_jax import pretrained
from sparqle_jax.encoders import wavlm
from tests.conftest import call, with_compat

SIZES: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=[16] * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
PRE_NORM = dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
WAV2VEC2 = SIZES | dict(codevector_dim=16, proj_codevector_dim=16)
WAVLM = SIZES | dict(num_buckets=16, max_bucket_distance=20)  # some of 24 frames come into the last bucket
# The family of transformers' classes, and the sizes, as those of published models.
STYLES = {
    "wav2vec2-base": ("Wav2Vec2", WAV2VEC2),
    "wav2vec2-large": ("Wav2Vec2", WAV2VEC2 | dict(num_hidden_layers=5, num_attention_heads=2)),  # post-norm
    "wav2vec2-large-lv60": ("Wav2Vec2", WAV2VEC2 | PRE_NORM),
    "hubert-base-ls960": ("Hubert", SIZES),
    "hubert-large-ll60k": ("Hubert", SIZES | PRE_NORM),
    # Heads of 80, and deeper.
    "hubert-xlarge-ll60k": (
        "Hubert",
        SIZES | PRE_NORM | dict(hidden_size=80, num_hidden_layers=5, num_attention_heads=1),
    ),
    "hubert, odd kernel, no projection norm": (
        "Hubert",
        SIZES | dict(num_conv_pos_embeddings=15, feat_proj_layer_norm=False),
    ),
    "wavlm-base": ("WavLM", WAVLM),
    "wavlm-large": ("WavLM", WAVLM | PRE_NORM),
}
LENGTHS = [8000, 5217, 400]
MASK = np.arange(8000) < np.array(LENGTHS)[:, None]


@pytest.fixture(scope="module", params=STYLES)
def theirs(request):
    family, sizes = STYLES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at 1 and 0, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
        if family == "WavLM":
            model.encoder.layers[0].attention.rel_attn_embed.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    theirs.save_pretrained(folder)
    return pretrained.load_encoder(folder, normalize=None)


@pytest.fixture
def waveform():
    return np.random.default_rng(0).normal(size=(3, 8000)).astype(np.float32)


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


def test_padded_batch_as_transformers_does_it(theirs, ours, waveform):
    with torch.no_grad():
        expected = theirs(torch.from_numpy(waveform * MASK), torch.from_numpy(MASK).long()).last_hidden_state
    frames, frames_mask = call(with_compat(ours, "transformers").__call__, waveform * MASK, MASK)
    np.testing.assert_allclose(frames[frames_mask], expected[np.array(frames_mask)], atol=1e-4)


def test_padded_batch_gives_what_transformers_gives_alone(theirs, ours, waveform):
    """For base models this is not what transformers gives for the batch: it counts padding in a norm."""
    frames, frames_mask = call(ours.__call__, waveform, MASK)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(waveform[row, None, :length])).last_hidden_state[0]
        np.testing.assert_allclose(frames[row][frames_mask[row]], expected, atol=1e-4)


@pytest.mark.parametrize("head", ["ForCTC", "ForPreTraining", "ForXVector"])
def test_files_of_models_with_heads(head, theirs, ours, waveform, tmp_path):
    kind = getattr(transformers, type(theirs).__name__.removesuffix("Model") + head, None)
    if kind is None:
        pytest.skip("transformers has no such model")
    model = kind(theirs.config)
    getattr(model, model.base_model_prefix).load_state_dict(theirs.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    again = pretrained.load_encoder(tmp_path, normalize=None)
    np.testing.assert_array_equal(call(again.__call__, waveform)[0], call(ours.__call__, waveform)[0])


def test_old_checkpoint_file(theirs, ours, waveform, tmp_path):
    """pytorch_model.bin, with the old spelling of weight norm."""
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


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (320, 1280), (32, 128)])
def test_buckets_of_wavlm(num_buckets, max_distance):
    """Of all offsets within a minute, borders included."""
    sizes = dict(num_buckets=num_buckets, max_bucket_distance=max_distance, num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.WavLMModel(transformers.WavLMConfig(**sizes))
    offsets = torch.arange(-2999, 3000)
    expected = model.encoder.layers[0].attention._relative_positions_bucket(offsets)
    np.testing.assert_array_equal(wavlm.buckets(3000, num_buckets, max_distance), expected)
