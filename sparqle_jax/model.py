"""The two models that are trained: `Aligner` in stage 1, `SpeechLLM` in stage 2 and for inference.

    Aligner   waveform -> encoder -> Q-Former <-> text             (STC + STM + STG, no LLM)
    SpeechLLM waveform -> encoder -> adapter -> projection -> LLM  (loss on the answer)

Both have `loss(batch, key, *, train) -> (loss, metrics)`: the key draws negatives and, when `train`,
dropout. Batches are dictionaries of arrays, with parts from `audio.pad`, `prompts.collate_texts` (stage 1)
and `prompts.collate` (stage 2). Masks: 1 is real.

Shape letters, here and everywhere: B batch, S waveform samples, T frames, Q queries, L text tokens,
D encoder width, A adapter width, M LLM width, E width of the contrastive features, N heads, K key/value
heads, H head size, F feed-forward width, C places for keys (of a cache, say), W beams, V vocabulary.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import layers, losses
from sparqle_jax.adapters.qformer import QFormer
from sparqle_jax.compat import Compat, check_compat
from sparqle_jax.encoders.hubert import Hubert
from sparqle_jax.llms.decoder import Decoder
from sparqle_jax.sharding import split_batch

Batch = Mapping[str, jax.Array]

# Which parameters train. Every parameter must match exactly one of these.
FREEZING: tuple[tuple[str, Literal["trained", "frozen"]], ...] = (
    (r"encoder\..*", "frozen"),
    (r"llm\..*", "frozen"),
    (r"adapter\..*", "trained"),
    (r"projection\..*", "trained"),
    (r"heads\..*", "trained"),
)


STAGE_1_LOSSES = ("stc", "stm", "stg")


class AlignmentHeads(nnx.Module):
    """What stage 1 trains besides the adapter: the heads of its losses."""

    def __init__(
        self, adapter_width: int, features: int = 256, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = dict(dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        self.speech_projection = layers.linear(adapter_width, features, ("embed", None), **kwargs)
        self.text_projection = layers.linear(adapter_width, features, ("embed", None), **kwargs)
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
    losses: which of STAGE_1_LOSSES are trained on, for ablations.
    """

    def __init__(
        self,
        encoder: Hubert,
        adapter: QFormer,
        heads: AlignmentHeads,
        *,
        losses: Sequence[str] = STAGE_1_LOSSES,
    ):
        _check_widths(encoder, adapter)
        if unknown := set(losses) - set(STAGE_1_LOSSES):
            raise ValueError(f"losses {sorted(unknown)} do not exist; choose among {list(STAGE_1_LOSSES)}.")
        self.encoder, self.adapter, self.heads = encoder, adapter, heads
        self.losses = tuple(losses)

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
        if frames_mask is not None:
            frames_mask = jnp.concatenate([frames_mask, frames_mask[wrong_speech], frames_mask])
        queries = self.adapter.encode_pairs(
            jnp.concatenate([frames, frames[wrong_speech], frames]),
            frames_mask,
            jnp.concatenate([text, text, text[wrong_text]]),
            jnp.concatenate([text_mask, text_mask, text_mask[wrong_text]]),
            key,
        )
        return self.heads.matching(queries).astype(jnp.float32).mean(1)

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
        frames, frames_mask = encode_speech(self.encoder, batch)
        text, text_mask, ids = (jnp.asarray(batch[k]) for k in ("text", "text_mask", "recording_id"))
        negatives_key, *keys = jax.random.split(key, 5)
        speech_key, text_key, pairs_key, causal_key = keys if train else [None] * 4

        queries, cache = self.adapter.encode_queries(frames, frames_mask, speech_key)
        parts = {}
        if "stc" in self.losses or "stm" in self.losses:  # hard negatives are drawn by similarity
            encoded_text = self.adapter.encode_text(text, text_mask, text_key)
            similarities = losses.similarity(
                self.heads.speech_features(queries),
                self.heads.text_features(encoded_text),
                self.heads.temperature[...],
            )
        if "stc" in self.losses:
            parts["stc"] = losses.contrastive_loss(similarities, ids)
        if "stm" in self.losses:
            if negatives is None:
                negatives = losses.draw_negatives(negatives_key, similarities, ids)
            logits = self.matching_logits(frames, frames_mask, text, text_mask, negatives, pairs_key)
            parts["stm"] = losses.matching_loss(logits, ids)
        if "stg" in self.losses:
            decoder_text = text.at[:, 0].set(self.adapter.config.bos_token_id)
            hidden = self.adapter.encode_text_causally(decoder_text, text_mask, cache, causal_key)
            parts["stg"] = losses.token_loss(
                hidden[:, :-1], text[:, 1:], text_mask[:, 1:], self.adapter.lm_logits, label_smoothing=0.1
            )
        return sum(parts.values()), parts


class SpeechLLM(nnx.Module):
    """Stage 2 and inference: the frozen LLM reads BOS, prompt, speech, prompt, and answers.

    batch: waveform float [B, S], waveform_mask bool [B, S], or the encoder's frames of them (see
    `encode_speech`); before and after int [B, L], padded on the left, and answer int [B, L], padded on the
    right, each with its `_mask`. So the prompt ends, and the answer begins, in the same column for all; what
    is padded is neither seen nor counted.

    compat="published" runs the encoder and the adapter as the published PyTorch code does: with its inverted
    mask, so give it one recording at a time, without padding, as that code is used.
    """

    def __init__(
        self,
        encoder: Hubert,
        adapter: QFormer,
        projection: nnx.Linear,
        llm: Decoder,
        *,
        compat: Compat = None,
    ):
        check_compat(compat)
        _check_widths(encoder, adapter)
        self.encoder, self.adapter, self.projection, self.llm = encoder, adapter, projection, llm
        self.compat = compat

    @classmethod
    def from_aligner(cls, aligner: Aligner, llm: Decoder, *, rngs: nnx.Rngs) -> "SpeechLLM":
        """Stage 2 from stage 1: the same encoder and adapter, without its text half; a new projection."""
        config = dataclasses.replace(aligner.adapter.config, text=False)
        graph, abstract = nnx.split(
            nnx.eval_shape(lambda: QFormer(config, dtype=aligner.adapter.dtype, rngs=nnx.Rngs(0)))
        )
        trained = dict(nnx.to_flat_state(nnx.state(aligner.adapter)))
        kept = [(path, trained[path]) for path, _ in nnx.to_flat_state(abstract)]
        adapter = nnx.merge(graph, nnx.from_flat_state(kept))
        projection = make_projection(config.hidden_size, llm.config.hidden_size, dtype=llm.dtype, rngs=rngs)
        return cls(aligner.encoder, adapter, projection, llm)

    def embed_speech(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """What the LLM reads in place of the speech of a batch, [B, Q, M]. With a key, dropout is on."""
        frames, frames_mask = encode_speech(self.encoder, batch, self.compat)
        if self.compat == "published":
            frames_mask = None  # the published Q-Former looks at padding as well
        return split_batch(self.projection(self.adapter(frames, frames_mask, key)))

    def embed_prompt(self, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """All that the LLM reads before it answers: embeddings [B, L, M] and their mask bool [B, L].

        A batch without waveform and frames has no speech: the LLM then answers to the text of the prompt
        alone.
        """
        if "waveform" in batch or "frames" in batch:
            speech = self.embed_speech(batch, key)
        else:
            speech = jnp.zeros((len(batch["before"]), 0, self.llm.config.hidden_size), self.llm.dtype)
        return join_prompt(self.llm, batch, speech, jnp.ones(speech.shape[:2], bool))

    def loss(
        self, batch: Batch, key: jax.Array, *, train: bool = True
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of the answer, averaged over the answer tokens of the batch; and their number."""
        prompt, prompt_mask = self.embed_prompt(batch, key if train else None)
        loss = answer_loss(self.llm, prompt, prompt_mask, batch["answer"], batch["answer_mask"])
        return loss, {"tokens": batch["answer_mask"].sum()}


def encode_speech(encoder: Hubert, batch: Batch, compat: Compat = None) -> tuple[jax.Array, jax.Array | None]:
    """The frozen encoder's frames [B, T, D] of a batch, and their mask bool [B, T].

    They are the batch's own, frames [B, T, D] and frames_mask, where it has them (`data.frames`), or else
    computed from its waveform [B, S] and waveform_mask.
    """
    if "frames" in batch:
        return jnp.asarray(batch["frames"], encoder.dtype), batch["frames_mask"]
    frames, frames_mask = encoder(batch["waveform"], batch.get("waveform_mask"), compat=compat)
    return jax.lax.stop_gradient(frames), frames_mask


def join_prompt(
    llm: Decoder, batch: Batch, middle: jax.Array, middle_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The prompt around what stands for the speech: middle [B, Q, M] -> embeddings [B, L, M], mask [B, L]."""
    before, after = llm.embed(batch["before"]), llm.embed(batch["after"])
    embeddings = jnp.concatenate([before, middle, after], 1)
    return embeddings, jnp.concatenate([batch["before_mask"], middle_mask, batch["after_mask"]], 1)


def answer_loss(
    llm: Decoder, prompt: jax.Array, prompt_mask: jax.Array, answer: jax.Array, answer_mask: jax.Array
) -> jax.Array:
    """Cross-entropy of answers int [B, L] after prompts [B, L', M]: the mean over all answer tokens."""
    # The last token of the answer predicts nothing, so the LLM need not read it.
    embeddings = jnp.concatenate([prompt, llm.embed(answer[:, :-1])], 1)
    mask = jnp.concatenate([prompt_mask, answer_mask[:, :-1]], 1)
    hidden, _ = llm(embeddings, mask)
    length = prompt.shape[1]
    first = last_real(hidden[:, :length], prompt_mask)  # which predicts the answer's first token
    hidden = jnp.concatenate([first[:, None], hidden[:, length:]], 1)
    return losses.token_loss(hidden, answer, answer_mask, llm.logits)


def partition(
    model: nnx.Module, rules: Sequence[tuple[str, str]] = FREEZING
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, trained parameters, frozen parameters); `nnx.merge` of the three gives the model again.

    Raises ValueError with the names of all parameters that match no rule, or several.
    """
    kinds, problems = {}, []
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        matches = [kind for pattern, kind in rules if re.fullmatch(pattern, name)]
        if len(matches) == 1:
            kinds[path] = matches[0]
        else:
            problems.append(f"  {name}: {len(matches)} rules")
    if problems:
        raise ValueError(
            "every parameter must match exactly one rule, trained or frozen; mend the rules for:\n"
            + "\n".join(problems)
        )
    return nnx.split(model, lambda path, _: kinds[tuple(path)] == "trained", ...)


def last_real(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The state of each row's last real position: hidden [B, L, M], mask bool [B, L] -> [B, M]."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], 1)
    return jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]


def make_projection(
    adapter_width: int, llm_width: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> nnx.Linear:
    """The linear map from queries [B, Q, A] to the LLM's embeddings [B, Q, M]; parameters in float32."""
    axes = (None, "embed")
    return layers.linear(adapter_width, llm_width, axes, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def _check_widths(encoder: Hubert, adapter: QFormer) -> None:
    if encoder.config.hidden_size != adapter.config.encoder_width:
        raise ValueError(
            f"the encoder's frames are {encoder.config.hidden_size} wide but the adapter reads "
            f"{adapter.config.encoder_width}: set the adapter's encoder_width to the encoder's hidden_size."
        )


def _normalise(x: jax.Array) -> jax.Array:
    """To length 1 over the last dimension, in float32; as torch's F.normalize, zero stays zero."""
    x = x.astype(jnp.float32)
    # The square root's derivative at zero is infinite, so the floor is under the root.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
