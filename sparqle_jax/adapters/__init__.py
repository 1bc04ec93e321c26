"""Adapters: frames -> tokens, of which a linear map makes embeddings. A part is a file; each has these names:

    Config                          frozen pydantic model of what a run may choose, told apart by its `kind`
      width                         A, of the tokens
      projection_bias               whether the projection has one
      projection_norm               None, or the norm after the projection: "layer" or "rms"
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

All parameters of an adapter train. Its last linear map, to the width of the LLM, is not part of it: that is
the projection, `model.Projection`. Real frames stand before padding; a padded batch gives each example the
tokens that it has alone, and none to one of fewer than min_frames.
"""

from types import ModuleType
from typing import Annotated, Union

import pydantic

from sparqle_jax.adapters import (
    conv1d,
    cross_attention,
    fully_connected,
    linear,
    pooling,
    qformer,
    windowed_qformer,
)

# By the `kind` in a configuration.
KINDS: dict[str, ModuleType] = {
    "conv1d": conv1d,
    "cross_attention": cross_attention,
    "fully_connected": fully_connected,
    "linear": linear,
    "pooling": pooling,
    "qformer": qformer,
    "windowed_qformer": windowed_qformer,
}
PAPERS = qformer.Config()
Config = Annotated[
    Union[tuple(kind.Config for kind in KINDS.values())],  # noqa: UP007
    pydantic.Field(discriminator="kind"),
]
