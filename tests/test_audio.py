import json

import numpy as np
import pytest
import soundfile

from sparqle_jax import audio


@pytest.fixture
def waveform():
    return np.random.default_rng(0).normal(3.0, 5.0, 1000).astype(np.float32)


class TestRead:
    tone = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)

    @pytest.mark.parametrize(
        ("ending", "rate", "subtype"),
        [
            ("wav", 44_100, "PCM_16"),
            ("wav", 8_000, "FLOAT"),
            ("flac", 48_000, "PCM_24"),
            ("ogg", 16_000, "VORBIS"),
            ("opus", 48_000, "OPUS"),
            ("mp3", 22_050, None),
        ],
    )
    def test_any_format_rate_and_number_of_channels(self, tmp_path, ending, rate, subtype):
        """A tone of one second, twice as loud on the left as on the right, comes back as their mean."""
        file = tmp_path / f"tone.{ending}"
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        format = "ogg" if ending == "opus" else None
        soundfile.write(file, np.stack([tone, tone / 2], 1), rate, subtype=subtype, format=format)
        waveform = audio.read(file)
        assert waveform.dtype == np.float32
        assert abs(len(waveform) - 16_000) <= 2_000  # mp3 pads its frames
        assert 0 <= audio.count_samples(file) - len(waveform) <= 1
        middle = waveform[4_000:12_000]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(8_000)))
        assert abs(spectrum.argmax() * 2 - 440) <= 2  # 2 Hz per bin
        np.testing.assert_allclose(np.abs(middle).max(), 0.375, atol=0.02)

    def test_as_it_is(self, tmp_path):
        soundfile.write(tmp_path / "tone.wav", self.tone, 16_000, subtype="FLOAT")
        np.testing.assert_allclose(audio.read(tmp_path / "tone.wav"), self.tone, atol=1e-6)

    def test_no_samples(self, tmp_path):
        soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), 44_100)
        assert audio.read(tmp_path / "empty.wav").shape == (0,)

    def test_no_recording(self, tmp_path):
        (tmp_path / "text.wav").write_text("hello")
        with pytest.raises(ValueError, match=r"text.wav can't be read as a recording .*: give wav, flac"):
            audio.read(tmp_path / "text.wav")
        with pytest.raises(FileNotFoundError, match=r"absent.wav does not exist"):
            audio.read(tmp_path / "absent.wav")


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
