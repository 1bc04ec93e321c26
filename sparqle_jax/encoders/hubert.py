"""HuBERT: waveform -> frames. Base, large and x-large from one file, by configuration.

It has wav2vec 2.0's model, and was trained otherwise.
"""

from sparqle_jax.encoders.wav2vec2 import Config, Encoder, table

__all__ = ["PREFIXES", "Config", "Encoder", "table"]

PREFIXES = ("hubert.",)
