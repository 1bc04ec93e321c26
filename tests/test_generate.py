import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from sparqle_jax import generate as module
from sparqle_jax.generate import GenerationConfig, draw, generate, process, stream
from sparqle_jax.llms.decoder import LLM as Decoder
from sparqle_jax.model import Projection, SpeechLLM
from sparqle_jax.program import census
from sparqle_jax.sharding import make_mesh, state_sharding
from tests.batches import padded, stage2_batch
from tests.conftest import call

END = 50  # which the model does not choose below, so that answers have their full length
GREEDY = GenerationConfig(8, eos_token_ids=(END,))
BEAM = GenerationConfig(8, eos_token_ids=(END,), num_beams=3, no_repeat_ngram_size=2)
SAMPLE = GenerationConfig(8, eos_token_ids=(END,), do_sample=True, top_k=40, top_p=0.9, seed=3)
# Answers that end at different times: one in ten tokens ends them.
ENDS = tuple(range(0, 96, 10))
LONG_GREEDY = GenerationConfig(24, eos_token_ids=ENDS, pad_token_id=95)
LONG_BEAM = dataclasses.replace(LONG_GREEDY, num_beams=2)
LONG_SAMPLE = dataclasses.replace(LONG_GREEDY, do_sample=True, temperature=2.0)
LONG = pytest.mark.parametrize(
    "config", [LONG_GREEDY, LONG_BEAM, LONG_SAMPLE], ids=["greedy", "beam", "sample"]
)


def test_the_best_of_a_split_batch_are_top_ks_and_few_are_sent():
    """Equal scores too: the first in order. Rows and vocabulary are split; no device sends all its scores."""
    batch, beams, vocab, number = 8, 5, 256, 10
    scores = np.random.default_rng(0).integers(0, 40, (batch, beams, vocab)).astype(np.float32)
    expected = jax.lax.top_k(scores.reshape(batch, -1), number)
    np.testing.assert_array_equal(module.best_of(scores, number)[1], expected[1])
    mesh = make_mesh((2, 2, 2))
    split = jax.device_put(scores, jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "model")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(module.best_of, static_argnums=1).lower(split, number).compile()
        best, places = compiled(split)
        odd = jax.jit(module.best_of, static_argnums=1)(scores[:3], number)
    np.testing.assert_array_equal(best, expected[0])
    np.testing.assert_array_equal(places, expected[1])
    np.testing.assert_array_equal(odd[1], expected[1][:3])
    collectives = census(compiled.as_text()).collectives
    assert collectives
    # The candidates of both parts of the vocabulary, or their places; all scores would be 41 kB.
    assert max(one.result for one in collectives) <= 2 * batch * number * 4


@pytest.fixture(scope="module")
def batch():
    batch = stage2_batch(np.random.default_rng(0), 3)
    return {name: value for name, value in batch.items() if not name.startswith("answer")}


@pytest.fixture(scope="module")
def model(sparqle):
    """A model whose parameters can be split in two on each axis of a mesh."""
    config = dataclasses.replace(sparqle.llm.config, vocab_size=96)
    rngs = nnx.Rngs(0)
    projection = Projection(sparqle.adapter.config, config.width, rngs=rngs)
    return SpeechLLM(sparqle.encoder, sparqle.adapter, projection, Decoder(config, rngs=rngs))


@pytest.fixture(scope="module")
def texts():
    """Eight prompts without speech, each with a seed of its own."""
    batch = stage2_batch(np.random.default_rng(1), 8)
    texts = {name: value for name, value in batch.items() if name.startswith(("before", "after"))}
    return {
        **texts,
        "before": np.minimum(texts["before"], 95),
        "after": np.minimum(texts["after"], 95),
        "seed": np.arange(8, dtype=np.uint32),
    }


def rows_of(batch: dict, rows) -> dict:
    return {name: value[rows] for name, value in batch.items()}


@pytest.mark.parametrize("config", [GREEDY, BEAM, SAMPLE], ids=["greedy", "beam", "sample"])
def test_padding_and_neighbours_change_no_answer(sparqle, batch, config):
    """Of a batch, of its rows in another order with more padding, and of a row alone."""
    together = generate(sparqle, batch, config)
    order = np.array([2, 0, 1])
    other = padded(rows_of(batch, order), np.random.default_rng(1), waveform=640, before=2, after=1)
    np.testing.assert_array_equal(generate(sparqle, other, config), together[order])
    np.testing.assert_array_equal(generate(sparqle, rows_of(batch, [1]), config), together[1:2])


@LONG
def test_what_has_ended_is_left_out_and_changes_no_answer(model, texts, config, monkeypatch):
    """Against a batch that stays whole, and the same prompts in another order and in smaller batches."""
    sizes, keep = [], module._Programs.keep
    monkeypatch.setattr(
        module._Programs, "keep", lambda self, state, rows: sizes.append(len(rows)) or keep(self, state, rows)
    )
    answers = generate(model, texts, config)
    assert sizes == [4]
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(generate(model, rows_of(texts, order), config), answers[order])
    monkeypatch.setattr(module, "SMALLEST_BATCH", 99)
    np.testing.assert_array_equal(generate(model, texts, config), answers)
    for some in (slice(0, 3), slice(3, 6), slice(5, 8)):
        np.testing.assert_array_equal(generate(model, rows_of(texts, some), config), answers[some])


def test_sizes_that_a_batch_shrinks_to():
    assert module._smaller_sizes(32, 1) == [16, 8, 4]
    assert module._smaller_sizes(33, 1) == [16, 8, 4]
    assert module._smaller_sizes(7, 1) == []
    assert module._smaller_sizes(64, 8) == [32, 16, 8]
    assert module._smaller_sizes(40, 6) == [12, 6]


@LONG
def test_a_stream_ends_as_generate(model, texts, config):
    *some, last = stream(model, texts, config)
    answers = generate(model, texts, config)
    np.testing.assert_array_equal(last, answers[:, : last.shape[1]])
    assert (answers[:, last.shape[1] :] == config.pad_token_id).all()
    assert [len(tokens[0]) for tokens in some] == [1, 9, 17][: len(some)]
    if config.num_beams == 1:
        for tokens in some:
            np.testing.assert_array_equal(tokens, answers[:, : tokens.shape[1]])


@LONG
def test_eight_devices_give_what_one_gives(model, texts, config):
    """Parameters on every axis of a mesh, batch and cache split; whether or not the caller sets the mesh."""
    mesh = make_mesh((2, 2, 2))
    graph, state = nnx.split(model)
    placed = nnx.merge(graph, jax.device_put(state, state_sharding(state, mesh)))
    expected = generate(model, texts, config)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(generate(placed, texts, config), expected)
    known = programs_compiled()
    np.testing.assert_array_equal(generate(placed, texts, config), expected)
    assert programs_compiled() == known


def test_the_cache_is_split_by_examples_and_heads(model, texts):
    mesh = make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        programs = module._Programs(model, LONG_BEAM)
        state, _ = programs.prefill(texts)
        whole, _ = programs.prefill(rows_of(texts, slice(0, 3)))
    split = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp"), None, "model"))
    assert state.cache.keys.sharding.is_equivalent_to(split, 5)
    assert state.cache.values.sharding.is_equivalent_to(split, 5)
    heads = jax.NamedSharding(mesh, jax.P(None, None, None, "model"))
    assert whole.cache.keys.sharding.is_equivalent_to(heads, 5)


def programs_compiled() -> int:
    return sum(program._cache_size() for program in (module._prefill, module._decode, module._keep))


def test_compiled_once_for_a_shape_and_a_configuration_but_for_the_seed(model, texts):
    config = dataclasses.replace(LONG_GREEDY, max_new_tokens=23)
    before = programs_compiled()
    assert generate(model, texts, config).shape == (8, 23)
    known = programs_compiled()
    assert known > before
    generate(model, texts, dataclasses.replace(config, seed=1))
    assert programs_compiled() == known


def test_greedy_takes_the_best_token_of_the_whole_sequence(sparqle, batch):
    """Cached steps against the LLM run on prompt and answer at once."""
    tokens = generate(sparqle, batch, GREEDY)
    assert END not in tokens
    prompt, mask = call(sparqle.embed_prompt, batch)
    embeddings = np.concatenate([prompt, sparqle.llm.embed(tokens)], 1)
    mask = np.pad(mask, ((0, 0), (0, 8)), constant_values=True)
    hidden, _ = call(sparqle.llm.__call__, embeddings, mask)
    best = np.argmax(sparqle.llm.logits(hidden[:, prompt.shape[1] - 1 : -1]), -1)
    np.testing.assert_array_equal(tokens, best)


def test_an_answer_ends_with_its_end_token(sparqle, batch):
    free = generate(sparqle, batch, GREEDY)
    end = int(free[0, 2])
    ended = generate(sparqle, batch, GenerationConfig(8, eos_token_ids=(END, end), pad_token_id=7))
    for row, expected in zip(ended, free, strict=True):
        stop = list(expected).index(end) + 1 if end in expected else 8
        assert row.tolist() == [*expected[:stop], *[7] * (8 - stop)]


def test_no_pair_of_tokens_comes_twice(sparqle, batch):
    for row in generate(sparqle, batch, BEAM):
        pairs = list(itertools.pairwise(row))
        assert len(pairs) == len(set(pairs))


@LONG
def test_no_end_before_min_new_tokens(model, texts, config):
    answers = generate(model, texts, dataclasses.replace(config, min_new_tokens=5))
    assert not np.isin(answers[:, :4], ENDS).any()
    assert np.isin(answers, ENDS).any()


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_wide_beams_that_never_stop_early_find_the_best_answer(length_penalty):
    """Of all answers of up to three tokens, where the scores of a token depend on the one before."""
    scores = jax.nn.log_softmax(np.random.default_rng(5).normal(0, 2, (5, 4)))  # [before: 4 is none, token]
    end, length = 0, 3
    config = GenerationConfig(
        length, eos_token_ids=(end,), num_beams=16, length_penalty=length_penalty, early_stopping="never"
    )
    beams = module._start_beams(1, config)
    for step in range(length):
        before = beams.tokens[0, :, step - 1] if step else np.full(16, 4)
        beams, _ = jax.jit(module._continue_beams, static_argnums=3)(beams, step, scores[before], config)

    def score(answer):
        total = sum(float(scores[before, token]) for before, token in itertools.pairwise((4, *answer)))
        return total / len(answer) ** length_penalty

    whole = [(end,), *((a, end) for a in (1, 2, 3)), *itertools.product((1, 2, 3), (1, 2, 3), range(4))]
    best = max(whole, key=score)
    assert beams.best[0, : len(best)].tolist() == list(best)
    np.testing.assert_allclose(beams.done_scores[0, 0], score(best), rtol=1e-5)


def reference_process(scores, tokens, config):
    """`process` of one row, step by step in NumPy."""
    scores, size = scores.copy(), config.no_repeat_ngram_size
    for token in set(tokens):
        scores[token] *= config.repetition_penalty ** (1 if scores[token] < 0 else -1)
    for i in range(len(tokens) - size + 1 if size else 0):
        if tokens[i : i + size - 1] == tokens[len(tokens) - size + 1 :]:
            scores[tokens[i + size - 1]] = -np.inf
    if len(tokens) < config.min_new_tokens:
        scores[list(config.eos_token_ids)] = -np.inf
    scores /= config.temperature
    if config.top_k:
        scores[np.argsort(-scores)[config.top_k :]] = -np.inf
    chances = np.exp(scores - scores.max())
    order = np.argsort(-scores)
    before = np.cumsum(chances[order] / chances.sum()) - chances[order] / chances.sum()
    scores[order[(before >= config.top_p) & (np.arange(len(order)) > 0)]] = -np.inf
    return scores


@pytest.mark.parametrize(
    "settings",
    [
        dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
        dict(no_repeat_ngram_size=1, min_new_tokens=5),
        dict(temperature=0.5, top_k=3),
        dict(temperature=2.0, top_p=0.7),
        dict(top_p=0.0),
        dict(repetition_penalty=0.7, min_new_tokens=4, temperature=1.5, top_k=12, top_p=0.6),
    ],
    ids=str,
)
def test_processed_scores(settings):
    config = GenerationConfig(6, eos_token_ids=(3, 7), do_sample=True, **settings)
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (5, 20)).astype(np.float32)
    tokens = rng.integers(0, 4, (5, 6)).astype(np.int32)
    for length in (0, 1, 4):
        ours = process(scores, tokens, length, config)
        for i in range(5):
            expected = reference_process(scores[i].astype(float), tokens[i, :length].tolist(), config)
            np.testing.assert_allclose(ours[i], expected, rtol=1e-5)


def test_draws_come_as_often_as_they_should():
    """The chi-square of 8,000 draws; and a row draws the same with other rows beside it."""
    scores = np.array([0.0, 1.0, -1.0, -np.inf, 2.0, 0.5], np.float32)
    chances = np.asarray(jax.nn.softmax(scores))
    seeds = np.arange(8000, dtype=np.uint32)
    tokens = np.asarray(draw(np.tile(scores, (8000, 1)), seeds, 3))
    counts, expected = np.bincount(tokens, minlength=6), 8000 * chances
    assert counts[3] == 0
    there = expected > 0
    assert ((counts - expected)[there] ** 2 / expected[there]).sum() < 18.5  # one in a thousand is above
    np.testing.assert_array_equal(draw(np.tile(scores, (2, 1)), seeds[5:7], 3), tokens[5:7])


def test_a_seed_reproduces_and_rows_may_have_their_own(model, texts):
    """Rows draw by the configuration's seed, or by theirs."""
    prompts = {name: value for name, value in texts.items() if name != "seed"}
    by_seed = [generate(model, prompts, dataclasses.replace(LONG_SAMPLE, seed=seed)) for seed in (0, 1, 0)]
    np.testing.assert_array_equal(by_seed[2], by_seed[0])
    assert (by_seed[1] != by_seed[0]).any()
    seeds = np.array([0, 1] * 4, np.uint32)
    mixed = generate(model, {**prompts, "seed": seeds}, LONG_SAMPLE)
    np.testing.assert_array_equal(mixed, np.where(seeds[:, None] == 0, by_seed[0], by_seed[1]))


def test_longer_than_the_positions_of_the_llm(sparqle, batch):
    with pytest.raises(ValueError, match="more than the LLM's max_position_embeddings=256"):
        generate(sparqle, batch, GenerationConfig(256, eos_token_ids=(END,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 and num_beams=1 must be at least 1"),
        (dict(num_beams=0), "num_beams=0 must be at least 1"),
        (dict(min_new_tokens=5), "min_new_tokens=5 must be between 0 and max_new_tokens=4"),
        (dict(eos_token_ids=()), "eos_token_ids is empty"),
        (dict(early_stopping="soon"), r"early_stopping='soon' must be True, False or \"never\""),
        (dict(repetition_penalty=0.0), r"repetition_penalty=0.0 must be above 0"),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size=-1 must be at least 0"),
        (dict(do_sample=True, num_beams=2), "do_sample=True with num_beams=2: sampling has one beam"),
        (dict(temperature=0.0), "temperature=0.0 must be above 0; for the best tokens, do_sample=False"),
        (dict(top_k=-1), "top_k=-1 must be at least 0"),
        (dict(top_p=1.5), "top_p=1.5 must be between 0 and 1"),
        (dict(seed=-1), "seed=-1 must be between 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**{"max_new_tokens": 4, "eos_token_ids": (1,), **settings})
