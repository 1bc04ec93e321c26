import json

import numpy as np
import pytest

from sparqle_jax import audio


@pytest.fixture
def waveform():
    return np.random.default_rng(0).normal(3.0, 5.0, 1000).astype(np.float32)


def test_normalised_as_the_folder_says(tmp_path, waveform):
    default = audio.FeatureExtractor.from_folder(tmp_path)
    out = default(waveform)
    assert out.dtype == np.float32
    np.testing.assert_allclose([out.mean(), out.std()], [0, 1], atol=1e-4)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    np.testing.assert_array_equal(audio.FeatureExtractor.from_folder(tmp_path)(waveform), waveform)


def test_published_weights_want_peak_normalisation(tmp_path, waveform):
    extractor = audio.FeatureExtractor.from_folder(tmp_path, compat="published")
    np.testing.assert_allclose(extractor(waveform), waveform / np.abs(waveform).max())
    np.testing.assert_array_equal(extractor(np.zeros(500)), np.zeros(500))


def test_as_transformers_5_saves_a_processor(tmp_path, waveform):
    config = {"feature_extractor": {"do_normalize": False}}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(audio.FeatureExtractor.from_folder(tmp_path)(waveform), waveform)


def test_silence_stays_silence():
    np.testing.assert_array_equal(audio.FeatureExtractor()(np.zeros(500)), np.zeros(500))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is of int16; samples from -1 to 1 are needed: divide it by 32768"):
        audio.FeatureExtractor()(np.zeros(500, np.int16))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        audio.FeatureExtractor.from_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="compat must be one of"):
        audio.FeatureExtractor(compat="publised")
    with pytest.raises(ValueError, match="there are no waveforms"):
        audio.pad([])


def test_other_sample_rate(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    with pytest.raises(ValueError, match="asks for 8000 Hz; this project works at 16000 Hz"):
        audio.FeatureExtractor.from_folder(tmp_path)


def test_pad():
    batch, mask = audio.pad([np.ones(500), np.ones(700)], 800)
    assert batch.dtype == np.float32
    assert batch.shape == mask.shape == (2, 800)
    assert mask.sum(1).tolist() == batch.sum(1).tolist() == [500, 700]
    assert audio.pad([np.ones(500), np.ones(700)])[0].shape == (2, 700)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones(399), r"waveform 1 has 399 samples .* less than one frame"),
        (np.ones(0), r"waveform 1 has 0 samples"),
        (np.ones(801), r"waveform 1 has 801 samples .* but the batch is 800 long"),
        (np.ones((2, 500)), r"waveform 1 has shape \(2, 500\); one channel"),
        (np.full(500, np.nan), r"waveform 1 has samples that are not finite"),
    ],
)
def test_bad_waveforms(bad, message):
    with pytest.raises(ValueError, match=message):
        audio.pad([np.ones(500), bad], 800)
