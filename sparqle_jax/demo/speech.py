"""Speech from espeak-ng: its library and voices come inside the wheel `espeakng-loader`."""

import ctypes
import dataclasses
import functools
from pathlib import Path

import espeakng_loader
import numpy as np
import soxr

from sparqle_jax.audio import SAMPLE_RATE

ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-us-nyc")
SEEN = (
    *(
        "m1",
        "m2",
        "m3",
        "m4",
        "m6",
        "m7",
        "f1",
        "f2",
        "f4",
        "f5",
        "Alex",
        "Alicia",
        "Andrea",
        "Andy",
        "Annie",
    ),
    *("Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Marco", "Michael", "Mike", "Nguyen", "Reed"),
    *("anika", "antonio", "aunty", "benjamin", "boris", "caleb", "david", "ed", "grandma", "grandpa", "iven"),
    *("john", "linda", "marcelo", "max", "michel", "miguel", "norbert", "pablo", "paul", "pedro", "quincy"),
    *("rob", "robert", "sandro", "shelby", "steph", "travis", "victor", "zac"),
)
UNSEEN = ("m5", "m8", "f3", "adam", "belinda", "edward", "Lee", "Mario")


@dataclasses.dataclass(frozen=True)
class Voice:
    """The way a sentence is spoken: accent of English, variant (whose voice), words per minute, pitch and
    its range from 0 to 100."""

    accent: str = "en-us"
    variant: str = "m3"
    rate: int = 180
    pitch: int = 50
    pitch_range: int = 50


def draw_voice(rng: np.random.Generator, variants: tuple[str, ...]) -> Voice:
    """A random voice, with one of these variants, at a speed and a pitch of ordinary talk."""
    return Voice(
        accent=str(rng.choice(ACCENTS)),
        variant=str(rng.choice(variants)),
        rate=int(rng.integers(180, 241)),
        pitch=int(rng.integers(30, 71)),
        pitch_range=int(rng.integers(30, 71)),
    )


def synthesise(text: str, voice: Voice) -> np.ndarray:
    """float32 [S] at 16 kHz, samples from -1 to 1.

    Raises ValueError for a voice that is not there and for a text with nothing to say. Can be used in several
    processes when they are spawned; two calls need not give the same samples to the bit.
    """
    rate, library, chunks = _library()
    variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    # espeak-ng itself takes another voice for a variant that it does not know.
    if not (variants / voice.variant).is_file():
        names = sorted(path.name for path in variants.iterdir())
        raise ValueError(f"espeak-ng has no voice variant {voice.variant!r}; it has {names}.")
    if library.espeak_SetVoiceByName(f"{voice.accent}+{voice.variant}".encode()) != 0:
        raise ValueError(f"espeak-ng has no accent {voice.accent!r}; used here are {list(ACCENTS)}.")
    for parameter, value in ((1, voice.rate), (3, voice.pitch), (4, voice.pitch_range)):
        library.espeak_SetParameter(parameter, value, 0)
    chunks.clear()
    data = text.encode()
    utf8 = 1
    library.espeak_Synth(data, len(data) + 1, 0, 0, 0, utf8, None, None)
    samples = np.concatenate(chunks) if chunks else np.zeros(0, np.int16)
    if not samples.any():
        raise ValueError(f"there is nothing to say in {text!r}.")
    return soxr.resample(samples.astype(np.float32) / 32768, rate, SAMPLE_RATE)


@functools.cache
def _library() -> tuple[int, ctypes.CDLL, list[np.ndarray]]:
    """Its sample rate, the library, and the list into which it puts samples. Once per process: there is one
    callback for all."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous = 2  # without a thread of its own, which would not survive a fork
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    rate = library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng could not be started (error {rate}).")
    library.espeak_Synth.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p),
    ]
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, events):
        if samples and count:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    library.keep_callback = receive  # or Python frees it while the library still calls it
    return rate, library, chunks
