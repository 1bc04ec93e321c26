"""The model of stage 2 and of inference, `SpeechLLM`; stage 1's is in `aligner.py`.

    Aligner   waveform -> encoder -> Q-Former <-> text             (STC + STM + STG, no LLM)
    SpeechLLM waveform -> encoder -> adapter -> projection -> LLM  (loss on the answer)

Both have `loss(batch, key, *, train) -> (loss, metrics)`: the key draws negatives and, when `train`, dropout.
Batches are dictionaries of arrays, with parts from `audio.pad`, `prompts.collate_texts` (stage 1) and
`prompts.collate` (stage 2). Masks: 1 is real.

Shape letters, here and everywhere: B batch, S waveform samples, T frames, Q queries, L text tokens,
D encoder width, A adapter width, M LLM width, E width of the contrastive features, N heads, K key/value
heads, H head size, F feed-forward width, C places for keys (of a cache, say), W beams, V vocabulary.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparqle_jax import flops, layers, losses
from sparqle_jax.compat import Compat, check_compat
from sparqle_jax.llms import lora
from sparqle_jax.sharding import split_batch

Batch = Mapping[str, jax.Array]


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
        encoder: nnx.Module,
        adapter: nnx.Module,
        projection: nnx.Module,
        llm: nnx.Module,
        *,
        compat: Compat = None,
    ):
        check_compat(compat)
        self.encoder, self.adapter, self.projection, self.llm = encoder, adapter, projection, llm
        self.compat = compat

    def embed_speech(self, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Embeddings [B, Q, M] that stand for the speech of a batch, and their mask bool [B, Q].

        With a key, dropout is on.
        """
        frames, mask = encode_speech(self.encoder, batch)
        if self.compat == "published":
            mask = jnp.ones_like(mask)  # the published Q-Former looks at padding as well
        tokens, mask = self.adapter(frames, mask, key)
        return split_batch(self.projection(tokens)), mask

    def embed_prompt(self, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """All that the LLM reads before it answers: embeddings [B, L, M] and their mask bool [B, L].

        A batch without waveform and frames has no speech: the LLM then answers to the text of the prompt
        alone.
        """
        if "waveform" in batch or "frames" in batch:
            speech, mask = self.embed_speech(batch, key)
        else:
            speech = jnp.zeros((len(batch["before"]), 0, self.llm.config.width), self.llm.dtype)
            mask = jnp.ones(speech.shape[:2], bool)
        return join_prompt(self.llm, batch, speech, mask)

    def loss(
        self, batch: Batch, key: jax.Array, *, train: bool = True
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of the answer, averaged over the answer tokens of the batch; and their number."""
        prompt, mask = self.embed_prompt(batch, key if train else None)
        llm = lora.with_dropout(self.llm, key) if train else self.llm
        loss = answer_loss(llm, prompt, mask, batch["answer"], batch["answer_mask"])
        return loss, {"tokens": batch["answer_mask"].sum()}

    def flops(self, batch: Batch) -> dict[str, int]:
        """Matrix products of one training step, forward and backward, by part of the model.

        The model and the batch may be abstract (`nnx.eval_shape`): shapes are all that is read, as far as
        they are padded. Every position counts, real or padding, seen by attention or not; an LM head has the
        positions that `losses.token_loss` gives it, a multiple of 32 (or all, when there are fewer). Nothing
        is computed twice. A batch with `frames` needs no encoder.
        """
        adapter, llm = self.adapter.config, self.llm.config
        encoder, (size, frames) = encoder_flops(self.encoder, batch)
        frames_gradient = bool(self.encoder.TRAINED)
        adapting = adapter.flops(size, frames, self.encoder.config.width, frames_gradient)
        # Tokens need a gradient when something trains before them: some adapters only pool frames.
        projecting = flops.TRAINED if adapting or frames_gradient else flops.TRAINED - 1
        tokens, answer = adapter.num_tokens(frames), batch["answer"].shape[1]
        prompt = batch["before"].shape[1] + tokens + batch["after"].shape[1]
        linear, attention = llm.flops(size, prompt, answer)
        low_rank = lora.flops(self.llm, size * (prompt + answer - 1))  # nothing reads the answer's last token
        positions = size * flops.in_blocks(answer)
        return {
            "encoder": encoder,
            "adapter": adapting,
            "projection": projecting * flops.linear(size * tokens, adapter.width, llm.width),
            "llm": flops.FROZEN * linear + flops.TRAINED * attention + low_rank,
            "LM head": flops.FROZEN * flops.linear(positions, llm.width, llm.vocab_size),
        }


def encode_speech(encoder: nnx.Module, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The encoder's frames [B, T, D] of a batch, and their mask bool [B, T].

    They are the batch's own, frames [B, T, D] and frames_mask, where it has them (`data.frames`), or else
    computed from its waveform [B, S] and waveform_mask.
    """
    if "frames" in batch:
        return jnp.asarray(batch["frames"], encoder.dtype), batch["frames_mask"]
    frames, mask = encoder(batch["waveform"], batch.get("waveform_mask"))
    return frames if encoder.TRAINED else jax.lax.stop_gradient(frames), mask


def join_prompt(
    llm: nnx.Module, batch: Batch, middle: jax.Array, middle_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The prompt around what stands for the speech: middle [B, Q, M] -> embeddings [B, L, M], mask [B, L]."""
    before, after = llm.embed(batch["before"]), llm.embed(batch["after"])
    embeddings = jnp.concatenate([before, middle, after], 1)
    return embeddings, jnp.concatenate([batch["before_mask"], middle_mask, batch["after_mask"]], 1)


def answer_loss(
    llm: nnx.Module, prompt: jax.Array, prompt_mask: jax.Array, answer: jax.Array, answer_mask: jax.Array
) -> jax.Array:
    """Cross-entropy of answers int [B, L] after prompts [B, P, M]: the mean over all answer tokens."""
    hidden = llm.answer_states(prompt, prompt_mask, answer, answer_mask)
    return losses.token_loss(hidden, answer, answer_mask, llm.logits)


def encoder_flops(encoder: nnx.Module, batch: Batch) -> tuple[int, tuple[int, int]]:
    """The encoder's forward pass, and how many examples and frames come out of it."""
    if "frames" in batch:
        return 0, batch["frames"].shape[:2]
    size, samples = batch["waveform"].shape
    return encoder.config.flops(size, samples), (size, encoder.config.num_frames(samples))


@functools.cache
def min_samples(encoder: Any, adapter: Any) -> int:
    """The shortest waveform of which the adapter makes a token. encoder, adapter: their Configs."""
    samples = encoder.min_samples
    while encoder.num_frames(samples) < adapter.min_frames:
        samples += 1
    return samples


def is_trained(model: nnx.Module, path: tuple) -> bool:
    """Whether a parameter trains: all of the adapter, the projection and the heads; of the frozen towers what
    their TRAINED names. Raises ValueError for one that is in none of these parts."""
    part, name = path[0], ".".join(map(str, path[1:]))
    if part in ("adapter", "projection", "heads"):
        return True
    if part in ("encoder", "llm"):
        return any(re.fullmatch(pattern, name) for pattern in getattr(model, part).TRAINED)
    raise ValueError(f"it is not known whether {part}.{name} trains: it is in none of the parts of a model.")


def partition(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, trained parameters, frozen parameters); `nnx.merge` of the three gives the model again.

    Raises ValueError as `is_trained` does.
    """
    return nnx.split(model, lambda path, _: is_trained(model, tuple(path)), ...)


class Projection(nnx.Linear):
    """The linear map from tokens [B, Q, A] to the LLM's embeddings [B, Q, M], as the adapter's Config says.

    In some published systems it has no bias, or a norm follows. Parameters are in float32.
    """

    def __init__(self, adapter: Any, llm_width: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        super().__init__(
            adapter.width,
            llm_width,
            use_bias=adapter.projection_bias,
            dtype=dtype,
            param_dtype=jnp.float32,
            kernel_init=nnx.initializers.normal(0.02),
            kernel_metadata={"axes": (None, "embed")},
            bias_metadata={"axes": ("embed",)},
            rngs=rngs,
        )
        kwargs = dict(param_dtype=jnp.float32, rngs=rngs)
        if adapter.projection_norm == "layer":
            self.norm = layers.LayerNorm(llm_width, 1e-5, **kwargs)
        elif adapter.projection_norm == "rms":
            self.norm = layers.RMSNorm(llm_width, 1e-6, **kwargs)
        else:
            self.norm = None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        embeddings = super().__call__(tokens)
        return embeddings if self.norm is None else self.norm(embeddings)
