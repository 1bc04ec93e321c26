"""The recordings that a file holds, one after the other: decoders stop at the end of the first.

Podcasts with inserted parts, radio and dashcams join files as they are: MP3 to MP3, Ogg to Ogg (which its
specification calls chained), and so on. Each recording may have its own rate and channels, so each is decoded
by itself, as a view of the file. Nothing is decoded here.
"""

import dataclasses
import io
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import BinaryIO

CUT_TOLERANCE = 0.15  # seconds by which the headers of mp3 files may be wrong
UNKNOWN = 1024  # bytes between frames and after the end that may be no audio: tags that nobody knows
CHUNK = 1 << 20  # bytes that are looked at at once

Pieces = Sequence[bytes | range]


class UnusableAudio(ValueError):
    """A recording can't be used. reason: the same for all of its kind."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class View(io.RawIOBase):
    """Pieces of a file as a file: bytes that it should have, and ranges of those that it has."""

    def __init__(self, file: BinaryIO, pieces: Pieces):
        self._file, self._pieces = file, pieces
        self._starts = [0, *accumulate(map(len, pieces))]
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(0, offset + (0, self._place, self._starts[-1])[whence])
        return self._place

    def readinto(self, buffer) -> int:
        done = 0
        while done < len(buffer) and self._place < self._starts[-1]:
            number = bisect_right(self._starts, self._place) - 1
            piece = self._pieces[number]
            inside = self._place - self._starts[number]
            part = piece[inside : inside + len(buffer) - done]
            if isinstance(part, range):
                self._file.seek(part.start)
                part = self._file.read(len(part))
                if not part:
                    break
            buffer[done : done + len(part)] = part
            done += len(part)
            self._place += len(part)
        return done


class _Bytes:
    """Bytes of a file by their place, read in large chunks: most are asked for one after the other."""

    def __init__(self, file: BinaryIO):
        self._file, self._start, self._chunk = file, 0, b""
        self.size = file.seek(0, io.SEEK_END)

    def __call__(self, place: int, number: int) -> bytes:
        inside = place - self._start
        if inside < 0 or inside + number > len(self._chunk):
            self._file.seek(place)
            self._start, self._chunk, inside = place, self._file.read(max(number, CHUNK)), 0
        return self._chunk[inside : inside + number]

    def find(self, pattern: re.Pattern, place: int) -> int:
        """Where a pattern of at most 128 bytes is next found, or the end of the file."""
        while place < self.size:
            chunk = self(place, CHUNK)
            if found := pattern.search(chunk):
                return place + found.start()
            place += max(CHUNK - 128, 1)
        return self.size


def find(file: BinaryIO, suffix: str) -> list[Pieces]:
    """The pieces of which the recordings in a file are made, in their order.

    suffix: of its name. Raises UnusableAudio for a file that goes on after what can be read of it, or ends
    before.
    """
    bytes_at = _Bytes(file)
    start = _after_tags(bytes_at, 0)
    head = bytes_at(start, 128)
    if head.startswith(b"OggS"):
        return [[piece] for piece in _ogg(bytes_at, start)]
    if _CHUNKED.match(head):
        return list(_chunked(bytes_at, start))
    if head[4:8] == b"ftyp":
        return [[piece] for piece in _boxes(bytes_at, start)]
    for pattern in _STARTS:
        if pattern.match(head):
            return [[piece] for piece in _from_start_to_start(bytes_at, start, pattern)]
    if _frame(head[:4]) or suffix.lower() in (".mp3", ".mp2", ".mpga"):
        return _mpeg(bytes_at, start)
    return [[range(bytes_at.size)]]


# Where a recording begins, for formats in which nothing says where it ends.
_STARTS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rb"fLaC[\x00\x80]\x00\x00\x22",
        rb"\.snd\x00\x00.{6}\x00\x00\x00[\x01-\x1b]\x00[\x00-\x05]..\x00\x00\x00.",  # au
        rb"caff\x00\x01\x00\x00desc",
        rb"riff\.\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00",  # w64
        rb"NIST_1A\n",
        rb"Creative Voice File\x1a",
        rb"PVF1\n",
        rb"#!AMR(-WB)?\n",
        rb"FLV\x01.\x00\x00\x00\x09\x00\x00\x00\x00",
        rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",  # asf: wma
        rb"\x1a\x45\xdf\xa3.{1,60}?\x42\x82.(webm|matroska)",
    )
]


def _from_start_to_start(bytes_at: _Bytes, start: int, pattern: re.Pattern) -> Iterator[range]:
    while start < bytes_at.size:
        end = bytes_at.find(pattern, start + 1)
        yield range(start, end)
        start = end


def _after_tags(bytes_at: _Bytes, place: int) -> int:
    """Where the tags end that begin at a place, of the kinds that stand before, between and after frames."""
    while True:
        head = bytes_at(place, 32)
        if head.startswith(b"ID3") and len(head) >= 10:
            size = sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
            place += 10 + size + (10 if head[5] & 16 else 0)
        elif head.startswith(b"TAG"):
            place += 128
        elif head.startswith(b"APETAGEX") and len(head) == 32:
            is_header = head[23] & 0x20
            place += 32 + (int.from_bytes(head[12:16], "little") if is_header else 0)
        elif head.startswith(b"LYRICSBEGIN"):
            place = bytes_at.find(re.compile(rb"LYRICS200|LYRICSEND"), place) + 9
        else:
            return min(place, bytes_at.size)


def _check_rest(bytes_at: _Bytes, start: int, end: int, lost: int = 0) -> int:
    """The number of bytes lost with these, which hold no audio that can be read; tags and zeros do not count.

    lost: how many were before. Raises UnusableAudio for more than a little at once, or altogether.
    """
    start = _after_tags(bytes_at, start)
    start = bytes_at.find(re.compile(rb"[^\x00]"), start)
    lost += max(0, end - start)
    if end - start > UNKNOWN or lost > max(UNKNOWN, bytes_at.size // 1000):
        raise UnusableAudio(
            "cut short",
            f"only a part of it can be read: {lost} of its {bytes_at.size} bytes, up to byte {end}, are not "
            "of its format, or more than its header declares: cut them off, or convert it.",
        )
    return lost


# --- Ogg -------------------------------------------------------------------------------------------------


def _ogg(bytes_at: _Bytes, start: int) -> Iterator[range]:
    """A new one begins with the pages that begin streams: several, where streams are played at once."""
    place, beginning, audible, lost = start, True, 0, 0
    while place < bytes_at.size:
        head = bytes_at(place, 27)
        if not head.startswith(b"OggS"):
            found = bytes_at.find(re.compile(b"OggS"), place)
            lost = _check_rest(bytes_at, place, found, lost)
            place = found
            continue
        if len(head) < 27:
            break
        lengths = bytes_at(place + 27, head[26])
        first = bool(head[5] & 2)
        if first and not beginning:
            yield range(start, place)
            start, audible = place, 0
        if first:
            codec = bytes_at(place + 27 + len(lengths), 8)
            audible += codec.startswith((b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex"))
        if audible > 1:
            raise UnusableAudio("unreadable", "it has several audio streams at once: give one.")
        beginning = first
        place += 27 + len(lengths) + sum(lengths)
    yield range(start, bytes_at.size)


# --- MP4 -------------------------------------------------------------------------------------------------


def _boxes(bytes_at: _Bytes, start: int) -> Iterator[range]:
    place = start
    while place + 8 <= bytes_at.size:
        head = bytes_at(place, 16)
        if head[4:8] == b"ftyp" and place > start:
            yield range(start, place)
            start = place
        size = int.from_bytes(head[:4])
        size = int.from_bytes(head[8:16]) if size == 1 else size
        if size < 8:
            break
        place += size
    yield range(start, bytes_at.size)


# --- WAV, AIFF and AVI -----------------------------------------------------------------------------------

_CHUNKED = re.compile(rb"(RIFF|RIFX|RF64|FORM)....(WAVE|AVI |AIFF|AIFC|8SVX|16SV)", re.DOTALL)
_NAME = re.compile(rb"[ -~]{4}")


def _chunked(bytes_at: _Bytes, start: int) -> Iterator[Pieces]:
    """Ended by what their chunks say, or by the file, where the size of the audio was never written."""
    while start < bytes_at.size and (kind := _CHUNKED.match(bytes_at(start, 12))):
        order = "big" if kind[1] in (b"FORM", b"RIFX") else "little"
        long_size, place = 0, start + 12
        while place + 8 <= bytes_at.size and not _CHUNKED.match(bytes_at(place, 12)):
            head = bytes_at(place, 24)
            if not _NAME.match(head):
                break
            size = int.from_bytes(head[4:8], order)
            if head.startswith(b"ds64"):
                long_size = int.from_bytes(head[16:24], "little")
            if head.startswith(b"data") and kind[2] == b"WAVE":
                if kind[1] == b"RF64" and size == 0xFFFFFFFF and 0 < long_size < 2**62:
                    size = long_size
                elif _never_written(size) and not (
                    _chunks_to_the_end(bytes_at, place + 8, order) or 0 < size <= bytes_at.size - place - 8
                ):
                    # To the end of the file, says the largest number.
                    name, unknown = b"RIFX" if kind[1] == b"RIFX" else b"RIFF", b"\xff" * 4
                    before = range(start + 8, place + 4)
                    yield [name + unknown, before, unknown, range(place + 8, bytes_at.size)]
                    return
            if place + 8 + size > bytes_at.size and not head.startswith((b"data", b"SSND", b"BODY")):
                break
            place += 8 + size
            # Chunks begin at even places. Not all programs know.
            if size % 2 and not (_NAME.match(bytes_at(place, 4)) and not _NAME.match(bytes_at(place + 1, 4))):
                place += 1
        place = min(place, bytes_at.size)
        if not _CHUNKED.match(bytes_at(place, 12)):
            if kind[2] != b"AVI ":  # whose sizes ffmpeg does not need
                _check_rest(bytes_at, place, bytes_at.size)
            place = bytes_at.size
        yield [range(start, place)]
        start = place


def _never_written(size: int) -> bool:
    """Whether a size is what programs write that do not know it yet, and may never come to write it."""
    return size == 0 or 0x7FFF0000 <= size <= 0x80010000 or size >= 0xFFFFFF00


def _chunks_to_the_end(bytes_at: _Bytes, place: int, order: str) -> bool:
    """Whether nothing but chunks, or nothing at all, is from here to the end: there is no audio then."""
    while place + 8 <= bytes_at.size and _NAME.match(head := bytes_at(place, 8)):
        size = int.from_bytes(head[4:], order)
        place += 8 + size + size % 2
    return bytes_at.size <= place <= bytes_at.size + 1


# --- MPEG: mp3 ---------------------------------------------------------------------------------------------

_BIT_RATES = {  # kbit/s, by whether it is MPEG 1, and layer
    (True, 1): range(0, 449, 32),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# libsndfile can't read mp3 that is not a file of its own unless it begins with a tag.
_TAG = b"ID3\x04\x00\x00\x00\x00\x00\x23" + bytes(0x23)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The header of a frame. size: bytes."""

    header: bytes
    version: int  # 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5
    layer: int
    rate: int
    channels: int
    size: int

    @property
    def samples(self) -> int:
        return {1: 384, 2: 1152, 3: 1152 if self.version == 3 else 576}[self.layer]

    @property
    def info(self) -> int:
        """Where in it the number of frames may be."""
        return (
            4
            + {(True, 2): 32, (True, 1): 17, (False, 2): 17, (False, 1): 9}[self.version == 3, self.channels]
        )

    def continues(self, other: "_Frame") -> bool:
        return (self.version, self.layer, self.rate, self.channels) == (
            other.version,
            other.layer,
            other.rate,
            other.channels,
        )

    def counting(self, frames: int) -> bytes:
        """A frame without sound that declares how many follow (a Xing header)."""
        kbits = 64
        index = _BIT_RATES[self.version == 3, 3].index(kbits)
        header = bytes([255, self.header[1] | 1, self.header[2] & 0x0C | index << 4, self.header[3]])
        frame = header + bytes(self.info - 4) + b"Xing" + (1).to_bytes(4) + frames.to_bytes(4)
        return frame.ljust(self.samples // 8 * kbits * 1000 // self.rate, b"\0")


def _frame(header: bytes) -> _Frame | None:
    if len(header) < 4 or header[0] != 255 or header[1] < 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bit_rate, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return None
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = _BIT_RATES[version == 3, layer][bit_rate] * 1000
    padding = header[2] >> 1 & 1
    frame = _Frame(header, version, layer, hertz, 1 if header[3] >> 6 == 3 else 2, 0)
    if layer == 1:
        return dataclasses.replace(frame, size=(12 * bits // hertz + padding) * 4)
    return dataclasses.replace(frame, size=frame.samples // 8 * bits // hertz + padding)


@dataclasses.dataclass
class _Track:
    """Frames of one kind. declared: how many, if a header of this length says it; runs: where they are."""

    frame: _Frame
    declared: int | None = None
    header: range | None = None
    number: int = 0
    runs: list[range] = dataclasses.field(default_factory=list)

    def pieces(self) -> Pieces:
        seconds = self.frame.samples / self.frame.rate
        if self.declared is not None and (self.declared - self.number) * seconds > CUT_TOLERANCE:
            raise UnusableAudio(
                "cut short",
                f"it is cut short: its header declares {self.declared} frames, "
                f"{self.declared * seconds:.1f} s, but it has {self.number}, {self.number * seconds:.1f} s.",
            )
        if self.header is not None and self.declared == self.number:
            return [_TAG, self.header, *self.runs]
        # Else the decoder would guess the number from the size of the first frames, and stop there.
        counting = [self.frame.counting(self.number)] if self.frame.layer == 3 else []
        return [_TAG, *counting, *self.runs]


def _mpeg(bytes_at: _Bytes, place: int) -> list[Pieces]:
    tracks: list[_Track] = []
    frames: dict[bytes, _Frame | None] = {}  # by their headers: few differ, and all have to be looked at
    sync = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]", re.DOTALL)

    def frame_at(where: int) -> _Frame | None:
        header = bytes_at(where, 4)
        if header not in frames:
            frames[header] = _frame(header)
        return frames[header]

    def confirmed(where: int, frame: _Frame) -> bool:
        """Whether another frame of its kind follows: four bytes may look like a header by chance."""
        after = frame_at(where + frame.size)
        return where + frame.size == bytes_at.size or (after is not None and frame.continues(after))

    in_step, lost = False, 0
    while place < bytes_at.size:
        frame = frame_at(place)
        same = frame is not None and tracks and in_step and frame.continues(tracks[-1].frame)
        if frame is None or not (same or confirmed(place, frame)):
            after = _after_tags(bytes_at, place)
            if after == place:
                after = bytes_at.find(sync, place + 1)
                while after < bytes_at.size and not ((frame := frame_at(after)) and confirmed(after, frame)):
                    if bytes_at(after, 3) == b"ID3":
                        break
                    after = bytes_at.find(sync, after + 1)
                # The last frame is often incomplete.
                if tracks and place + tracks[-1].frame.size < bytes_at.size:
                    lost = _check_rest(bytes_at, place, after, lost)
            place, in_step = after, False
            continue
        if place + frame.size > bytes_at.size:
            break
        declared = _declared(bytes_at(place, min(frame.size, 192)), frame)
        if declared is not None:
            tracks.append(_Track(frame, declared, range(place, place + frame.size)))
        else:
            if not tracks or not frame.continues(tracks[-1].frame):
                tracks.append(_Track(frame))
            track = tracks[-1]
            if track.runs and track.runs[-1].stop == place:
                track.runs[-1] = range(track.runs[-1].start, place + frame.size)
            else:
                track.runs.append(range(place, place + frame.size))
            track.number += 1
        place += frame.size
        in_step = True
    return [track.pieces() for track in tracks if track.number or track.declared] or [[range(bytes_at.size)]]


def _declared(content: bytes, frame: _Frame) -> int | None:
    """The number of frames that follow, if this one is there to say it; else 0."""
    for place in (frame.info, frame.info + 2):  # with a checksum
        if frame.layer == 3 and content[place : place + 4] in (b"Xing", b"Info"):
            says = content[place + 7 : place + 8] and content[place + 7] & 1
            return int.from_bytes(content[place + 8 : place + 12]) if says else 0
    if content[36:40] == b"VBRI":
        return int.from_bytes(content[50:54])
    return None
