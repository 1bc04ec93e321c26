"""Generates the tokens of an answer to speech and prompt: greedy and beam search, and sampling.

Two programs: `_prefill` reads the prompt into a cache of fixed size and chooses the first tokens, `_decode`
goes on for some steps. Between those, answers that have ended are left out, so that they cost nothing more.
The results are those of transformers' `generate` for the same settings (generation/utils.py there).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparqle_jax import hosts
from sparqle_jax.model import Batch, SpeechLLM
from sparqle_jax.sharding import BATCH_AXES, MESH_AXES, batch_parts

NEVER = -1.0e9  # the score of what must not be chosen, as in transformers: finite, so that sums stay so
CHUNK = 8  # steps of `_decode`
CACHE_MULTIPLE = 32  # of places: prompts of about the same length share a `_decode`
SMALLEST_BATCH = 4  # of which no answers are left out: a step costs about the same for fewer


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Settings, under transformers' names; all but the seed are static in a compiled program.

    eos_token_ids: tokens that end an answer (`Prompter.end_id`); pad_token_id: what stands after its end.
    min_new_tokens, max_new_tokens: how many tokens an answer has, its end included.
    length_penalty, early_stopping: of beam search. It ends as soon as there are `num_beams` whole answers
    (True), when better ones are unlikely (False), or when they can't be ("never").
    do_sample: draws tokens instead of taking the best; temperature, top_k (0: all), top_p and seed say how.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int = 0
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and num_beams={self.num_beams} must be at least 1."
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be between 0 and "
                f"max_new_tokens={self.max_new_tokens}."
            )
        if not self.eos_token_ids:
            raise ValueError("eos_token_ids is empty: give the tokens that end an answer (Prompter.end_id).")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f'early_stopping={self.early_stopping!r} must be True, False or "never".')
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0 (1 is none).")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(
                f"no_repeat_ngram_size={self.no_repeat_ngram_size} must be at least 0 (which is none)."
            )
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"do_sample=True with num_beams={self.num_beams}: sampling has one beam; choose either."
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0; for the best tokens, do_sample=False."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (which is all tokens).")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be between 0 and 1 (which is all tokens).")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be between 0 and 2**32 - 1.")


def generate(model: SpeechLLM, batch: Batch, config: GenerationConfig) -> np.ndarray:
    """Answers to a batch (see `SpeechLLM`, without its answer): int32 [B, max_new_tokens].

    An answer stands with the token that ended it, if it ended, and `pad_token_id` after that. It is the same
    in any batch. Drawn answers too: all rows draw by `config.seed`, unless the batch has a `seed` int [B],
    for rows that are to differ. Compiled once for each shape of the batch and each configuration, but for
    the seed.
    """
    *_, tokens = stream(model, batch, config)
    rest = config.max_new_tokens - tokens.shape[1]
    return np.pad(tokens, ((0, 0), (0, rest)), constant_values=config.pad_token_id)


def stream(model: SpeechLLM, batch: Batch, config: GenerationConfig) -> Iterator[np.ndarray]:
    """The answers as they come, every few tokens: int32 [B, tokens so far].

    Of beam search, the best so far, which may still change. The last is what `generate` gives.
    """
    programs = _Programs(model, config)
    state, outputs = programs.prefill(batch)
    step, unfinished, tokens = map(hosts.all_gather, outputs)
    answers, rows = tokens.copy(), np.arange(len(tokens))
    sizes = _smaller_sizes(len(tokens), programs.parts)
    yield answers[:, :step].copy()
    while unfinished.any():
        while sizes and unfinished.sum() <= sizes[0]:
            kept = np.argsort(~unfinished, kind="stable")[: sizes.pop(0)]
            state, rows, unfinished = programs.keep(state, kept), rows[kept], unfinished[kept]
        state, outputs = programs.decode(state)
        step, unfinished, tokens = map(hosts.all_gather, outputs)
        answers[rows] = tokens
        yield answers[:, :step].copy()


def _smaller_sizes(batch: int, parts: int) -> list[int]:
    """Sizes that a batch shrinks to as its answers end: half or less, a multiple of the mesh's parts, ..."""
    size, sizes = parts, []
    while size <= batch // 2:
        if size >= SMALLEST_BATCH:
            sizes.insert(0, size)
        size *= 2
    return sizes


class _Programs:
    """The programs for a model and a configuration."""

    def __init__(self, model: SpeechLLM, config: GenerationConfig):
        self.model, self.llm = nnx.split(model), nnx.split(model.llm)
        self.config, self.seed = dataclasses.replace(config, seed=0), config.seed
        self.mesh = _mesh(self.model[1])
        self.parts = 1 if self.mesh is None else batch_parts(self.mesh)

    def prefill(self, batch: Batch) -> tuple["_State", "_Outputs"]:
        seeds = batch.get("seed", np.full(batch["before"].shape[0], self.seed, np.uint32))
        graph, parameters = self.model
        return self._on_mesh(_prefill, graph, self.config, parameters, dict(batch), seeds)

    def decode(self, state: "_State") -> tuple["_State", "_Outputs"]:
        return self._on_mesh(_decode, self.llm[0], self.config, self.llm[1], state)

    def keep(self, state: "_State", rows: np.ndarray) -> "_State":
        return self._on_mesh(_keep, state, rows)

    def _on_mesh(self, program: Callable, *args: Any) -> Any:
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return program(*args)


def _mesh(parameters: nnx.State) -> Mesh | None:
    """The mesh that the caller is in (`jax.set_mesh`), or else the one that the parameters lie on."""
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        return mesh
    sharding = getattr(jax.tree.leaves(parameters)[0], "sharding", None)
    on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == MESH_AXES
    return sharding.mesh if on_mesh else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _GreedyState:
    """State of greedy search and of sampling.

    tokens int [B, L]; unfinished bool [B]: which have not ended; seeds uint32 [B].
    """

    tokens: jax.Array
    unfinished: jax.Array
    seeds: jax.Array

    @property
    def best(self) -> jax.Array:
        return self.tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _BeamState:
    """State of beam search.

    tokens int [B, W, L], scores [B, W]: the beams that go on. done_*: the best whole answers so far, their
    scores divided by length ** length_penalty, and which of them are there. unfinished bool [B]: could a beam
    still become one of the best?
    """

    tokens: jax.Array
    scores: jax.Array
    done_tokens: jax.Array
    done_scores: jax.Array
    done: jax.Array
    unfinished: jax.Array

    @property
    def best(self) -> jax.Array:
        none = (self.unfinished & ~self.done[:, 0])[:, None]
        return jnp.where(none, self.tokens[:, 0], self.done_tokens[:, 0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
    """Between programs: how many tokens are chosen, int32 []; the LLM's cache of B * W rows; the answers."""

    step: jax.Array
    cache: Any
    answers: _GreedyState | _BeamState


# step int32 [], unfinished bool [B], the best answers int [B, L]
_Outputs = tuple[jax.Array, jax.Array, jax.Array]


def _outputs(state: _State) -> _Outputs:
    return state.step, state.answers.unfinished, state.answers.best


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    graph: nnx.GraphDef, config: GenerationConfig, parameters: nnx.State, batch: Batch, seeds: jax.Array
) -> tuple[_State, _Outputs]:
    """Reads the prompts and chooses the first tokens."""
    model = nnx.merge(graph, parameters)
    prompt, mask = model.embed_prompt(batch)
    size = _cache_size(prompt.shape[1] + config.max_new_tokens, model.llm.config.max_tokens)
    hidden, cache = model.llm.prefill(prompt, mask, size)
    logits = model.llm.logits(hidden)
    answers = _start(seeds, config) if config.num_beams == 1 else _start_beams(len(seeds), config)
    cache, logits = cache.repeat(config.num_beams), jnp.repeat(logits, config.num_beams, 0)
    state = _choose(_State(jnp.int32(0), cache, answers), logits, config)
    return state, _outputs(state)


def _cache_size(needed: int, most: int) -> int:
    rounded = -(-needed // CACHE_MULTIPLE) * CACHE_MULTIPLE
    return max(needed, min(rounded, most))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(
    graph: nnx.GraphDef, config: GenerationConfig, parameters: nnx.State, state: _State
) -> tuple[_State, _Outputs]:
    """Up to CHUNK tokens more, until all answers have ended."""
    llm = nnx.merge(graph, parameters)
    stop = state.step + CHUNK

    def has_more(state: _State) -> jax.Array:
        return (state.step < stop) & state.answers.unfinished.any()

    def step(state: _State) -> _State:
        tokens = state.answers.tokens.reshape(-1, config.max_new_tokens)
        last = jax.lax.dynamic_slice_in_dim(tokens, state.step - 1, 1, 1)
        hidden, cache = llm.step(last[:, 0], state.cache)
        return _choose(dataclasses.replace(state, cache=cache), llm.logits(hidden), config)

    state = jax.lax.while_loop(has_more, step, state)
    return state, _outputs(state)


@jax.jit
def _keep(state: _State, rows: jax.Array) -> _State:
    """Goes on with these rows int [B'] alone."""
    beams = state.answers.tokens[0, ..., 0].size
    of_beams = (rows[:, None] * beams + jnp.arange(beams)).reshape(-1)
    answers = jax.tree.map(lambda x: x[rows], state.answers)
    return _State(state.step, state.cache.take(of_beams), _split(answers))


def _split(answers: _GreedyState | _BeamState) -> _GreedyState | _BeamState:
    """Splits as `split_batch`; a batch that can't be split is whole everywhere: programs agree on it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return answers
    spec = PartitionSpec() if len(answers.unfinished) % batch_parts(mesh) else PartitionSpec(BATCH_AXES)
    return jax.lax.with_sharding_constraint(answers, spec)


def _choose(state: _State, logits: jax.Array, config: GenerationConfig) -> _State:
    """One token more for every answer: logits float32 [B * W, V]."""
    if config.num_beams == 1:
        answers, cache = _choose_tokens(state.answers, state.step, logits, config), state.cache
    else:
        answers, parents = _continue_beams(state.answers, state.step, logits, config)
        cache = state.cache.reorder(parents)
    return _State(state.step + 1, cache, _split(answers))


def process(scores: jax.Array, tokens: jax.Array, length: jax.Array, config: GenerationConfig) -> jax.Array:
    """Applies the settings to scores float32 [N, V] after tokens int [N, L], of which `length` are there.

    When sampling, the tokens that may be drawn have the logarithms of their chances, up to a constant; what
    must not be chosen has -inf.
    """
    if config.repetition_penalty != 1.0:
        scores = _penalise_repetition(scores, tokens, length, config.repetition_penalty)
    if 0 < config.no_repeat_ngram_size <= tokens.shape[1]:
        scores = _ban_ngrams(scores, tokens, length, config.no_repeat_ngram_size)
    if config.min_new_tokens > 0:
        early = _ends(jnp.arange(scores.shape[1]), config) & (length < config.min_new_tokens)
        scores = jnp.where(early, -jnp.inf, scores)
    if not config.do_sample:
        return scores
    scores = scores / config.temperature
    if config.top_k > 0:
        least = jax.lax.top_k(scores, min(config.top_k, scores.shape[1]))[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return _keep_top_p(scores, config.top_p) if config.top_p < 1 else scores


def _ends(tokens: jax.Array, config: GenerationConfig) -> jax.Array:
    return jnp.isin(tokens, jnp.array(config.eos_token_ids))


def _penalise_repetition(
    scores: jax.Array, tokens: jax.Array, length: jax.Array, penalty: float
) -> jax.Array:
    rows = jnp.arange(len(tokens))[:, None]
    there = jnp.arange(tokens.shape[1]) < length
    seen = jnp.zeros(scores.shape, bool).at[rows, tokens].max(there)
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def _ban_ngrams(scores: jax.Array, tokens: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """An n-gram that begins like the last n - 1 tokens must not end as it did before."""
    rows = jnp.arange(len(tokens))[:, None]
    starts = jnp.arange(tokens.shape[1] - size + 1)
    windows = tokens[:, starts[:, None] + jnp.arange(size)]  # [N, starts, size]
    last = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(length - size + 1, 0), size - 1, 1)
    same = (windows[..., :-1] == last[:, None]).all(-1) & (starts + size <= length)
    banned = jnp.zeros(scores.shape, bool).at[rows, windows[..., -1]].max(same)
    return jnp.where(banned, -jnp.inf, scores)


def _keep_top_p(scores: jax.Array, top_p: float) -> jax.Array:
    """The fewest best tokens that have a chance of `top_p` together; at least one."""
    order = jnp.argsort(scores, -1)
    below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, -1)), -1)
    dropped = (below <= 1 - top_p).at[:, -1].set(False)
    dropped = jnp.put_along_axis(jnp.zeros_like(dropped), order, dropped, -1, inplace=False)
    return jnp.where(dropped, -jnp.inf, scores)


def draw(scores: jax.Array, seeds: jax.Array, step: jax.Array) -> jax.Array:
    """A token int32 [B] for each row of scores [B, V]; it depends on its seed [B] and not on other rows."""

    def noise(seed: jax.Array) -> jax.Array:
        # Of JAX's generators this one gives a row the same numbers whatever the batch.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, scores.shape[1:])

    return jnp.argmax(scores + jax.vmap(noise)(seeds), -1).astype(jnp.int32)


def _start(seeds: jax.Array, config: GenerationConfig) -> _GreedyState:
    tokens = jnp.full((len(seeds), config.max_new_tokens), config.pad_token_id, jnp.int32)
    return _GreedyState(tokens, jnp.ones(len(seeds), bool), seeds.astype(jnp.uint32))


def _choose_tokens(
    answers: _GreedyState, step: jax.Array, logits: jax.Array, config: GenerationConfig
) -> _GreedyState:
    scores = process(logits, answers.tokens, step, config)
    if config.do_sample:
        token = draw(scores, answers.seeds, step)
    else:
        token = jnp.argmax(scores, -1).astype(jnp.int32)
    token = jnp.where(answers.unfinished, token, config.pad_token_id)
    unfinished = answers.unfinished & ~_ends(token, config) & (step + 1 < config.max_new_tokens)
    return _GreedyState(answers.tokens.at[:, step].set(token), unfinished, answers.seeds)


def _start_beams(batch: int, config: GenerationConfig) -> _BeamState:
    beams = config.num_beams
    empty = jnp.full((batch, beams, config.max_new_tokens), config.pad_token_id, jnp.int32)
    return _BeamState(
        tokens=empty,
        # The beams begin equal: only the first counts, or all would go on alike.
        scores=jnp.full((batch, beams), NEVER).at[:, 0].set(0.0),
        done_tokens=empty,
        done_scores=jnp.full((batch, beams), NEVER),
        done=jnp.zeros((batch, beams), bool),
        unfinished=jnp.ones(batch, bool),
    )


def _continue_beams(
    state: _BeamState, step: jax.Array, logits: jax.Array, config: GenerationConfig
) -> tuple[_BeamState, jax.Array]:
    """The beams with one token more, and from which beam each comes: int [B, W]."""
    (batch, beams, length), vocab = state.tokens.shape, logits.shape[1]
    # If every beam's best continuation ended it, there are still as many others to go on with.
    kept = max(2, 1 + len(config.eos_token_ids)) * beams
    # In Python's numbers, as in transformers; divisors[i] is of i + 1 tokens.
    divisors = jnp.array([n**config.length_penalty for n in range(1, length + 1)], jnp.float32)

    scores = process(jax.nn.log_softmax(logits), state.tokens.reshape(-1, length), step, config)
    scores, chosen = best_of(scores.reshape(batch, beams, vocab) + state.scores[..., None], kept)
    parents, token = chosen // vocab, chosen % vocab
    tokens = _take(state.tokens, parents).at[:, :, step].set(token.astype(jnp.int32))
    ended = _ends(token, config) | (step + 1 >= length)

    unfinished_scores, unfinished = jax.lax.top_k(scores + NEVER * ended, beams)
    whole = ended & (jnp.arange(kept) < beams)
    done_scores = scores / divisors[step] + NEVER * ~whole
    # Answers that have ended for good stay as they are while others in the batch go on.
    done_scores = jnp.where(state.unfinished[:, None], done_scores, -jnp.inf)
    done_scores, best = jax.lax.top_k(jnp.concatenate([state.done_scores, done_scores], 1), beams)
    done = _take(jnp.concatenate([state.done, whole], 1), best)

    far = config.early_stopping == "never" and config.length_penalty > 0
    reachable = unfinished_scores[:, :1] / divisors[length - 1 if far else step]
    worst = jnp.where(done, done_scores.min(1, keepdims=True), NEVER)
    enough = done.all(1) & (config.early_stopping is True)
    beams = _BeamState(
        tokens=_take(tokens, unfinished),
        scores=unfinished_scores,
        done_tokens=_take(jnp.concatenate([state.done_tokens, tokens], 1), best),
        done_scores=done_scores,
        done=done,
        unfinished=state.unfinished & (reachable > worst).any(1) & ~enough & (step + 1 < length),
    )
    return beams, _take(parents, unfinished)


def best_of(scores: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """The best of scores float32 [B, W, V] for each example, and their places int [B, number] in [W * V].

    As `jax.lax.top_k`, which on a mesh would send all scores everywhere: here each device sends the best of
    its part alone.
    """
    batch, beams, vocab = scores.shape
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty or vocab % mesh.shape["model"] else mesh.shape["model"]

    def of_part(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        best, places = jax.lax.top_k(scores.reshape(len(scores), -1), min(number, beams * vocab // parts))
        beam, token = jnp.divmod(places, vocab // parts)
        if parts > 1:
            token += jax.lax.axis_index("model") * (vocab // parts)
        return best, beam * vocab + token

    if mesh.empty:
        return of_part(scores)
    rows = None if batch % batch_parts(mesh) else BATCH_AXES
    columns = None if parts == 1 else "model"
    scores, places = jax.shard_map(
        of_part,
        mesh=mesh,
        in_specs=PartitionSpec(rows, None, columns),
        out_specs=PartitionSpec(rows, columns),
        check_vma=False,
    )(scores)
    # In the order of their places, so that of equal scores the first is taken.
    order = jnp.argsort(places, 1)
    best, chosen = jax.lax.top_k(_take(scores, order), number)
    return best, _take(_take(places, order), chosen)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, W, ...], index int [B, W'] -> [B, W', ...]."""
    return jax.vmap(lambda row, i: row[i])(x, index)
