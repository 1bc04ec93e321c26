import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import WhisperFeatureExtractor

from sparqle_jax import flops
from sparqle_jax.encoders.whisper import Config, Encoder, log_mel
from tests.conftest import call

SHORT = Config(
    num_mel_bins=8,
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    max_source_positions=12,
    pad_to_window=False,
)
WINDOW = dataclasses.replace(SHORT, pad_to_window=True)
# At and around the borders of frames (320) and of mel frames (160); two that end with the batch's 3,300.
LENGTHS = np.array([3300, 3201, 3200, 3199, 2900, 2720, 1441, 1440, 1439, 321, 320, 161, 160, 1])


@pytest.fixture(scope="module", params=[SHORT, WINDOW], ids=["short", "window"])
def whisper(request):
    return Encoder(request.param, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    """Waveforms, noise in the padding too, and their mask."""
    rng = np.random.default_rng(0)
    waveform = rng.normal(0, 0.1, (len(LENGTHS), 3300)).astype(np.float32)
    return waveform, np.arange(3300) < LENGTHS[:, None]


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_features(num_mel_bins):
    """Against transformers' in float64: noise, a tone over 54 dB less of noise, a click and almost silence,
    silence, one sample, and ends just before the window's."""
    extractor = WhisperFeatureExtractor(feature_size=num_mel_bins)
    rng = np.random.default_rng(0)
    noise, time = rng.normal(0, 1, 480_000), np.arange(480_000) / 16_000
    waveforms = [
        0.1 * noise,
        1e-4 * noise[:479_900],
        (0.5 * np.sin(2 * np.pi * 440 * time) + 1e-3 * noise)[:100_001],
        np.concatenate([np.zeros(20_000), 0.9 * noise[:1000], 1e-5 * noise[:30_000]]),
        np.zeros(16_000),
        np.ones(1),
    ]
    for waveform in waveforms:
        waveform = waveform.astype(np.float32)
        padded = np.pad(waveform, (0, 480_000 - len(waveform)))
        expected = extractor._np_extract_fbank_features([padded], "cpu")[0].T
        short = log_mel(waveform[None], num_mel_bins, 480_000)[0]
        assert short.shape == (-(-len(waveform) // 160), num_mel_bins)
        np.testing.assert_allclose(short, expected[: len(short)], atol=1e-4)
        np.testing.assert_allclose(log_mel(padded[None], num_mel_bins, 480_000)[0], expected, atol=1e-4)


def test_frames():
    config = Config()
    assert [config.num_frames(n) for n in (0, 1, 320, 321, 16_000, 480_000)] == [0, 1, 1, 2, 50, 1500]
    np.testing.assert_array_equal(config.num_frames(np.array([319, 640, 641])), [1, 2, 3])
    assert (config.min_samples, config.max_samples) == (1, 480_000)


def test_a_batch_gives_what_each_gives_alone(whisper, batch):
    frames, mask = call(whisper.__call__, *batch)
    np.testing.assert_array_equal(mask.sum(1), whisper.config.num_frames(LENGTHS))
    states, _ = call(whisper.hidden_states, *batch)
    assert states.shape == (3, *frames.shape)
    np.testing.assert_allclose(states[-1], frames, atol=1e-5)
    for row in (0, 1, 4, 6, 9, 11, 13):
        alone, alone_mask = call(whisper.__call__, batch[0][row, None, : LENGTHS[row]])
        assert alone_mask.all()
        assert alone.shape[1] == mask[row].sum()
        np.testing.assert_allclose(frames[row, : alone.shape[1]], alone[0], atol=2e-5)


def test_padding_changes_nothing(whisper, batch):
    """However much of it there is, and whatever stands in it: the window has 3,840 samples."""
    waveform, mask = batch
    frames, _ = call(whisper.__call__, waveform, mask)
    other = np.pad(np.where(mask, waveform, 5), ((0, 0), (0, 540)), constant_values=-5).astype(np.float32)
    longer, longer_mask = call(whisper.__call__, other, np.pad(mask, ((0, 0), (0, 540))))
    for row, real in enumerate(np.asarray(longer_mask)):
        np.testing.assert_allclose(longer[row][real], frames[row, : real.sum()], atol=2e-5)


def test_the_window_is_silence():
    """Silence after a recording changes nothing when the window is padded with it, and something without."""
    waveform = np.random.default_rng(0).normal(0, 0.1, (1, 2000)).astype(np.float32)
    silence = np.pad(waveform, ((0, 0), (0, 1840)))
    for config, same in ((WINDOW, True), (SHORT, False)):
        whisper = Encoder(config, rngs=nnx.Rngs(0))
        one, other = (np.asarray(call(whisper.__call__, x)[0][:, :7]) for x in (waveform, silence))
        assert np.allclose(one, other, atol=1e-5) == same


def test_longer_than_the_window(whisper):
    message = r"3841 samples \(0.24 s\) is longer than the encoder's window of 3840 samples \(0.24 s\)"
    with pytest.raises(ValueError, match=message):
        whisper(np.zeros((1, 3841), np.float32))
    with pytest.raises(ValueError, match="0 samples gives no frame; at least 1"):
        whisper(np.zeros((1, 0), np.float32))


def test_an_empty_recording_leaves_the_others_alone(whisper, batch):
    waveform, mask = batch[0][:2], batch[1][:2].copy()
    expected, _ = call(whisper.__call__, waveform, mask)
    mask[1] = False
    frames, frames_mask = call(whisper.__call__, waveform, mask)
    assert not frames_mask[1].any()
    assert np.isfinite(frames).all()
    np.testing.assert_allclose(frames[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("samples", [1, 1601, 3840])
def test_flops(whisper, samples):
    graph, state = nnx.split(whisper)
    waveform = jax.ShapeDtypeStruct((3, samples), np.float32)
    program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0]).trace(state, waveform)
    assert flops.count(program.jaxpr) == flops.Flops(whisper.config.flops(3, samples))
    if whisper.config.pad_to_window:
        assert whisper.config.flops(3, samples) == whisper.config.flops(3, 1)


def test_config_of_transformers():
    values = {
        "model_type": "whisper",
        "d_model": 512,
        "encoder_layers": 6,
        "num_mel_bins": 128,
        "dropout": 0.1,
    }
    config = Config.from_dict(values, {"feature_size": 128, "n_fft": 400, "dither": 0.0})
    assert config == Config(d_model=512, encoder_layers=6, num_mel_bins=128)
    assert (config.width, config.num_hidden_layers) == (512, 6)
    for wrong in ({"feature_size": 80}, {"n_fft": 512}, {"hop_length": 320}, {"dither": 1e-4}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* is not supported: this encoder needs"):
            Config.from_dict(values, wrong)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="width 16 is not a multiple of the number of attention heads 3"):
        Encoder(dataclasses.replace(SHORT, encoder_attention_heads=3), rngs=nnx.Rngs(0))
