"""From speech and prompt to the tokens of an answer: greedy and beam search on a cache of fixed size.

One program: a prefill that reads the prompt, then a loop that stops when all answers have ended. The
results are those of transformers' `generate` for the same settings (generation/utils.py there).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sparqle_jax.llms.decoder import Decoder, KVCache
from sparqle_jax.model import Batch, SpeechLLM, last_real

NEVER = -1.0e9  # the score of what must not be chosen, as in transformers: finite, so that sums stay so


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Settings, under transformers' names; all are static in a compiled program.

    eos_token_ids: tokens that end an answer (`Prompter.end_id`); pad_token_id: what stands after its end.
    early_stopping: whether beam search ends as soon as there are `num_beams` whole answers.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and num_beams={self.num_beams} must be at least 1."
            )
        if not self.eos_token_ids:
            raise ValueError("eos_token_ids is empty: give the tokens that end an answer (Prompter.end_id).")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0 (1 is none).")


def generate(model: SpeechLLM, batch: Batch, config: GenerationConfig) -> jax.Array:
    """Answers to a batch (see `SpeechLLM`, without its answer): int32 [B, max_new_tokens].

    An answer stands with the token that ended it, if it ended, and `pad_token_id` after that. Compiled
    once for each shape of the batch and each configuration.
    """
    graph, state = nnx.split(model)
    return _generate(graph, state, dict(batch), config)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(graph: nnx.GraphDef, state: nnx.State, batch: Batch, config: GenerationConfig) -> jax.Array:
    model = nnx.merge(graph, state)
    prompt, mask = model.embed_prompt(batch)
    size = prompt.shape[1] + config.max_new_tokens
    hidden, cache = model.llm(prompt, mask, model.llm.init_cache(prompt.shape[0], size))
    logits = model.llm.logits(last_real(hidden, mask))
    search = _greedy if config.num_beams == 1 else _beam
    return search(model.llm, logits, cache, config)


def _next_logits(llm: Decoder, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """tokens int [B] -> float32 [B, V] for the token after them."""
    hidden, cache = llm(tokens[:, None], None, cache)
    return llm.logits(hidden[:, 0]), cache


def _ends(tokens: jax.Array, config: GenerationConfig) -> jax.Array:
    return jnp.isin(tokens, jnp.array(config.eos_token_ids))


def _discourage(
    scores: jax.Array, tokens: jax.Array, length: jax.Array, config: GenerationConfig
) -> jax.Array:
    """Repetition penalty and banned n-grams: scores [B, V], tokens int [B, L] of which `length` are there."""
    size = config.no_repeat_ngram_size
    rows = jnp.arange(tokens.shape[0])[:, None]
    there = jnp.arange(tokens.shape[1]) < length
    if config.repetition_penalty != 1.0:
        seen = jnp.zeros(scores.shape, bool).at[rows, tokens].max(there)
        penalty = config.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if 0 < size <= tokens.shape[1]:
        # An n-gram that begins like the last n - 1 tokens must not end as it did before.
        starts = jnp.arange(tokens.shape[1] - size + 1)
        windows = tokens[:, starts[:, None] + jnp.arange(size)]  # [B, starts, size]
        last = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(length - size + 1, 0), size - 1, 1)
        same = (windows[..., :-1] == last[:, None]).all(-1) & (starts + size <= length)
        banned = jnp.zeros(scores.shape, bool).at[rows, windows[..., -1]].max(same)
        scores = jnp.where(banned, -jnp.inf, scores)
    return scores


def _greedy(llm: Decoder, logits: jax.Array, cache: KVCache, config: GenerationConfig) -> jax.Array:
    batch, steps = logits.shape[0], config.max_new_tokens
    tokens = jnp.full((batch, steps), config.pad_token_id, jnp.int32)

    def choose(i, logits, tokens, ended):
        token = jnp.argmax(_discourage(logits, tokens, i, config), -1).astype(jnp.int32)
        token = jnp.where(ended, config.pad_token_id, token)
        return tokens.at[:, i].set(token), ended | _ends(token, config)

    def going_on(state):
        i, _, ended, _ = state
        return (i < steps) & ~ended.all()

    def step(state):
        i, tokens, ended, cache = state
        logits, cache = _next_logits(llm, tokens[:, i - 1], cache)
        tokens, ended = choose(i, logits, tokens, ended)
        return i + 1, tokens, ended, cache

    tokens, ended = choose(0, logits, tokens, jnp.zeros(batch, bool))
    return jax.lax.while_loop(going_on, step, (jnp.int32(1), tokens, ended, cache))[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Beams:
    """State of beam search.

    tokens int [B, W, L], scores [B, W]: the beams that go on. done_*: the best whole answers so far, their
    scores divided by length ** length_penalty, and which of them are there. open bool [B]: could a
    beam still become one of the best?
    """

    step: jax.Array
    tokens: jax.Array
    scores: jax.Array
    done_tokens: jax.Array
    done_scores: jax.Array
    done: jax.Array
    open: jax.Array
    cache: KVCache


def _beam(llm: Decoder, logits: jax.Array, cache: KVCache, config: GenerationConfig) -> jax.Array:
    batch, vocab = logits.shape
    beams, length = config.num_beams, config.max_new_tokens
    # If every beam's best continuation ended it, there are still as many others to go on with.
    kept = max(2, 1 + len(config.eos_token_ids)) * beams
    empty = jnp.full((batch, beams, length), config.pad_token_id, jnp.int32)

    def continue_beams(state: _Beams, logits: jax.Array) -> _Beams:
        """One token more: logits [B, W, V] -> the state after it, with the cache in the new beams' order."""
        scores = jax.nn.log_softmax(logits).reshape(batch * beams, vocab)
        scores = _discourage(scores, state.tokens.reshape(batch * beams, length), state.step, config)
        scores = (scores.reshape(batch, beams, vocab) + state.scores[..., None]).reshape(batch, -1)
        scores, chosen = jax.lax.top_k(scores, kept)
        parents, token = chosen // vocab, chosen % vocab
        tokens = _take(state.tokens, parents).at[:, :, state.step].set(token.astype(jnp.int32))
        ended = _ends(token, config) | (state.step + 1 >= length)

        going_scores, going = jax.lax.top_k(scores + NEVER * ended, beams)
        whole = ended & (jnp.arange(kept) < beams)
        full = state.done.all(1, keepdims=True) & config.early_stopping
        done_scores = scores / (state.step + 1.0) ** config.length_penalty
        done_scores += NEVER * full + NEVER * ~state.open[:, None] + NEVER * ~whole
        done_scores, best = jax.lax.top_k(jnp.concatenate([state.done_scores, done_scores], 1), beams)
        done = _take(jnp.concatenate([state.done, whole], 1), best)

        reachable = going_scores[:, 0] / (state.step + 1.0) ** config.length_penalty
        worst = jnp.where(done, done_scores.min(1, keepdims=True), NEVER)
        return _Beams(
            step=state.step + 1,
            tokens=_take(tokens, going),
            scores=going_scores,
            done_tokens=_take(jnp.concatenate([state.done_tokens, tokens], 1), best),
            done_scores=done_scores,
            done=done,
            open=state.open & (reachable[:, None] > worst).any(1),
            cache=_reorder(state.cache, _take(parents, going)),
        )

    def going_on(state: _Beams) -> jax.Array:
        all_done = state.done.all() & config.early_stopping
        return (state.step < length) & state.open.any() & ~all_done

    def step(state: _Beams) -> _Beams:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, 2, keepdims=False)
        logits, cache = _next_logits(llm, last.reshape(-1), state.cache)
        state = dataclasses.replace(state, cache=cache)
        return continue_beams(state, logits.reshape(batch, beams, vocab))

    start = _Beams(
        step=jnp.int32(0),
        tokens=empty,
        # The beams begin equal: only the first counts, or all would go on alike.
        scores=jnp.full((batch, beams), NEVER).at[:, 0].set(0.0),
        done_tokens=empty,
        done_scores=jnp.full((batch, beams), NEVER),
        done=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        cache=_repeat(cache, beams),
    )
    start = continue_beams(start, jnp.broadcast_to(logits[:, None], (batch, beams, vocab)))
    return jax.lax.while_loop(going_on, step, start).done_tokens[:, 0]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, W, ...], index int [B, W'] -> [B, W', ...]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _map_rows(cache: KVCache, function: Callable[[jax.Array, int], jax.Array]) -> KVCache:
    """The cache with `function(array, axis)` done to its batch axes."""
    return dataclasses.replace(
        cache, keys=function(cache.keys, 1), values=function(cache.values, 1), mask=function(cache.mask, 0)
    )


def _repeat(cache: KVCache, beams: int) -> KVCache:
    return _map_rows(cache, lambda x, axis: jnp.repeat(x, beams, axis))


def _reorder(cache: KVCache, parents: jax.Array) -> KVCache:
    """Each beam goes on with its parent's cache: parents int [B, W]."""
    batch, beams = parents.shape
    rows = (parents + beams * jnp.arange(batch)[:, None]).reshape(-1)
    return _map_rows(cache, lambda x, axis: jnp.take(x, rows, axis))
