"""compat="published": what the published SparQLe weights were made with, where it is not what is right.

Each module does its part: the encoder reads its mask inverted and the adapter looks at padding
(`SpeechLLM`), waveforms are divided by their peak (the encoder), and the prompt has two BOS, is cut out of
the chat template by position, and ends its answer at a newline (`Prompter`). With None everything is done
right: for all models that are trained here.
"""

from typing import Literal

Compat = Literal["published"] | None


def check_compat(compat: str | None, *others: str) -> None:
    """Raises ValueError when `compat` is neither None nor "published" nor one of `others`."""
    allowed = (None, "published", *others)
    if compat not in allowed:
        raise ValueError(f"compat must be one of {list(allowed)}, got {compat!r}.")
