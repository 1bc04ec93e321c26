"""Adapters: frames -> tokens, of which a linear map makes embeddings. A part is a file; each has these names:

    Config                          frozen pydantic model of what a run may choose, told apart by its `kind`
      width                         A, of the tokens
      min_frames                    the fewest frames that give a token
      num_tokens(frames)            Q of so many frames (int or array)
      flops(size, frames, frames_width, frames_gradient)   matrix products of a training step, forward and
                                    backward; frames_gradient: that of the frames is wanted too
    Adapter(config, frames_width, *, dtype, rngs)
      __call__(frames, mask, key)   [B, T, D] and bool [B, T]; with a key, dropout is on
                                    -> tokens [B, Q, A] and their mask bool [B, Q]
      attention(frames, mask)       only where there is one: how much each token looks at each frame, float32
                                    [layers, B, Q, T], rows of sum 1
      config, dtype

All parameters of an adapter train. A padded batch gives each example the tokens that it has alone.
"""

from types import ModuleType
from typing import Annotated

import pydantic

from sparqle_jax.adapters import qformer

# By the `kind` in a configuration.
KINDS: dict[str, ModuleType] = {"qformer": qformer}
PAPERS = qformer.Config()
Config = Annotated[qformer.Config, pydantic.Field(discriminator="kind")]
