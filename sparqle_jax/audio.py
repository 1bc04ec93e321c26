"""Waveforms: read, cut at pauses, checked, padded to batches. NumPy only."""

import base64
import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr
from etils import epath

from sparqle_jax import streams
from sparqle_jax.streams import CUT_TOLERANCE, UnusableAudio

SAMPLE_RATE = 16_000
BLOCK = 10.0  # seconds that are read at a time
LARGEST = 3 << 30  # bytes of wav that ffmpeg may make of a file: small ones may be hours long

SILENCE = 1e-6  # -120 dB, from the lowest to the highest: encoders hear nothing in it
QUANTISATION = 2**-6  # two steps of 8 bits: what goes no further, and on three values, is no signal

# Where `cut` cuts, in seconds: sentences end in a long pause; a word has none as long as a short one.
LONG_PAUSE, SHORT_PAUSE, OVERLAP = 0.6, 0.15, 1.0
HOP = SAMPLE_RATE // 200  # samples of which a level is measured

# The usual endings of what ffmpeg has to read. It is tried whatever the ending is.
FFMPEG = (".m4a", ".mp4", ".aac", ".webm", ".mka", ".wma", ".amr", ".3gp", ".mkv", ".mov", ".avi")
# Its names of formats that hold audio themselves, and can be told by how they begin.
DEMUXERS = (
    "3g2,aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,iff,loas,matroska,mov,mpc,mpc8,mpeg,mpegts,mxf,"
    "nut,oga,ogg,oma,rm,shn,swf,tak,tta,voc,w64,wav,wtv,wv,xwma"
)


class AudioWarning(UserWarning):
    """A recording is heard, but not simply as it is. reason: the same for all of its kind."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


Warn = Callable[[AudioWarning], object]


def read(
    file: str | os.PathLike, offset: float = 0.0, seconds: float | None = None, warn: Warn = warnings.warn
) -> np.ndarray:
    """A recording of any rate and any number of channels -> mono float32 [S] at 16 kHz, from -1 to 1.

    wav, flac, mp3, ogg and opus are read, local or on gs://, and with ffmpeg whatever else it reads; of them
    the part from `offset` on, in seconds, `seconds` long. A file may have several recordings, of different
    rates and channels, one after the other. Channels are averaged, but where they cancel each other the
    loudest is taken. warn: is told that, and of audio tracks that are not heard. Raises FileNotFoundError,
    and UnusableAudio for what is no recording, is cut short, ends before the part does, or can't be read to
    its end.
    """
    parts = [(rate, list(blocks)) for rate, blocks in _parts(file, warn, offset, seconds)]
    waveforms = [_at_16_khz(np.concatenate(blocks), rate) for rate, blocks in parts if blocks]
    return np.concatenate(waveforms) if waveforms else np.zeros(0, np.float32)


def resample(channels: np.ndarray, rate: int) -> np.ndarray:
    """Channels float32 [S, C] at a rate -> mono float32 [S] at 16 kHz, as `read` gives it."""
    mono, cancelled = _downmix(channels, rate)
    _warn_of_cancelled(warnings.warn, "the waveform", cancelled / rate)
    return _at_16_khz(mono, rate)


def read_blocks(file: str | os.PathLike, warn: Warn = warnings.warn) -> Iterator[np.ndarray]:
    """Reads as `read` does, a few seconds at a time: float32 [S] at 16 kHz. Raises and warns as `read` does.

    An empty block stands between two recordings of a file.
    """
    for number, (rate, blocks) in enumerate(_parts(file, warn)):
        if number:
            yield np.zeros(0, np.float32)
        if rate == SAMPLE_RATE:
            yield from blocks
            continue
        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32")
        for block in blocks:
            if len(resampled := resampler.resample_chunk(block)):
                yield resampled
        if len(resampled := resampler.resample_chunk(np.zeros(0, np.float32), last=True)):
            yield resampled


def _parts(
    file: str | os.PathLike, warn: Warn, offset: float = 0.0, seconds: float | None = None
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """The rate of each recording in a file, and its samples in blocks float32 [S], from `offset` on.

    The blocks of one have to be taken before the next is asked for.
    """
    before = cancelled = 0.0  # seconds
    promised = there = 0  # samples, of the recording that is open

    def blocks(recording: soundfile.SoundFile) -> Iterator[np.ndarray]:
        nonlocal there, cancelled
        size = round(BLOCK * recording.samplerate)
        while there < promised:
            channels = _read(file, recording, min(size, promised - there))
            if not len(channels):
                break
            there += len(channels)
            mono, number = _downmix(channels, recording.samplerate)
            cancelled += number / recording.samplerate
            yield mono

    for recording in _recordings(file, warn):
        rate, frames = recording.samplerate, recording.frames
        begin = round((offset - before) * rate)
        end = frames if seconds is None else min(frames, begin + round(seconds * rate))
        before += frames / rate
        if end <= begin or end <= 0 or begin >= frames:
            continue
        if begin > 0:
            recording.seek(begin)
        promised, there = end - max(0, begin), 0
        yield rate, blocks(recording)
        if promised - there > CUT_TOLERANCE * rate:
            raise _cut_short(file, promised, there, offset, rate)
    wanted = offset + (seconds or 0)
    if wanted - before > CUT_TOLERANCE or offset > before:
        raise UnusableAudio(
            "cut short",
            f"{file} is cut short: the part from {offset:g} s to {wanted:g} s is asked for, but it is "
            f"{before:.2f} s long.",
        )
    _warn_of_cancelled(warn, file, cancelled)


def _read(file: str | os.PathLike, recording: soundfile.SoundFile, number: int) -> np.ndarray:
    try:
        return recording.read(number, dtype="float32", always_2d=True)  # [S, channels]
    except soundfile.LibsndfileError as error:
        raise UnusableAudio("unreadable", f"{file} can't be read to its end: {error.error_string}") from error


def _cut_short(file: str | os.PathLike, promised: int, there: int, offset: float, rate: int) -> UnusableAudio:
    where = f" from {offset:g} s on" if offset else ""
    return UnusableAudio(
        "cut short",
        f"{file} is cut short: {promised} samples at {rate} Hz are expected{where}, but {there} are there.",
    )


def _at_16_khz(waveform: np.ndarray, rate: int) -> np.ndarray:
    return waveform if rate == SAMPLE_RATE else soxr.resample(waveform, rate, SAMPLE_RATE)


def _downmix(channels: np.ndarray, rate: int) -> tuple[np.ndarray, int]:
    """Channels [S, C] -> their mean [S], or the loudest where they cancel; and of how many samples that is.

    They do where less than half of the power is left that the mean of independent channels has: neither
    stereo of any usual kind nor a channel that is silent comes near it. A second of nothing but quantisation
    noise becomes silence. Both are decided anew for each second, since recordings are put together of
    different parts.
    """
    mono = channels.mean(1)
    cancelled = 0
    for start in range(0, len(channels), rate):
        part = channels[start : start + rate]
        if np.ptp(part) <= QUANTISATION and len(np.unique(part)) <= 3:
            mono[start : start + rate] = np.median(part)
        elif part.shape[1] > 1:
            power = np.square(part, dtype=np.float64).mean(0)
            independent = power.sum() / power.size**2
            if np.square(mono[start : start + rate], dtype=np.float64).mean() < independent / 2:
                # Of channels about as loud always the same, or the sign would change at each second.
                loudest = int(np.argmax(power >= power.max() / 2))
                mono[start : start + rate] = part[:, loudest]
                cancelled += len(part)
    return mono, cancelled


def _warn_of_cancelled(warn: Warn, what: str | os.PathLike, seconds: float) -> None:
    if seconds:
        warn(
            AudioWarning(
                "channels cancel each other: the loudest is taken",
                f"{what}: its channels cancel each other in {seconds:.1f} s: there the loudest is taken.",
            )
        )


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a recording: waveform float32 [S] at 16 kHz. start: the place of its first sample in the
    recording; overlaps: it begins with what the window before ends with."""

    start: int
    waveform: np.ndarray
    overlaps: bool = False

    @property
    def seconds(self) -> tuple[float, float]:
        """Start and end."""
        return self.start / SAMPLE_RATE, (self.start + len(self.waveform)) / SAMPLE_RATE


def cut(
    blocks: Iterable[np.ndarray], max_samples: int, *, speech_pad: float = 0.25, min_samples: int = 400
) -> Iterator[Window]:
    """A recording, in blocks float32 [S] at 16 kHz, as windows of at most `max_samples`.

    One that is no longer is one window. Others are cut in long pauses, else in a short one in the second half
    of what fits, else at its end, with an overlap; and where a block is empty, since another recording begins
    there. What is left out is silence alone: of pauses in which one begins or ends, all but `speech_pad`
    seconds.
    Raises UnusableAudio for a recording that is empty, too short, silent or not finite.
    """
    start, found, faults = 0, False, []

    def counted(part: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal start
        for block in part:
            start += len(block)
            yield block

    for seam, part in itertools.groupby(blocks, lambda block: not len(block)):
        if seam:
            continue
        before = start
        try:
            for window in _cut_one(counted(part), max_samples, speech_pad, min_samples):
                yield dataclasses.replace(window, start=before + window.start)
                found = True
        except UnusableAudio as error:
            if error.reason == "not finite":
                raise
            faults.append(error)  # of one that may be silence between others
    if faults and not found:
        raise faults[0]
    if not found:
        check(np.zeros(0, np.float32), min_samples=min_samples, max_samples=max_samples)


def _cut_one(
    blocks: Iterator[np.ndarray], max_samples: int, speech_pad: float, min_samples: int
) -> Iterator[Window]:
    """`cut` for one recording, without seams."""
    buffer, start, total, loudest = np.zeros(0, np.float32), 0, 0, -np.inf
    kept, ahead = round(speech_pad * SAMPLE_RATE), round(LONG_PAUSE * SAMPLE_RATE)
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
            if end - begin < min_samples:  # a click, say
                begin, end = 0, total
            yield Window(begin, buffer[begin:end])
            return
        seen = buffer[: max_samples + ahead]
        loudest = max(loudest, _loudness(seen))
        last = not more and buffer.size <= max_samples
        end, following = _place_to_cut(seen, max_samples, kept, loudest, last=last)
        if end and np.ptp(buffer[:end]) >= SILENCE:
            waveform = np.pad(buffer[:end], (0, max(0, min_samples - end)))
            yield Window(start, waveform, overlaps)
            found = True
        overlaps = following < end
        buffer, start = buffer[following:], start + following
    if not found:
        raise UnusableAudio("silent", "it is silent.")


def _without_edges(waveform: np.ndarray, speech_pad: int) -> tuple[int, int]:
    """Where a waveform float32 [S] begins and ends: of pauses at its edges, `speech_pad` samples stay."""
    begin, end = 0, len(waveform)
    for pause in _pauses(waveform, _loudness(waveform)):
        if pause[0] == 0:
            begin = max(begin, pause[1] - speech_pad)
        elif pause[1] == len(waveform):
            end = min(end, pause[0] + speech_pad)
    return begin, end


def _place_to_cut(
    seen: np.ndarray, max_samples: int, speech_pad: int, loudest: float, *, last: bool
) -> tuple[int, int]:
    """Where a window should end, and where the next one should begin, of what is seen float32 [S].

    An end of 0 leaves out what is before the next one: a pause, but for its last `speech_pad` samples.
    loudest: the loudness of the recording so far. last: nothing follows what is seen.
    """
    size = min(len(seen), max_samples)
    pauses = [pause for pause in _pauses(seen, loudest) if pause[0] < size]
    if pauses and pauses[0][0] == 0 and pauses[0][1] > speech_pad:
        return 0, size if last and pauses[0][1] == size else pauses[0][1] - speech_pad
    for begin, end in pauses:
        if begin and end - begin >= LONG_PAUSE * SAMPLE_RATE:
            kept = min(speech_pad, (end - begin) // 2)
            return min(begin + kept, size), size if last and end == size else end - kept
    if last:
        return size, size
    later = [pause for pause in pauses if pause[0] >= size // 2]
    if later:
        begin, end = max(later, key=lambda pause: pause[1] - pause[0])
        kept = min(speech_pad, (end - begin) // 2)
        return min(begin + kept, size), end - kept
    return size, size - min(round(OVERLAP * SAMPLE_RATE), size // 4)


def _levels(window: np.ndarray) -> np.ndarray:
    """The levels of a window float32 [S], in dB, of every 5 ms. Of digital silence: -200."""
    frames = window[: len(window) // HOP * HOP].reshape(-1, HOP)
    return 10 * np.log10(np.square(frames - np.median(window), dtype=np.float64).mean(1) + 1e-20)


def _loudness(window: np.ndarray) -> float:
    """The level of what is loud in a window float32 [S], but for clicks, in dB."""
    return float(np.percentile(_levels(window), 95)) if len(window) >= HOP else -np.inf


def _pauses(window: np.ndarray, loudest: float) -> list[tuple[int, int]]:
    """The stretches of a window float32 [S], in samples, in which it is quiet for SHORT_PAUSE or longer.

    loudest: the loudness of its recording.
    """
    levels = _levels(window)
    if not len(levels):
        return []
    # Near what is quietest here, if that is much quieter than what is loud; or next to nothing.
    limit = min(np.percentile(levels, 10) + 10, np.percentile(levels, 95) - 20)
    limit = max(limit, min(loudest - 50, -70), -190)
    edges = np.flatnonzero(np.diff(np.pad(levels < limit, 1).astype(np.int8)))
    stretches = [(int(begin) * HOP, int(end) * HOP) for begin, end in edges.reshape(-1, 2)]
    if stretches and stretches[-1][1] == len(levels) * HOP:
        stretches[-1] = (stretches[-1][0], len(window))
    long = [pause for pause in stretches if pause[1] - pause[0] >= SHORT_PAUSE * SAMPLE_RATE]
    return [_digital_silence(window, *pause) for pause in long]


def _digital_silence(window: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """The zeros in a pause, if they are most of it: an editor has put them there, and what is soft around
    them belongs to what is said."""
    first = max(0, begin - HOP)
    edges = np.flatnonzero(np.diff(np.pad(window[first : end + HOP] == 0, 1).astype(np.int8)))
    runs = edges.reshape(-1, 2) + first
    longest = max(runs.tolist(), key=lambda run: run[1] - run[0], default=[begin, begin])
    return tuple(longest) if longest[1] - longest[0] > (end - begin) // 2 else (begin, end)


def count_samples(file: str | os.PathLike) -> int:
    """The number of samples that `read` gives, by the headers, each recording's rounded up. Raises as `read`
    does."""
    return sum(
        math.ceil(recording.frames * SAMPLE_RATE / recording.samplerate)
        for recording in _recordings(file, lambda warning: None)
    )


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
    if np.ptp(waveform) < SILENCE:
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


def _recordings(file: str | os.PathLike, warn: Warn) -> Iterator[soundfile.SoundFile]:
    """The recordings in a file, one after the other, each open until the next is asked for."""
    path = epath.Path(file)
    if not path.exists():
        raise FileNotFoundError(f"{file} does not exist.")
    if path.is_dir():
        raise UnusableAudio("unreadable", f"{file} is a folder, not a recording.")
    with path.open("rb") as content:
        try:
            found = streams.find(content, path.suffix)
        except UnusableAudio as error:
            raise UnusableAudio(error.reason, f"{file}: {error}") from None
        for pieces in found:
            with contextlib.ExitStack() as stack:
                try:
                    # Not by its name, whose ending would be taken for a format: any text.au would be noise.
                    view = streams.View(content, pieces)
                    recording = stack.enter_context(soundfile.SoundFile(view))
                    _check_length_known(file, recording)
                except (soundfile.LibsndfileError, TypeError) as error:
                    reason = getattr(error, "error_string", str(error))
                    wav = stack.enter_context(_converted(file, pieces, reason, warn))
                    recording = stack.enter_context(soundfile.SoundFile(wav))
                yield recording


@contextmanager
def _converted(file: str | os.PathLike, pieces: streams.Pieces, reason: str, warn: Warn) -> Iterator[str]:
    """A recording in a file as a wav file, for as long as it is needed, made by ffmpeg.

    reason: why libsndfile can't read it.
    """
    if not shutil.which("ffmpeg") or "://" in os.fspath(file):
        others = f"where ffmpeg is installed, local files such as {', '.join(FFMPEG)} are read as well"
        raise _unreadable(file, reason, others)
    with tempfile.TemporaryDirectory() as folder:
        wav = os.path.join(folder, "converted.wav")
        ranges = [piece for piece in pieces if isinstance(piece, range)]
        part = f"subfile,,start,{ranges[0].start},end,{ranges[-1].stop},,:file:{file}"
        # Neither playlists, which name other files, nor the network.
        command = ["ffmpeg", "-nostdin", "-hide_banner", "-nostats", "-v", "level+info"]
        command += ["-protocol_whitelist", "file,subfile", "-format_whitelist", DEMUXERS, "-i", part]
        command += ["-vn", "-c:a", "pcm_s24le", "-fs", str(LARGEST), wav]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        errors = re.findall(r"\[(?:error|fatal|panic)\] (.*)", done.stderr)
        if done.returncode:
            why = errors[-1].rpartition(f"{file}: ")[2] if errors else "no reason is given"
            raise _unreadable(file, f"{reason.rstrip('.')}; ffmpeg: {why}", "ffmpeg reads others")
        if errors:  # of which it has left out a part
            raise UnusableAudio("cut short", f"{file} can't be read to its end by ffmpeg: {errors[0]}")
        if os.path.getsize(wav) > LARGEST - (1 << 20):  # ffmpeg stops a little before, and says nothing
            raise UnusableAudio("too long", f"{file} has more than {LARGEST >> 30} GiB of audio: cut it.")
        tracks = len(re.findall(r"Stream #0:.*: Audio:", done.stderr.partition("Output #0")[0]))
        if tracks > 1:
            reason = "several audio tracks at once: one is heard"
            warn(AudioWarning(reason, f"{file} has {tracks} audio tracks at once: one of them is heard."))
        yield wav


def _unreadable(file: str | os.PathLike, reason: str, others: str) -> UnusableAudio:
    return UnusableAudio(
        "unreadable",
        f"{file} can't be read as a recording ({reason}): give wav, flac, mp3, ogg or opus; {others}.",
    )


def _check_length_known(file: str | os.PathLike, recording: soundfile.SoundFile) -> None:
    if recording.frames >= 2**62:  # what libsndfile says of flac that was written into a pipe, and can't read
        raise TypeError("it does not say how long it is")
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
