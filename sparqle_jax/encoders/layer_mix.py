"""A learned mix of all layers of an encoder, in place of its last one, as in s3prl and SpeechVerse.

The encoder stays frozen; one weight per layer trains.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerMix(nnx.Module):
    """An encoder whose frames are the sum of the `hidden_states` of another, weighted by a softmax.

    As s3prl's Featurizer has it: the input of the first layer counts, and the last layer is the encoder's
    output, in pre-norm models after the final norm. All layers begin with the same weight.
    """

    def __init__(self, encoder: nnx.Module, *, rngs: nnx.Rngs):
        self.encoder, self.config, self.dtype = encoder, encoder.config, encoder.dtype
        self.TRAINED = ("weights", *(rf"encoder\.{pattern}" for pattern in encoder.TRAINED))
        zeros = nnx.initializers.zeros_init()
        shape = (encoder.config.num_hidden_layers + 1,)
        self.weights = nnx.Param(zeros(rngs.params(), shape, jnp.float32), axes=(None,))

    def __call__(self, waveform: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """waveform float [B, S] at 16 kHz, mask bool [B, S] -> (frames [B, T, D], mask bool [B, T])."""
        states, frames_mask = self.encoder.hidden_states(waveform, mask)
        if not self.encoder.TRAINED:
            states = jax.lax.stop_gradient(states)
        weights = jax.nn.softmax(self.weights[...])[:, None, None, None]
        # Not a matrix product: fused, it reads each layer once and keeps nothing in float32.
        return (weights * states).sum(0).astype(self.dtype), frames_mask

    def hidden_states(
        self, waveform: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The encoder's own: [num_hidden_layers + 1, B, T, D], and the frames' mask bool [B, T]."""
        return self.encoder.hidden_states(waveform, mask)
