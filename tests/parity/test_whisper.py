"""Whisper's features and encoder against transformers in PyTorch, on random weights that it saves."""

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

from sparqle_jax import pretrained
from sparqle_jax.encoders.whisper import log_mel
from tests.conftest import call

SIZES = dict(
    d_model=32,
    encoder_layers=3,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_layers=1,
    decoder_attention_heads=4,
    decoder_ffn_dim=48,
    max_source_positions=50,
    max_target_positions=8,
    vocab_size=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
WINDOW = 16_000  # a second
# As openai/whisper-tiny to -large-v2, and -large-v3.
STYLES = {"80 mel": SIZES, "128 mel": SIZES | dict(num_mel_bins=128)}
LENGTHS = [16_000, 9_601, 4_799, 1]


def features(waveform: np.ndarray, num_mel_bins: int, seconds: int) -> np.ndarray:
    """Theirs: [frames, num_mel_bins]."""
    extractor = WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=seconds)
    return extractor(waveform, sampling_rate=16_000, return_tensors="np").input_features[0].T


@pytest.fixture(scope="module", params=STYLES)
def theirs(request):
    torch.manual_seed(0)
    model = WhisperModel(WhisperConfig(**STYLES[request.param])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    theirs.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=theirs.config.num_mel_bins, chunk_length=1).save_pretrained(folder)
    return folder


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    mask = np.arange(WINDOW) < np.array(LENGTHS)[:, None]
    return rng.normal(0, 0.1, mask.shape).astype(np.float32) * mask, mask


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_features_of_thirty_seconds(num_mel_bins):
    """Loud and soft, tones and noise, ends at and around the window's and the frames' borders."""
    rng = np.random.default_rng(0)
    time = np.arange(480_000) / 16_000
    noise = rng.normal(0, 1, 480_000)
    waveforms = [
        0.1 * noise,
        1e-4 * noise[:479_900],
        (0.5 * np.sin(2 * np.pi * 440 * time) + 1e-2 * noise)[:100_001],
        np.concatenate([np.zeros(20_000), 0.9 * noise[:1000], 1e-5 * noise[:30_000]]),
        np.zeros(16_000),
        np.ones(1),
    ]
    for waveform in waveforms:
        waveform = waveform.astype(np.float32)
        expected = features(waveform, num_mel_bins, 30)
        short = np.asarray(log_mel(waveform[None], num_mel_bins, 480_000))[0]
        assert short.shape == (-(-len(waveform) // 160), num_mel_bins)
        np.testing.assert_allclose(short, expected[: len(short)], atol=1e-4)
        padded = np.pad(waveform, (0, 480_000 - len(waveform)))
        np.testing.assert_allclose(log_mel(padded[None], num_mel_bins, 480_000)[0], expected, atol=1e-4)


def test_the_window(theirs, folder, batch):
    """All frames of the window, silence and all, attend to each other; those of the recording are given."""
    ours = pretrained.load_encoder(folder)
    waveform, mask = batch
    frames, frames_mask = call(ours.__call__, waveform, mask)
    states, _ = call(ours.hidden_states, waveform, mask)
    for row, length in enumerate(LENGTHS):
        mel = features(waveform[row, :length], ours.config.num_mel_bins, 1).T[None]
        with torch.no_grad():
            expected = theirs.encoder(torch.from_numpy(mel), output_hidden_states=True)
        np.testing.assert_allclose(frames[row], expected.last_hidden_state[0], atol=1e-4)
        for layer in range(ours.config.num_hidden_layers + 1):
            np.testing.assert_allclose(states[layer, row], expected.hidden_states[layer][0], atol=1e-4)
        assert frames_mask[row].sum() == -(-length // 320)


def test_shorter_windows(theirs, folder, batch):
    """Without the window, each recording of a batch has what their layers give for its own features alone."""
    ours = pretrained.load_encoder(folder, pad_to_window=False)
    waveform, mask = (x[1:, :9_700] for x in batch)
    frames, frames_mask = call(ours.__call__, waveform, mask)
    for row, length in enumerate(LENGTHS[1:]):
        mel = features(waveform[row, :length], ours.config.num_mel_bins, 1)[: -(-length // 160)]
        expected = their_layers(theirs.encoder, mel)
        assert frames_mask[row].sum() == len(expected) == -(-length // 320)
        np.testing.assert_allclose(frames[row, : len(expected)], expected, atol=1e-4)


@torch.no_grad()
def their_layers(encoder, mel: np.ndarray) -> torch.Tensor:
    """Their encoder without its check that the window is full: mel [frames, mel] -> [T, D]."""
    x = torch.from_numpy(mel.T[None])
    for conv in (encoder.conv1, encoder.conv2):
        x = torch.nn.functional.gelu(conv(x))
    x = x.transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)[0]


def test_file_of_the_whole_model(theirs, folder, batch, tmp_path):
    """Names that begin with model.encoder., and the decoder and its head besides."""
    model = WhisperForConditionalGeneration(theirs.config)
    model.model.load_state_dict(theirs.state_dict())
    model.save_pretrained(tmp_path)
    ours, again = pretrained.load_encoder(folder), pretrained.load_encoder(tmp_path)
    np.testing.assert_array_equal(call(again.__call__, *batch)[0], call(ours.__call__, *batch)[0])
