"""Files with more in them than decoders read by themselves: each is heard to its end, or it is said."""

import contextlib
import io
import shutil
import struct
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparqle_jax import audio, streams

RATE = audio.SAMPLE_RATE
# What libsndfile writes: ending, format, subtype, and rates.
FORMATS = [
    ("mp3", "MP3", None, (16_000, 44_100, 8_000)),
    ("opus", "OGG", "OPUS", (16_000, 48_000)),
    ("ogg", "OGG", "VORBIS", (16_000, 44_100, 8_000)),
    ("flac", "FLAC", "PCM_16", (16_000, 44_100, 8_000)),
    ("wav", "WAV", "PCM_16", (16_000, 44_100, 8_000)),
    ("wav", "WAVEX", "PCM_24", (16_000, 44_100)),
    ("wav", "RF64", "FLOAT", (16_000, 44_100)),
    ("aiff", "AIFF", "PCM_16", (16_000, 44_100)),
    ("au", "AU", "PCM_16", (16_000, 8_000)),
    ("caf", "CAF", "PCM_16", (16_000, 44_100)),
    ("w64", "W64", "PCM_16", (16_000, 44_100)),
    ("sph", "NIST", "PCM_16", (16_000, 8_000)),
    ("voc", "VOC", "PCM_16", (16_000, 22_050)),
]
# Formats in which nothing says where a file should end: what is not of theirs is not seen behind it.
ENDLESS = ("FLAC", "AU", "CAF", "W64", "NIST", "VOC")
BY_ENDING = pytest.mark.parametrize("form", FORMATS, ids=[f"{f[1]}-{f[2]}" for f in FORMATS])


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, 1)


def encoded(waveform: np.ndarray, rate: int, form: str, subtype: str | None, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format=form, subtype=subtype, **options)
    return file.getvalue()


def mp3(waveform: np.ndarray, rate: int = RATE, **options) -> bytes:
    return encoded(waveform, rate, "MP3", None, **options)


def pitches(waveform: np.ndarray) -> list[int]:
    """The frequencies of the tones in a waveform, one for each second."""
    found = []
    for start in range(0, len(waveform) - RATE // 2, RATE):
        middle = waveform[start + RATE // 4 : start + RATE * 3 // 4]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
        found.append(round(int(spectrum.argmax()) * RATE / len(middle) / 100) * 100)
    return found


def heard(file: Path) -> np.ndarray:
    """A file read in the three ways that there are, which have to agree."""
    waveform = audio.read(file)
    blocks = np.concatenate([np.zeros(0, np.float32), *audio.read_blocks(file)])
    assert abs(len(blocks) - len(waveform)) <= 8
    assert 0 <= audio.count_samples(file) - len(waveform) <= 8
    return waveform


@BY_ENDING
def test_joined_recordings_are_all_heard(form, tmp_path):
    """Of other rates and channels, the last with the first rate again."""
    ending, form, subtype, rates = form
    tones = [(500, rates[0], 1), (900, rates[-1], 2), (1300, rates[0], 2), (1700, rates[0], 2)]
    file = tmp_path / f"joined.{ending}"
    file.write_bytes(
        b"".join(encoded(tone(hertz, 1, rate, n), rate, form, subtype) for hertz, rate, n in tones)
    )
    waveform = heard(file)
    assert pitches(waveform) == [500, 900, 1300, 1700]
    assert abs(len(waveform) - 4 * RATE) <= 4 * 1600  # codecs fill their last frames
    # A part that goes over the seams is the same part.
    part = audio.read(file, 0.5, 2.0)
    assert abs(len(part) - 2 * RATE) <= 2
    inside = slice(RATE, RATE + RATE // 4)
    assert pitches(part[RATE // 2 + RATE // 10 :])[0] == 900
    assert np.corrcoef(part[inside], waveform[inside.start + RATE // 2 :][: RATE // 4])[0, 1] > 0.9
    with pytest.raises(audio.UnusableAudio, match="cut short"):
        audio.read(file, 3.0, 5.0)


TAGS = {
    "id3v2": b"ID3\x04\0\0\0\0\x10\0" + b"\xff\xfb\x90\x64" * 512,  # as a picture might be
    "id3v1": b"TAG" + b"title".ljust(125, b"\0"),
    "ape": b"APETAGEX" + struct.pack("<IIII", 2000, 64, 1, 0xA0000000) + bytes(8) + b"\xff\xfa" * 16
    + b"APETAGEX" + struct.pack("<IIII", 2000, 64, 1, 0x80000000) + bytes(8),
    "zeros": bytes(5000),
    "a little": b"\xff\xe3 junk " * 20,
}  # fmt: skip


@pytest.mark.parametrize("between", TAGS.values(), ids=TAGS)
def test_tags_between_joined_mp3_are_passed(between, tmp_path):
    first, second = mp3(tone(500)), mp3(tone(900), compression_level=0.9)
    (tmp_path / "joined.mp3").write_bytes(between + first + between + second + between)
    assert pitches(heard(tmp_path / "joined.mp3")) == [500, 900]


@pytest.mark.parametrize(
    "form", [form for form in FORMATS if form[1] not in ENDLESS], ids=lambda form: form[1]
)
@pytest.mark.parametrize("extra", ["noise", "another format"])
def test_what_is_of_another_kind_is_said(form, extra, tmp_path):
    ending, form, subtype, _ = form
    more = np.random.default_rng(0).bytes(50_000)
    if extra == "another format":
        more = encoded(tone(900), RATE, "FLAC", "PCM_16")
    file = tmp_path / f"a.{ending}"
    file.write_bytes(encoded(tone(500), RATE, form, subtype) + more)
    with pytest.raises(audio.UnusableAudio, match=r"only a part of it can be read: \d+ of its \d+ bytes"):
        heard(file)


def without_header(content: bytes) -> bytes:
    """An mp3 without its first frame, which counts the others."""
    assert b"Xing" in content[:64] or b"Info" in content[:64]
    return content[streams._frame(content[:4]).size :]


@pytest.mark.parametrize("silent_first", [True, False], ids=["guessed too long", "guessed too short"])
def test_variable_bit_rate_without_a_header(silent_first, tmp_path):
    """libsndfile guesses the length from the first frames, and stops there."""
    loud = np.concatenate([tone(500), np.random.default_rng(0).uniform(-0.9, 0.9, (3 * RATE, 1)), tone(900)])
    waveform = np.concatenate([0 * loud, loud] if silent_first else [loud, 0 * loud])
    content = without_header(mp3(waveform, bitrate_mode="VARIABLE", compression_level=0))
    file = tmp_path / "vbr.mp3"
    file.write_bytes(content)
    guess = soundfile.info(file).frames
    assert guess > 1.1 * len(waveform) if silent_first else guess < 0.9 * len(waveform)
    found = heard(file)
    assert abs(len(found) - len(waveform)) < 0.15 * RATE
    start = 5 if silent_first else 0
    assert pitches(found)[start] == 500
    assert pitches(found)[start + 4] == 900
    part = audio.read(file, start + 4.1, 0.6)
    assert pitches(part) == [900]


def test_many_small_gaps_are_one_large_one(tmp_path):
    """One header in ten is damaged: each time a frame is lost, in the end a tenth of all."""
    content = bytearray(without_header(mp3(tone(500, 60))))
    place, number = 0, 0
    while place < len(content):
        size = streams._frame(bytes(content[place : place + 4])).size
        if number % 10 == 5:
            content[place] = 0
        place, number = place + size, number + 1
    (tmp_path / "a.mp3").write_bytes(content)
    with pytest.raises(audio.UnusableAudio, match="only a part of it can be read"):
        audio.read(tmp_path / "a.mp3")


def test_only_a_header_is_held_against_an_mp3(tmp_path):
    content = mp3(tone(500, 4), bitrate_mode="VARIABLE")
    file = tmp_path / "a.mp3"
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(audio.UnusableAudio, match=r"a.mp3: it is cut short: its header declares 11\d frames"):
        audio.read(file)
    file.write_bytes(without_header(content)[: len(content) // 2])
    assert 1.5 < len(heard(file)) / RATE < 2.5


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return (
        name + struct.pack("<I", len(content) if size is None else size) + content + bytes(len(content) % 2)
    )


def wav(data: bytes, size: int | None = None, riff: int | None = None, before=b"", after=b"") -> bytes:
    form = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16))
    body = b"WAVE" + form + before + chunk(b"data", data, size) + after
    return chunk(b"RIFF", body, riff)


PCM = (tone(500, 2)[:, 0] * 32767).astype("<i2").tobytes()


@pytest.mark.parametrize("riff", [0, None, 36, 0xFFFFFFFF], ids=["0", "right", "36", "largest"])
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFDB, 0xFFFFFFFF])
@pytest.mark.parametrize(
    "before", [b"", chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0\0"), chunk(b"odd ", b"123")]
)
def test_sizes_that_were_never_written(riff, size, before, tmp_path):
    file = tmp_path / "a.wav"
    file.write_bytes(wav(PCM, size, riff, before))
    np.testing.assert_allclose(heard(file), tone(500, 2)[:, 0], atol=1e-4)
    np.testing.assert_allclose(audio.read(file, 0.5, 1.0), tone(500, 2)[RATE // 2 : -RATE // 2, 0], atol=1e-4)


@pytest.mark.parametrize(
    "first", [bytes(4000), b"", b"LIST" + PCM[:1000]], ids=["silence", "none", "like a name"]
)
def test_sizes_of_0_and_audio_that_begins_oddly(first, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(first + PCM, 0, 0))
    assert len(heard(tmp_path / "a.wav")) == len(first + PCM) // 2


@pytest.mark.parametrize(
    "after", [b"", chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0\0"), chunk(b"id3 ", b"abc")]
)
def test_an_empty_wav_stays_empty(after, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(b"", after=after))
    assert audio.count_samples(tmp_path / "a.wav") == 0
    assert len(audio.read(tmp_path / "a.wav")) == 0


def test_rf64_whose_sizes_were_never_written(tmp_path):
    content = encoded(tone(500, 2), RATE, "RF64", "PCM_16")
    at = content.index(b"ds64") + 8
    for size in (0, 2**64 - 1):
        sizes = struct.pack("<QQQ", size, size, size)
        (tmp_path / "a.wav").write_bytes(content[:at] + sizes + content[at + 24 :])
        np.testing.assert_allclose(heard(tmp_path / "a.wav"), tone(500, 2)[:, 0], atol=1e-4)


@pytest.mark.parametrize("size", [0, len(PCM) // 2])
def test_a_size_that_was_written_too_early_is_said(size, tmp_path):
    """A size that is wrong but no sign of one that is missing. Of 0, what is there is the audio."""
    (tmp_path / "a.wav").write_bytes(wav(PCM, size, 36 + size))
    if size:
        with pytest.raises(audio.UnusableAudio, match="only a part of it can be read"):
            audio.read(tmp_path / "a.wav")
    else:
        assert len(heard(tmp_path / "a.wav")) == 2 * RATE


def test_chunks_around_the_audio_are_no_audio(tmp_path):
    """Also without the byte that fills an odd one, which many programs forget."""
    odd = b"id3 " + struct.pack("<I", 9001) + bytes(9001)
    after = chunk(b"LIST", b"INFO" + b"\x01" * 5000) + odd + chunk(b"cue ", bytes(40))
    (tmp_path / "a.wav").write_bytes(wav(PCM, before=chunk(b"JUNK", b"\x07" * 3001), after=after))
    assert len(heard(tmp_path / "a.wav")) == 2 * RATE


def test_memory_does_not_grow_with_what_is_joined(tmp_path):
    one = mp3(tone(500, 60, 44_100, 2), 44_100)

    def peak(number: int) -> tuple[int, int]:
        (tmp_path / "joined.mp3").write_bytes(one * number)
        tracemalloc.start()
        samples = sum(map(len, audio.read_blocks(tmp_path / "joined.mp3")))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return samples, most

    (few, short), (many, long) = peak(1), peak(8)
    assert abs(many - 8 * few) < RATE
    assert long < 1.5 * short


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_recordings_is_heard_to_its_end_or_it_is_said(data, tmp_path):
    """1 to 4 recordings in one file, of any rates and channels; of one format, as a rule."""
    form = data.draw(st.sampled_from(FORMATS))
    recordings = st.tuples(st.sampled_from((16_000, 44_100, 8_000)), st.integers(1, 2), st.integers(1, 2))
    content, expected, forms = b"", [], []
    for i, (rate, channels, seconds) in enumerate(data.draw(st.lists(recordings, min_size=1, max_size=4))):
        other = i and form[1] not in ENDLESS and data.draw(st.integers(0, 9)) == 0
        forms.append(data.draw(st.sampled_from(FORMATS)) if other else form)
        _, kind, subtype, rates = forms[-1]
        rate = rate if rate in rates else rates[0]
        content += encoded(tone(500 + 400 * i, seconds, rate, channels), rate, kind, subtype)
        expected += [500 + 400 * i] * seconds
    file = tmp_path / f"joined.{forms[0][0]}"
    file.write_bytes(content)
    if len({kind[1] for kind in forms}) > 1:
        with contextlib.suppress(audio.UnusableAudio):
            assert len(heard(file)) >= 0.97 * len(expected) * RATE
        return
    waveform = heard(file)
    assert 0.97 <= len(waveform) / (len(expected) * RATE) <= 1.15
    if form[1] != "MP3":  # whose frames make the seconds longer
        assert pitches(waveform)[: len(expected)] == expected


needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def converted(folder: Path, name: str, *options: str, hertz: int = 500) -> Path:
    """A tone of two seconds as ffmpeg writes it, or a skip, where it was built without that codec."""
    soundfile.write(folder / "tone.wav", tone(hertz, 2), RATE)
    command = ["ffmpeg", "-v", "error", "-y", "-i", folder / "tone.wav", *options, folder / name]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"this ffmpeg can't write {name}")
    return folder / name


KINDS = {
    "a.m4a": [], "a.mp4": [], "a.mov": [], "a.3gp": ["-c:a", "aac"], "a.aac": [], "a.wma": [], "a.avi": [],
    "a.mkv": ["-c:a", "aac"], "a.webm": ["-c:a", "libopus"], "a.mka": ["-c:a", "flac"],
    "a.flv": ["-c:a", "aac"],
    "a.amr": ["-ar", "8000", "-c:a", "libopencore_amrnb"], "a.ac3": [], "a.ts": ["-c:a", "aac"], "a.wv": [],
}  # fmt: skip


@needs_ffmpeg
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ending", ["", ".dat"])
def test_what_only_ffmpeg_reads(name, ending, tmp_path):
    """Whatever its name. Two joined are both heard, or it is said."""
    file = converted(tmp_path, name, *KINDS[name])
    file = file.rename(tmp_path / f"{name}{ending}")
    assert pitches(heard(file))[:2] == [500, 500]
    file.write_bytes(file.read_bytes() + converted(tmp_path, name, *KINDS[name], hertz=900).read_bytes())
    with contextlib.suppress(audio.UnusableAudio):
        found = pitches(heard(file))
        assert (found[0], found[-1]) == (500, 900)


@needs_ffmpeg
def test_flac_that_was_written_into_a_pipe(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(500, 2), RATE)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "tone.wav", "-f", "flac", "-"]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    (tmp_path / "a.flac").write_bytes(content)
    assert pitches(heard(tmp_path / "a.flac")) == [500, 500]


@needs_ffmpeg
def test_a_half_of_an_mp4_is_said(tmp_path):
    file = converted(tmp_path, "a.m4a", "-movflags", "+faststart")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(audio.UnusableAudio, match=r"can't be read"):
        audio.read(file)


@needs_ffmpeg
def test_several_tracks_are_said(tmp_path):
    file = converted(tmp_path, "a.mkv", "-map", "0:a", "-map", "0:a", "-c:a", "flac")
    with pytest.warns(audio.AudioWarning, match="has 2 audio tracks at once: one of them is heard"):
        assert pitches(audio.read(file)) == [500, 500]


@needs_ffmpeg
@pytest.mark.parametrize("name", ["list.m3u8", "list.mkv", "list.txt", "list.ffconcat", "list.mp4"])
def test_a_list_does_not_open_other_files(name, tmp_path):
    secret = converted(tmp_path, "secret.ts", "-c:a", "aac")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n"
    for content in (playlist, f"ffconcat version 1.0\nfile '{secret}'\n", f"file '{secret.name}'\n"):
        (tmp_path / name).write_text(content)
        with pytest.raises(audio.UnusableAudio, match="can't be read as a recording"):
            audio.read(tmp_path / name)
