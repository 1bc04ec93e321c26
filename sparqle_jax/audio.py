"""Waveforms: read, cut at pauses, checked, padded to batches. NumPy only."""

import base64
import contextlib
import dataclasses
import io
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from etils import epath

SAMPLE_RATE = 16_000
CUT_TOLERANCE = 0.15  # seconds by which the headers of mp3 files may be wrong
BLOCK = 10.0  # seconds that are read at a time
LARGEST = 2 << 30  # bytes of wav that ffmpeg may make of a file: small ones may be hours long

SILENCE = 1e-4  # -80 dB: no recording of speech is so quiet

# Where `cut` cuts, in seconds: sentences end in a long pause; a word has none as long as a short one.
LONG_PAUSE, SHORT_PAUSE, OVERLAP = 0.6, 0.15, 1.0

# Endings of what ffmpeg has to read, and what it calls them. It is told, or a file could be a list of others.
FFMPEG = {".m4a": "mov", ".mp4": "mov", ".aac": "aac", ".webm": "matroska", ".mka": "matroska"}


class UnusableAudio(ValueError):
    """What is the matter with a recording. reason: the same for all of its kind."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read(file: str | os.PathLike, offset: float = 0.0, seconds: float | None = None) -> np.ndarray:
    """A recording of any rate and any number of channels -> mono float32 [S] at 16 kHz, from -1 to 1.

    wav, flac, mp3, ogg and opus are read, local or on gs://, and with ffmpeg what FFMPEG lists; of them the
    part from `offset` on, in seconds, `seconds` long. Channels are averaged. Raises FileNotFoundError, and
    UnusableAudio for what is no recording, is cut short, or ends before the part does.
    """
    with _open(file) as recording:
        rate = recording.samplerate
        start, number = round(offset * rate), -1 if seconds is None else round(seconds * rate)
        if start:
            recording.seek(min(start, recording.frames))
        channels = recording.read(number, dtype="float32", always_2d=True)  # [S, channels]
        promised = recording.frames - start if seconds is None else number
        if start > recording.frames or promised - len(channels) > CUT_TOLERANCE * rate:
            raise _cut_short(file, promised, len(channels), f" from {offset:g} s on")
    return resample(channels, rate)


def _cut_short(file: str | os.PathLike, promised: int, there: int, where: str = "") -> UnusableAudio:
    return UnusableAudio(
        "cut short",
        f"{file} is cut short: {promised} samples are expected{where}, but {there} are there.",
    )


def resample(channels: np.ndarray, rate: int) -> np.ndarray:
    """Channels float32 [S, C] at a rate -> their mean, float32 [S] at 16 kHz."""
    waveform = channels.mean(1)
    return waveform if rate == SAMPLE_RATE else soxr.resample(waveform, rate, SAMPLE_RATE)


def read_blocks(file: str | os.PathLike) -> Iterator[np.ndarray]:
    """What `read` gives, a few seconds at a time: float32 [S] at 16 kHz. Raises as `read` does."""
    with _open(file) as recording:
        rate, there = recording.samplerate, 0
        resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32")
        while len(channels := recording.read(round(BLOCK * rate), dtype="float32", always_2d=True)):
            there += len(channels)
            block = channels.mean(1)
            yield block if resampler is None else resampler.resample_chunk(block)
        if recording.frames - there > CUT_TOLERANCE * rate:
            raise _cut_short(file, recording.frames, there)
        if resampler is not None:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a recording: waveform float32 [S] at 16 kHz. start: the place of its first sample in the
    recording; overlaps: it begins with what the window before ends with."""

    start: int
    waveform: np.ndarray
    overlaps: bool = False

    @property
    def seconds(self) -> tuple[float, float]:
        """From when to when."""
        return self.start / SAMPLE_RATE, (self.start + len(self.waveform)) / SAMPLE_RATE


def cut(
    blocks: Iterable[np.ndarray], max_samples: int, *, margin: float = 0.25, min_samples: int = 400
) -> Iterator[Window]:
    """A recording, in blocks float32 [S] at 16 kHz, as windows of at most `max_samples`.

    One that is no longer is one window. Others are cut in long pauses, else in a short one in the second half
    of what fits, else at its end, with an overlap. What is left out is silence alone: of pauses in which one
    begins or ends, all but `margin` seconds.
    Raises UnusableAudio for a recording that is empty, too short, silent or not finite.
    """
    blocks, buffer, start, total = iter(blocks), np.zeros(0, np.float32), 0, 0
    kept, ahead = round(margin * SAMPLE_RATE), round(LONG_PAUSE * SAMPLE_RATE)
    more, overlaps, found = True, False, False
    while more or buffer.size:
        while more and buffer.size <= max_samples + ahead:
            block = next(blocks, None)
            more = block is not None
            if more:
                if not np.isfinite(block).all():
                    raise UnusableAudio("not finite", "it has samples that are not finite (NaN or infinity).")
                buffer, total = np.concatenate([buffer, block]), total + len(block)
        if not more and total <= max_samples:
            check(buffer, min_samples=min_samples, max_samples=max_samples)
            begin, end = _without_edges(buffer, kept)
            yield Window(begin, buffer[begin:end])
            return
        seen = buffer[: max_samples + ahead]
        end, following = _place_to_cut(seen, max_samples, kept, last=not more and buffer.size <= max_samples)
        if end and np.abs(buffer[:end]).max() >= SILENCE:
            waveform = np.pad(buffer[:end], (0, max(0, min_samples - end)))
            yield Window(start, waveform, overlaps)
            found = True
        overlaps = following < end
        buffer, start = buffer[following:], start + following
    if not found:
        raise UnusableAudio("silent", "it is silent.")


def _without_edges(waveform: np.ndarray, margin: int) -> tuple[int, int]:
    """Where a waveform float32 [S] begins and ends, without pauses at its edges but for `margin` samples."""
    begin, end = 0, len(waveform)
    for pause in _pauses(waveform):
        if pause[0] == 0:
            begin = max(begin, pause[1] - margin)
        elif pause[1] == len(waveform):
            end = min(end, pause[0] + margin)
    return begin, end


def _place_to_cut(seen: np.ndarray, max_samples: int, margin: int, *, last: bool) -> tuple[int, int]:
    """Where a window should end, and where the next one should begin, of what is seen float32 [S].

    An end of 0 leaves out what is before the next one: a pause, but for its last `margin` samples. last:
    nothing follows what is seen.
    """
    size = min(len(seen), max_samples)
    pauses = [pause for pause in _pauses(seen) if pause[0] < size]
    if pauses and pauses[0][0] == 0 and pauses[0][1] > margin:
        return 0, size if last and pauses[0][1] == size else pauses[0][1] - margin
    for begin, end in pauses:
        if begin and end - begin >= LONG_PAUSE * SAMPLE_RATE:
            kept = min(margin, (end - begin) // 2)
            return min(begin + kept, size), size if last and end == size else end - kept
    if last:
        return size, size
    later = [pause for pause in pauses if pause[0] >= size // 2]
    if later:
        begin, end = max(later, key=lambda pause: pause[1] - pause[0])
        kept = min(margin, (end - begin) // 2)
        return min(begin + kept, size), end - kept
    return size, size - min(round(OVERLAP * SAMPLE_RATE), size // 4)


def _pauses(window: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of a window float32 [S], in samples, in which it is quiet for SHORT_PAUSE or longer."""
    hop = SAMPLE_RATE // 200
    frames = window[: len(window) // hop * hop].reshape(-1, hop)
    if not len(frames):
        return []
    levels = 10 * np.log10(np.square(frames).mean(1) + 1e-9)  # dB
    # Near what is quietest here, if that is much quieter than what is loud.
    limit = max(min(np.percentile(levels, 10) + 10, np.percentile(levels, 95) - 20), -70)
    edges = np.flatnonzero(np.diff(np.pad(levels < limit, 1).astype(np.int8)))
    stretches = [(int(begin) * hop, int(end) * hop) for begin, end in edges.reshape(-1, 2)]
    if stretches and stretches[-1][1] == len(frames) * hop:
        stretches[-1] = (stretches[-1][0], len(window))
    long = [pause for pause in stretches if pause[1] - pause[0] >= SHORT_PAUSE * SAMPLE_RATE]
    return [_digital_silence(window, *pause, hop) for pause in long]


def _digital_silence(window: np.ndarray, begin: int, end: int, hop: int) -> tuple[int, int]:
    """The zeros in a pause, if they are most of it: an editor has put them there, and what is soft around
    them belongs to what is said."""
    first = max(0, begin - hop)
    edges = np.flatnonzero(np.diff(np.pad(window[first : end + hop] == 0, 1).astype(np.int8)))
    runs = edges.reshape(-1, 2) + first
    longest = max(runs.tolist(), key=lambda run: run[1] - run[0], default=[begin, begin])
    return tuple(longest) if longest[1] - longest[0] > (end - begin) // 2 else (begin, end)


def count_samples(file: str | os.PathLike) -> int:
    """How many samples `read` gives of a recording, by its header, rounded up. Raises as `read` does."""
    with _open(file) as recording:
        return math.ceil(recording.frames * SAMPLE_RATE / recording.samplerate)


def check(waveform: np.ndarray, *, min_samples: int, max_samples: int) -> None:
    """Raises UnusableAudio for a waveform float [S] at 16 kHz that is too long or has no speech."""
    if not len(waveform):
        raise UnusableAudio("empty", f"it has 0 samples at 16 kHz; at least {min_samples} are needed.")
    if len(waveform) < min_samples:
        raise UnusableAudio(
            "too short", f"it has {len(waveform)} samples at 16 kHz; at least {min_samples} are needed."
        )
    if not np.isfinite(waveform).all():
        raise UnusableAudio("not finite", "it has samples that are not finite (NaN or infinity).")
    if np.abs(waveform - waveform.mean()).max() < SILENCE:
        raise UnusableAudio("silent", "it is silent.")
    check_length(len(waveform), max_samples)


def check_length(num_samples: int, max_samples: int) -> None:
    """Raises UnusableAudio for more than `max_samples`."""
    if num_samples > max_samples:
        raise UnusableAudio(
            "too long",
            f"it is {num_samples / SAMPLE_RATE:.1f} s long, but can have at most "
            f"{max_samples / SAMPLE_RATE:g} s: cut it into pieces.",
        )


def as_wav(samples: np.ndarray) -> str:
    """Samples [S] at 16 kHz, int16 or from -1 to 1, as a WAV file in base64: for pages that hold all."""
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def _open(file: str | os.PathLike) -> Iterator[soundfile.SoundFile]:
    path = epath.Path(file)
    if not path.exists():
        raise FileNotFoundError(f"{file} does not exist.")
    if path.is_dir():
        raise UnusableAudio("unreadable", f"{file} is a folder, not a recording.")
    with contextlib.ExitStack() as stack:
        source: Any = os.fspath(path)
        if "://" in source:
            source = stack.enter_context(path.open("rb"))  # through Python where it must be: slower
        elif path.suffix.lower() in FFMPEG and shutil.which("ffmpeg"):
            source = stack.enter_context(_converted(source))
        try:
            recording = stack.enter_context(soundfile.SoundFile(source))
            _check_length_known(file, recording)
            yield recording
        except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a file named .raw
            reason = getattr(error, "error_string", error)
            raise UnusableAudio(
                "unreadable",
                f"{file} can't be read as a recording ({reason}): give wav, flac, mp3, ogg or opus, or "
                f"with ffmpeg installed {', '.join(FFMPEG)}.",
            ) from error


@contextmanager
def _converted(file: str) -> Iterator[str]:
    """The same recording as a wav file, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        wav = os.path.join(folder, "converted.wav")
        kind = FFMPEG[Path(file).suffix.lower()]
        command = ["ffmpeg", "-nostdin", "-v", "error", "-f", kind, "-i", f"file:{file}", "-vn"]
        command += ["-fs", str(LARGEST), wav]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason is given"])[-1]
            raise UnusableAudio("unreadable", f"{file} can't be read by ffmpeg: {reason}")
        if os.path.getsize(wav) > LARGEST - (1 << 20):  # ffmpeg stops a little before, and says nothing
            raise UnusableAudio("too long", f"{file} has more than {LARGEST >> 30} GiB of audio: cut it.")
        yield wav


def _check_length_known(file: str | os.PathLike, recording: soundfile.SoundFile) -> None:
    if recording.frames >= 2**62:  # what libsndfile says of flac that was written into a pipe, and can't read
        raise UnusableAudio("unreadable", f"{file} does not say how long it is: convert it once more.")
    # libsndfile shortens a wav whose end is lost, and says so in its log alone.
    lost = re.search(r"^\s*data\s*: (\d+) \(should be (\d+)\)", recording.extra_info, re.M)
    # Who writes wav into a pipe does not know its length, and writes the largest number.
    if lost and int(lost[2]) < int(lost[1]) < 0xFFFFFF00:
        raise UnusableAudio(
            "cut short",
            f"{file} is cut short: its header promises {lost[1]} bytes of audio, but it has {lost[2]}.",
        )


def pad(
    waveforms: Sequence[np.ndarray], length: int | None = None, *, min_samples: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """Waveforms [S_i] -> (float32 [B, S], mask bool [B, S]), zeros after each waveform's end.

    S is `length`, or the longest. Raises ValueError, naming the waveform, for one that is not
    one-dimensional, holds a sample that is not finite, is shorter than `min_samples` (one frame: see
    an encoder's `min_samples`), or longer than `length`: nothing is ever cut.
    """
    if not len(waveforms):
        raise ValueError("there are no waveforms to make a batch of.")
    waveforms = [np.asarray(waveform) for waveform in waveforms]
    for i, waveform in enumerate(waveforms):
        if waveform.ndim != 1:
            raise ValueError(f"waveform {i} has shape {waveform.shape}; one channel, [S], is needed.")
        if len(waveform) < min_samples:
            raise ValueError(
                f"waveform {i} has {len(waveform)} samples ({len(waveform) / SAMPLE_RATE:.3f} s), "
                f"less than one frame of the encoder ({min_samples} samples): leave it out."
            )
        if length is not None and len(waveform) > length:
            raise ValueError(
                f"waveform {i} has {len(waveform)} samples ({len(waveform) / SAMPLE_RATE:.1f} s) but the "
                f"batch is {length} long: use a longer bucket, or cut the recording into pieces."
            )
        if not np.isfinite(waveform).all():
            raise ValueError(f"waveform {i} has samples that are not finite (NaN or infinity).")
    length = max(map(len, waveforms)) if length is None else length
    batch = np.zeros((len(waveforms), length), np.float32)
    mask = np.zeros(batch.shape, bool)
    for i, waveform in enumerate(waveforms):
        batch[i, : len(waveform)] = waveform
        mask[i, : len(waveform)] = True
    return batch, mask
