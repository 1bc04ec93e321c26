"""The losses: contrastive (STC), matching (STM) and token losses. Pure functions of features, in float32.

After the stage-1 model of the reference (sparqle_qformer_base_raw.py); under `jax.jit` with sharded
arrays the batch is the global one, so negatives come from all hosts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def similarity(speech_features: jax.Array, text_features: jax.Array, temperature: jax.Array) -> jax.Array:
    """Similarities of every recording with every text: the best of its queries, divided by the temperature.

    speech_features [B, Q, E], text_features [B, E], both of length 1 -> float32 [B, B], speech by text.
    """
    # Differences between similarities are small, and the temperature makes them 14 times as large.
    products = jnp.einsum("bQE,tE->btQ", speech_features, text_features, precision="highest")
    return products.max(-1) / temperature


def contrastive_loss(similarities: jax.Array, recording_ids: jax.Array) -> jax.Array:
    """STC: soft cross-entropy in both directions; transcripts of one recording are all its positives.

    similarities [B, B], recording_ids int [B] -> scalar. Targets are smoothed by 0.1.
    """
    same = (recording_ids[:, None] == recording_ids[None, :]).astype(jnp.float32)
    targets = optax.smooth_labels(same / same.sum(1, keepdims=True), 0.1)
    speech_to_text = optax.softmax_cross_entropy(similarities, targets)
    text_to_speech = optax.softmax_cross_entropy(similarities.T, targets)
    return (speech_to_text.mean() + text_to_speech.mean()) / 2


def negative_logits(similarities: jax.Array, recording_ids: jax.Array) -> jax.Array:
    """Log-weights with which column j is the hard negative of row i; one's own recording never is.

    The more similar, the likelier. A row without a negative is -inf throughout.
    """
    same = recording_ids[:, None] == recording_ids[None, :]
    return jnp.where(same, -jnp.inf, jax.lax.stop_gradient(similarities))


def draw_negatives(
    key: jax.Array, similarities: jax.Array, recording_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws a hard negative recording for each text, and a text for each recording: two int32 [B]."""
    speech_key, text_key = jax.random.split(key)
    speech = jax.random.categorical(speech_key, negative_logits(similarities.T, recording_ids))
    text = jax.random.categorical(text_key, negative_logits(similarities, recording_ids))
    return speech, text


def matching_loss(logits: jax.Array, recording_ids: jax.Array) -> jax.Array:
    """STM: do recording and text belong together?

    logits [3B, 2]: of B pairs, of B texts with a wrong recording, of B recordings with a wrong text. Where
    the batch holds nothing but one recording there is no negative, and the two false pairs don't count.
    """
    batch = len(recording_ids)
    labels = jnp.concatenate([jnp.ones(batch, jnp.int32), jnp.zeros(2 * batch, jnp.int32)])
    has_negative = (recording_ids[:, None] != recording_ids[None, :]).any(1)
    counts = jnp.concatenate([jnp.ones(batch, bool), has_negative, has_negative])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.where(counts, losses, 0.0).sum() / counts.sum()


def token_loss(
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    to_logits: Callable[[jax.Array], jax.Array],
    *,
    label_smoothing: float = 0.0,
    block: int = 32,
) -> jax.Array:
    """Mean cross-entropy of the real target tokens over the (global) batch.

    hidden [B, L, M]: the states that predict targets int [B, L] where mask bool [B, L] is 1;
    to_logits: [..., M] -> [..., V]. Logits exist for `block` positions of each example at a time, in the
    backward pass too, which computes them again: V is 128,256 for Llama 3, and B x L x V would not fit.
    Blocks in which no example has a target are left out.
    """
    length = hidden.shape[1]
    block = max(1, min(block, length))
    padding = -length % block
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets, mask = (jnp.pad(x, ((0, 0), (0, padding))) for x in (targets, mask.astype(bool)))

    def blocks(x):  # [B, L, ...] -> [L / block, B, block, ...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    def block_loss(hidden, targets, mask):
        scores = jax.nn.log_softmax(to_logits(hidden))
        likelihood = jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
        losses = -(1 - label_smoothing) * likelihood
        if label_smoothing:
            losses -= label_smoothing * scores.mean(-1)
        return jnp.where(mask, losses, 0.0).sum()

    @jax.checkpoint  # around the condition: inside, each block would keep a copy of the LM head
    def step(total, xs):
        return total + jax.lax.cond(xs[2].any(), block_loss, lambda *_: jnp.zeros(()), *xs), None

    total, _ = jax.lax.scan(step, jnp.zeros(()), (blocks(hidden), blocks(targets), blocks(mask)))
    return total / jnp.maximum(mask.sum(), 1)
