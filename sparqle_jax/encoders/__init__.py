"""Encoders: waveform -> frames. A part is a file; each has these names:

    Config                          frozen dataclass of sizes
      from_dict(config, preprocessor)   from transformers' config.json and preprocessor_config.json (None: no
                                    file is read); ValueError for what is not supported
      width                         D, of the frames
      num_hidden_layers             of which `hidden_states` gives one more
      min_samples, max_samples      the shortest waveform that gives a frame; the longest that is heard at
                                    once, None for any
      num_frames(samples)           T of a waveform of so many samples (int or array)
      flops(size, samples)          matrix products of a forward pass over float [size, samples]
    Encoder(config, *, dtype, param_dtype, remat, rngs)
      __call__(waveform, mask)      float [B, S] from -1 to 1 at 16 kHz and bool [B, S] (None: no padding)
                                    -> frames [B, T, D] and their mask bool [B, T]
      hidden_states(waveform, mask) the same of every layer: [layers + 1, B, T, D], and the mask
      config, dtype, TRAINED        patterns of its parameters that train: none of a frozen encoder
    PREFIXES, table(config)         prefixes of its tensors in transformers' files; which is which parameter

What an encoder needs of a waveform besides (normalisation, log-mel) are its first lines, on the device. A
padded batch gives each example the frames that it has alone.
"""

from types import ModuleType

from sparqle_jax.encoders import hubert, wav2vec2, wavlm, whisper

# By the `model_type` in config.json.
FAMILIES: dict[str, ModuleType] = {
    "hubert": hubert,
    "wav2vec2": wav2vec2,
    "wavlm": wavlm,
    "whisper": whisper,
}
