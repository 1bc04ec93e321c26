"""Stage 1 of SparQLe: speech and text meet in the Q-Former, without the LLM (STC + STM + STG).

The shape letters are those of `model.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers, losses
from sparqle_jax.model import Batch, encode_speech, encoder_flops

STAGE_1_LOSSES = ("stc", "stm", "stg")
SPEECH = ("waveform", "waveform_mask", "frames", "frames_mask")  # what of a batch the encoder hears


class AlignmentHeads(nnx.Module):
    """The heads of stage 1's losses, which train with the adapter."""

    def __init__(
        self, adapter_width: int, embed_dim: int = 256, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = dict(dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        self.speech_projection = layers.linear(adapter_width, embed_dim, ("embed", None), **kwargs)
        self.text_projection = layers.linear(adapter_width, embed_dim, ("embed", None), **kwargs)
        self.matching = layers.linear(adapter_width, 2, ("embed", None), **kwargs)
        self.temperature = nnx.Param(jnp.float32(0.07), axes=())

    def speech_features(self, queries: jax.Array) -> jax.Array:
        """queries [B, Q, A] -> float32 [B, Q, E] of length 1."""
        return _normalise(self.speech_projection(queries))

    def text_features(self, text: jax.Array) -> jax.Array:
        """The encoded text [B, L, A] -> float32 [B, E] of length 1, from its first token."""
        return _normalise(self.text_projection(text[:, 0]))


class Aligner(nnx.Module):
    """Stage 1: speech and text meet in the Q-Former, without the LLM.

    batch: waveform float [B, S], waveform_mask bool [B, S], text int [B, L] (the adapter's tokens,
    from its [CLS] on), text_mask bool [B, L], recording_id int [B] (equal for texts of one recording).
    losses: which of STAGE_1_LOSSES are trained on, for ablations. accumulate: into how many parts a batch is
    cut that go through the adapter one after the other, as in GradCache (Gao et al., 2021): features of all
    are compared, so the losses are those of the whole batch, and the memory is that of a part.
    """

    def __init__(
        self,
        encoder: nnx.Module,
        adapter: nnx.Module,
        heads: AlignmentHeads,
        *,
        losses: Sequence[str] = STAGE_1_LOSSES,
        accumulate: int = 1,
    ):
        if not hasattr(adapter, "encode_pairs"):
            raise ValueError(
                f"stage 1 compares speech with text in the adapter, but kind={adapter.config.kind!r} has no "
                "text half (qformer has): leave stage 1 out (--set stage1=null), or choose that adapter."
            )
        if unknown := set(losses) - set(STAGE_1_LOSSES):
            raise ValueError(f"losses {sorted(unknown)} do not exist; choose among {list(STAGE_1_LOSSES)}.")
        self.encoder, self.adapter, self.heads = encoder, adapter, heads
        self.losses, self.accumulate = tuple(losses), accumulate

    def matching_logits(
        self,
        frames: jax.Array,
        frames_mask: jax.Array | None,
        text: jax.Array,
        text_mask: jax.Array,
        negatives: tuple[jax.Array, jax.Array],
        key: jax.Array | None = None,
    ) -> jax.Array:
        """float32 [3B, 2]: of the pairs, of texts with wrong recordings, of recordings with wrong texts.

        negatives: indices int [B] of the wrong recordings and of the wrong texts.
        """
        wrong_speech, wrong_text = negatives
        if frames_mask is None:
            frames_mask = jnp.ones(frames.shape[:2], bool)
        rows = (frames, frames_mask, frames[wrong_speech], frames_mask[wrong_speech])
        rows += (text, text_mask, text[wrong_text], text_mask[wrong_text])

        def logits_of(
            key, frames, mask, other_frames, other_mask, text, text_mask, other_text, other_text_mask
        ):
            queries = self.adapter.encode_pairs(
                jnp.concatenate([frames, other_frames, frames]),
                jnp.concatenate([mask, other_mask, mask]),
                jnp.concatenate([text, text, other_text]),
                jnp.concatenate([text_mask, text_mask, other_text_mask]),
                key,
            )
            logits = self.heads.matching(queries).astype(jnp.float32).mean(1)
            return logits.reshape(3, -1, 2).swapaxes(0, 1)

        return _whole(self._in_parts(logits_of, key, rows)).swapaxes(0, 1).reshape(-1, 2)

    def loss(
        self,
        batch: Batch,
        key: jax.Array,
        *,
        train: bool = True,
        negatives: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum of the losses, and each by name.

        negatives: the indices of the hard negatives, in place of drawing them (see `matching_logits`).
        """
        speech = {name: batch[name] for name in SPEECH if name in batch}
        text, text_mask, ids = (jnp.asarray(batch[k]) for k in ("text", "text_mask", "recording_id"))
        negatives_key, features_key, pairs_key = jax.random.split(key, 3)
        if not train:
            features_key = pairs_key = None

        frames, frames_mask = map(
            _whole, self._in_parts(lambda _, speech: encode_speech(self.encoder, speech), None, (speech,))
        )
        rows = (frames, frames_mask, text, text_mask)
        speech_features, text_features, generation = self._in_parts(self._features, features_key, rows)
        parts = {}
        if "stc" in self.losses or "stm" in self.losses:  # hard negatives are drawn by similarity
            similarities = losses.similarity(
                _whole(speech_features), _whole(text_features), self.heads.temperature[...]
            )
        if "stc" in self.losses:
            parts["stc"] = losses.contrastive_loss(similarities, ids)
        if "stm" in self.losses:
            if negatives is None:
                negatives = losses.draw_negatives(negatives_key, similarities, ids)
            logits = self.matching_logits(frames, frames_mask, text, text_mask, negatives, pairs_key)
            parts["stm"] = losses.matching_loss(logits, ids)
        if "stg" in self.losses:
            parts["stg"] = generation.sum() / jnp.maximum(text_mask[:, 1:].sum(), 1)
        return sum(parts.values()), parts

    def _features(
        self,
        key: jax.Array | None,
        frames: jax.Array,
        frames_mask: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Some examples, each for itself: features of speech [B, Q, E] and of text [B, E], and the sum of STG
        over their tokens. What no loss reads of them is not computed."""
        speech_key, text_key, causal_key = [None] * 3 if key is None else jax.random.split(key, 3)
        queries, cache = self.adapter.encode_queries(frames, frames_mask, speech_key)
        encoded_text = self.adapter.encode_text(text, text_mask, text_key)
        generation = jnp.float32(0)
        if "stg" in self.losses:
            decoder_text = text.at[:, 0].set(self.adapter.bos_token_id)
            hidden = self.adapter.encode_text_causally(decoder_text, text_mask, cache, causal_key)
            targets, mask = text[:, 1:], text_mask[:, 1:]
            mean = losses.token_loss(
                hidden[:, :-1], targets, mask, self.adapter.lm_logits, label_smoothing=0.1
            )
            generation = mean * mask.sum()
        return self.heads.speech_features(queries), self.heads.text_features(encoded_text), generation

    def _in_parts(self, function: Callable, key: jax.Array | None, rows: tuple) -> Any:
        """`function(key, *rows)` of the examples in `accumulate` parts, one after the other: arrays [P, ...].

        The backward pass computes each part again, and keeps no more than one part's intermediate results.
        With a key, each part draws by one of its own, the same both times.
        """
        number = self.accumulate
        keys = None if key is None else jax.random.split(key, number)
        if number == 1:
            key = None if keys is None else keys[0]
            return jax.tree.map(lambda x: x[None], function(key, *rows))
        # Each part has an equal share of the examples of every device.
        cut = jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), rows)
        return jax.lax.map(jax.checkpoint(lambda part: function(*part)), (keys, *cut))

    def flops(self, batch: Batch) -> dict[str, int]:
        """Matrix products of one training step, by part of the model. See `SpeechLLM.flops`."""
        config, embed_dim = self.adapter.config, self.heads.speech_projection.out_features
        encoder, (size, frames) = encoder_flops(self.encoder, batch)
        queries, width, text = config.num_queries, config.width, batch["text"].shape[1]
        frames_width = self.encoder.config.width
        reading = dict(queries=queries, frames=frames, frames_width=frames_width)
        saved = 0 if self.encoder.TRAINED else config.frames_gradient_flops(size, frames, frames_width)

        # STC trains what it compares. STM alone compares only to draw its negatives.
        comparing = flops.TRAINED if "stc" in self.losses else flops.FORWARD if "stm" in self.losses else 0
        # STG reads no more than keys and values of the queries, but a layer is computed as a whole.
        speaking = flops.TRAINED if "stg" in self.losses else comparing
        heads = comparing * (
            flops.linear(size * queries, width, embed_dim)
            + flops.linear(size, width, embed_dim)  # of a text, its first token
            + flops.linear(size * queries, embed_dim, size)  # the similarities
        )
        parts = {
            "encoder": encoder,
            "adapter, speech": speaking * config.forward_flops(size, **reading)
            - (saved if speaking == flops.TRAINED else 0),
            "adapter, text": comparing * config.forward_flops(size, text=text),
        }
        if "stm" in self.losses:
            pairs = config.forward_flops(3 * size, text=text, **reading)
            parts["adapter, pairs"] = flops.TRAINED * pairs - 3 * saved
            heads += flops.TRAINED * flops.linear(3 * size * queries, width, 2)
        if "stg" in self.losses:
            written = config.forward_flops(size, text=text, cached=queries)
            parts["adapter, text to generate"] = flops.TRAINED * written
            positions = size * flops.in_blocks(text - 1)
            head = flops.linear(positions, width, width) + flops.linear(
                positions, width, self.adapter.vocab_size
            )
            parts["adapter, LM head"] = flops.TRAINED * head
        return parts | {"heads": heads}


def _whole(parts: jax.Array) -> jax.Array:
    """The rows of all parts [P, B / P, ...] in the order of the batch: [B, ...]."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def _normalise(x: jax.Array) -> jax.Array:
    """To length 1 over the last dimension, in float32; as torch's F.normalize, zero stays zero."""
    x = x.astype(jnp.float32)
    # The square root's derivative at zero is infinite, so the floor is under the root.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
