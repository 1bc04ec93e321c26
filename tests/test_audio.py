import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import assume, given, settings
from hypothesis import strategies as st

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
        for ending in ("wav", "mp3", "au", "raw", "vox"):
            (tmp_path / f"text.{ending}").write_text("hello" * 100)
            match = rf"text.{ending} can't be read as a recording .*: give wav, flac"
            with pytest.raises(ValueError, match=match):
                audio.read(tmp_path / f"text.{ending}")
        with pytest.raises(FileNotFoundError, match=r"absent.wav does not exist"):
            audio.read(tmp_path / "absent.wav")


def test_no_waveforms():
    with pytest.raises(ValueError, match="there are no waveforms"):
        audio.pad([])


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


RATE = audio.SAMPLE_RATE


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Something loud without a pause."""
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def cut(waveform, seconds: float, block: float = 1.0, **options) -> list[audio.Window]:
    size = round(block * RATE)
    blocks = [waveform[i : i + size] for i in range(0, len(waveform), size)]
    return list(audio.cut(blocks, round(seconds * RATE), **options))


class TestCut:
    def test_what_fits_is_one_window_but_for_silence_at_its_edges(self):
        speech = np.concatenate([noise(0.5), silence(0.8), noise(0.5)])
        (window,) = cut(speech, 3)
        np.testing.assert_array_equal(window.waveform, speech)
        (window,) = cut(np.concatenate([silence(0.5), speech, silence(0.6)]), 3, speech_pad=0.25)
        np.testing.assert_array_equal(window.waveform[RATE // 4 : -RATE // 4], speech)
        assert window.start == RATE // 4

    @pytest.mark.parametrize("block", [0.3, 1.0, 60.0])
    def test_sentences_are_cut_apart_in_long_pauses(self, block):
        sentences = [noise(length, i) for i, length in enumerate((1.5, 2.0, 0.5, 2.9))]
        waveform = np.concatenate([part for s in sentences for part in (s, silence(0.8))])
        windows = cut(waveform, 3, block, speech_pad=0.0)
        assert len(windows) == 4
        for window, sentence in zip(windows, sentences, strict=True):
            np.testing.assert_array_equal(window.waveform, sentence)
            np.testing.assert_array_equal(
                waveform[window.start : window.start + len(sentence)], window.waveform
            )

    def test_else_in_the_longest_short_pause_of_the_second_half(self):
        waveform = np.concatenate([noise(1.0), silence(0.4), noise(1), silence(0.2), noise(1.5)])
        first, second = cut(waveform, 3)
        assert abs(len(first.waveform) / RATE - 2.5) < 0.02  # the middle of the second pause
        assert second.start == len(first.waveform)
        assert not second.overlaps

    def test_without_a_pause_windows_overlap(self):
        waveform = noise(7)
        windows = cut(waveform, 3)
        assert [window.overlaps for window in windows] == [False, True, True]
        assert [window.start / RATE for window in windows] == [0, 2.25, 4.5]
        assert sum(len(window.waveform) for window in windows) == len(waveform) + 2 * 0.75 * RATE

    @pytest.mark.parametrize("speech_pad", [0.0, 0.25, 30.0])
    @pytest.mark.parametrize("seed", range(10))
    def test_nothing_loud_is_left_out(self, seed, speech_pad):
        rng = np.random.default_rng(seed)
        parts = [(silence if rng.random() < 0.4 else noise)(rng.exponential(1.0)) for _ in range(30)]
        waveform = np.concatenate([noise(1), *parts])
        covered = np.zeros(len(waveform), bool)
        for window in cut(waveform, 3, block=rng.uniform(0.1, 5), speech_pad=speech_pad):
            assert len(window.waveform) <= 3 * RATE
            end = min(window.start + len(window.waveform), len(waveform))
            np.testing.assert_array_equal(window.waveform[: end - window.start], waveform[window.start : end])
            covered[window.start : end] = True
        assert np.abs(waveform[~covered]).max(initial=0) == 0

    @pytest.mark.parametrize("seconds", [3, 1])
    def test_no_window_goes_over_a_seam(self, seconds):
        """An empty block. Silence between two seams is left out."""
        seam, parts = silence(0), [noise(0.5, 1), silence(0.7), noise(2.2, 2), noise(0.9, 3)]
        blocks = [parts[0][:4000], parts[0][4000:], seam, parts[1], seam, parts[2], seam, seam, parts[3]]
        windows = list(audio.cut(blocks, seconds * RATE))
        waveform, starts = np.concatenate(parts), np.cumsum([0, *map(len, parts)])
        ends = [window.start + len(window.waveform) for window in windows]
        for window, end in zip(windows, ends, strict=True):
            np.testing.assert_array_equal(window.waveform, waveform[window.start : end])
            assert not any(window.start < seam < end for seam in starts)
        assert {starts[0], starts[2], starts[3]} <= {window.start for window in windows}
        assert {starts[1], starts[3], starts[4]} <= set(ends)
        assert not any(window.overlaps for window in windows if window.start in starts)

    def test_what_can_not_be_heard(self):
        for waveform, message in (
            (silence(0), "0 samples"),
            (silence(10), "silent"),
            (np.full(5 * RATE, np.nan, np.float32), "not finite"),
            (noise(0.02), "320 samples"),
        ):
            with pytest.raises(audio.UnusableAudio, match=message):
                cut(waveform, 3)


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1), (96_000, 8)])
def test_blocks_are_the_recording(tmp_path, rate, channels, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK", 0.7)
    recording = np.random.default_rng(0).normal(0, 0.1, (round(2.5 * rate), channels))
    soundfile.write(tmp_path / "a.flac", recording, rate)
    blocks = list(audio.read_blocks(tmp_path / "a.flac"))
    assert len(blocks) >= 3
    whole = audio.read(tmp_path / "a.flac")
    # Resampled as it comes, a recording may be a sample longer or shorter.
    together = np.concatenate(blocks)
    assert abs(len(together) - len(whole)) <= 1
    size = min(len(together), len(whole)) - 100
    np.testing.assert_allclose(together[:size], whole[:size], atol=1e-4)


def test_other_formats_are_read_by_ffmpeg_where_it_is(tmp_path, monkeypatch):
    """By a stand-in, which says how it was called and gives a recording as wav."""
    soundfile.write(tmp_path / "plain.wav", noise(1), RATE)
    (tmp_path / "talk.xyz").write_bytes(b"what libsndfile does not know")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ffmpeg"
    program.write_text(
        '#!/bin/sh\necho "$@" > "$(dirname "$0")/called"\n'
        f'for last; do :; done\ncp {tmp_path}/plain.wav "$last"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    np.testing.assert_allclose(audio.read(tmp_path / "talk.xyz"), noise(1), atol=1e-4)
    called = (tmp_path / "bin" / "called").read_text()
    assert "-protocol_whitelist file,subfile -format_whitelist " in called
    assert f"-i subfile,,start,0,end,29,,:file:{tmp_path}/talk.xyz -vn" in called

    def fails(shell: str, match: str) -> None:
        program.write_text(f"#!/bin/sh\n{shell}\n")
        with pytest.raises(audio.UnusableAudio, match=match):
            audio.read(tmp_path / "talk.xyz")

    both = r"talk.xyz can't be read as a recording \(Format not recognised; ffmpeg: moov atom not found\)"
    fails("echo '[info] words' >&2; echo '[mov @ 0x1] [error] moov atom not found' >&2; exit 1", both)
    for_last = f'for last; do :; done; cp {tmp_path}/plain.wav "$last"'
    fails(f"{for_last}; echo '[error] partial file' >&2", "can't be read to its end by ffmpeg: partial file")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(audio.UnusableAudio, match=r"where ffmpeg is installed, local files such as .m4a"):
        audio.read(tmp_path / "talk.xyz")


def cancelling(seconds: float) -> np.ndarray:
    left = noise(seconds, 5)
    return np.stack([left, -0.8 * left], 1)


class TestDownmix:
    """Channels that cancel each other, in whole or for a while: the loudest is heard, and it is said."""

    def heard(self, tmp_path, channels) -> tuple[np.ndarray, list[str]]:
        file = tmp_path / "stereo.wav"
        soundfile.write(file, channels, RATE, subtype="FLOAT")
        said: list[audio.AudioWarning] = []
        waveform = audio.read(file, warn=said.append)
        again: list[audio.AudioWarning] = []
        np.testing.assert_array_equal(np.concatenate(list(audio.read_blocks(file, again.append))), waveform)
        assert list(map(str, again)) == list(map(str, said))
        return waveform, [str(warning) for warning in said]

    def test_opposite_phase(self, tmp_path):
        channels = np.stack([noise(3), -noise(3)], 1)
        waveform, said = self.heard(tmp_path, channels)
        np.testing.assert_array_equal(waveform, noise(3))
        assert len(said) == 1
        assert "stereo.wav: its channels cancel each other in 3.0 s: there the loudest is taken" in said[0]

    def test_where_it_is_only_for_a_while(self, tmp_path):
        usual = np.stack([noise(11, 1), noise(11, 2)], 1)
        waveform, said = self.heard(tmp_path, np.concatenate([usual, cancelling(3), usual]))
        np.testing.assert_allclose(waveform[: 11 * RATE], usual.mean(1), atol=1e-7)
        np.testing.assert_array_equal(waveform[11 * RATE : 14 * RATE], noise(3, 5))
        np.testing.assert_allclose(waveform[14 * RATE :], usual.mean(1), atol=1e-7)
        assert "in 3.0 s" in said[0]

    @pytest.mark.parametrize(
        "channels",
        [
            np.stack([noise(2, 1), noise(2, 2)], 1),
            np.stack([noise(2), 0 * noise(2)], 1),
            np.stack([0 * noise(2)] * 5 + [noise(2)], 1),
            np.stack([noise(2), noise(2)], 1),
            np.stack([noise(2), -0.1 * noise(2)], 1),
            np.stack([noise(2, i) for i in range(8)], 1),
        ],
        ids=["independent", "one silent", "five silent", "the same", "a faint echo", "eight"],
    )
    def test_usual_channels_are_averaged(self, tmp_path, channels):
        waveform, said = self.heard(tmp_path, channels)
        np.testing.assert_allclose(waveform, channels.mean(1), atol=1e-7)
        assert not said

    def test_waveforms_as_well(self):
        with pytest.warns(audio.AudioWarning, match="the waveform: its channels cancel each other in 1.0 s"):
            np.testing.assert_array_equal(audio.resample(cancelling(1), RATE), noise(1, 5))


class TestLevels:
    """Levels are those of the recording: what is quiet throughout is heard like what is loud."""

    @pytest.mark.parametrize("level", [1.0, 1e-2, 1e-3, 1e-4])
    @pytest.mark.parametrize("seconds", [3, 60])
    def test_a_quiet_recording_is_cut_like_a_loud_one(self, level, seconds):
        rng = np.random.default_rng(0)
        parts = [part for i in range(12) for part in (noise(rng.uniform(0.3, 1.5), i), silence(0.8))]
        waveform = np.concatenate(parts)
        loud, quiet = cut(waveform, seconds), cut(level * waveform, seconds)
        assert [w.seconds for w in quiet] == [w.seconds for w in loud]
        np.testing.assert_allclose(quiet[-1].waveform, level * loud[-1].waveform, rtol=1e-5)

    @settings(max_examples=200, deadline=None)
    @given(
        parts=st.lists(st.tuples(st.floats(0, 2), st.floats(-120, 0)), min_size=1, max_size=8),
        offset=st.sampled_from([0.0, 0.0, 1e-4, 0.1, -0.5]),
        level=st.sampled_from([1.0, 1e-2, 1e-4]),
        seconds=st.sampled_from([0.5, 3.0, 30.0]),
        speech_pad=st.sampled_from([0.0, 0.25]),
    )
    def test_windows_are_never_empty_and_hold_what_is_loud(self, parts, offset, level, seconds, speech_pad):
        pieces = [noise(length, i) * 10 ** (db / 20) for i, (length, db) in enumerate(parts)]
        waveform = (level * np.concatenate(pieces) + offset).astype(np.float32)
        height = np.ptp(waveform) if len(waveform) else 0
        assume(not 0 < height < 10 * audio.SILENCE)  # some windows would be silent, some not
        if len(waveform) < 400 or not height:
            with pytest.raises(audio.UnusableAudio, match=r"samples|silent"):
                cut(waveform, seconds, speech_pad=speech_pad)
            return
        covered = np.zeros(len(waveform), bool)
        for window in cut(waveform, seconds, speech_pad=speech_pad):
            assert 400 <= len(window.waveform) <= seconds * RATE
            covered[window.start : window.start + len(window.waveform)] = True
        deviation = np.abs(waveform - np.median(waveform))
        assert covered[deviation > deviation.max() / 2].mean() > 0.9

    @pytest.mark.parametrize(("rate", "subtype"), [(16_000, "PCM_16"), (44_100, "PCM_16"), (8_000, "PCM_24")])
    def test_quantisation_noise_is_silence(self, tmp_path, rate, subtype):
        bits = int(subtype[-2:])
        dither = np.random.default_rng(0).integers(-1, 2, (2 * rate, 2)) / 2 ** (bits - 1)
        soundfile.write(tmp_path / "a.wav", dither, rate, subtype=subtype)
        with pytest.raises(audio.UnusableAudio, match="silent"):
            list(audio.cut(audio.read_blocks(tmp_path / "a.wav"), 3 * RATE))

    def test_a_click_is_not_cut_to_nothing(self):
        click = np.zeros(2 * RATE, np.float32)
        click[-1] = 1.0
        (window,) = cut(click, 3, speech_pad=0.0)
        assert len(window.waveform) >= 400
        assert window.waveform.max() == 1.0


def test_memory_does_not_grow_with_the_length_of_a_recording(tmp_path):
    """Of what reading and cutting hold; a model has a batch of windows."""
    sentence = np.concatenate([noise(2), silence(0.8)])

    def peak(minutes: int) -> tuple[int, int]:
        file = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(file, "w", 44_100, 2, "PCM_16") as recording:
            for _ in range(minutes * 60 * RATE // len(sentence) * RATE // 44_100):
                recording.write(np.repeat(sentence[:, None], 2, 1))
        tracemalloc.start()
        windows = sum(1 for _ in audio.cut(audio.read_blocks(file), 3 * RATE))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return windows, most

    (few, short), (many, long) = peak(2), peak(16)
    assert many >= 7 * few
    assert long < 1.5 * short  # blocks and windows meet otherwise
