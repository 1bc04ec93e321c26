import itertools

import numpy as np
import pytest

from sparqle_jax.generate import GenerationConfig, generate
from tests.batches import padded, stage2_batch
from tests.conftest import call

END = 50  # which the model does not choose below, so that answers have their full length
GREEDY = GenerationConfig(8, eos_token_ids=(END,))
BEAM = GenerationConfig(8, eos_token_ids=(END,), num_beams=3, no_repeat_ngram_size=2)


@pytest.fixture(scope="module")
def batch():
    batch = stage2_batch(np.random.default_rng(0), 3)
    return {name: value for name, value in batch.items() if not name.startswith("answer")}


@pytest.mark.parametrize("config", [GREEDY, BEAM], ids=["greedy", "beam"])
def test_padding_and_neighbours_change_no_answer(sparqle, batch, config):
    """Of a batch, of its rows in another order with more padding, and of a row alone."""
    together = generate(sparqle, batch, config)
    order = np.array([2, 0, 1])
    other = {name: value[order] for name, value in batch.items()}
    other = padded(other, np.random.default_rng(1), waveform=640, before=2, after=1)
    np.testing.assert_array_equal(generate(sparqle, other, config), together[order])
    alone = {name: value[1:2] for name, value in batch.items()}
    np.testing.assert_array_equal(generate(sparqle, alone, config), together[1:2])


def test_greedy_takes_the_best_token_of_the_whole_sequence(sparqle, batch):
    """Cached steps against the LLM run on prompt and answer at once."""
    tokens = np.asarray(generate(sparqle, batch, GREEDY))
    assert END not in tokens
    prompt, mask = call(sparqle.embed_prompt, batch)
    embeddings = np.concatenate([prompt, sparqle.llm.embed(tokens)], 1)
    mask = np.pad(mask, ((0, 0), (0, 8)), constant_values=True)
    hidden, _ = call(sparqle.llm.__call__, embeddings, mask)
    best = np.argmax(sparqle.llm.logits(hidden[:, prompt.shape[1] - 1 : -1]), -1)
    np.testing.assert_array_equal(tokens, best)


def test_an_answer_ends_with_its_end_token(sparqle, batch):
    free = np.asarray(generate(sparqle, batch, GREEDY))
    end = int(free[0, 2])
    ended = generate(sparqle, batch, GenerationConfig(8, eos_token_ids=(END, end), pad_token_id=7))
    for row, expected in zip(np.asarray(ended), free, strict=True):
        stop = list(expected).index(end) + 1 if end in expected else 8
        assert row.tolist() == [*expected[:stop], *[7] * (8 - stop)]


def test_no_pair_of_tokens_comes_twice(sparqle, batch):
    for row in np.asarray(generate(sparqle, batch, BEAM)):
        pairs = list(itertools.pairwise(row))
        assert len(pairs) == len(set(pairs))


def test_longer_than_the_positions_of_the_llm(sparqle, batch):
    with pytest.raises(ValueError, match="more than the LLM's max_position_embeddings=256"):
        generate(sparqle, batch, GenerationConfig(256, eos_token_ids=(END,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 and num_beams=1 must be at least 1"),
        (dict(num_beams=0), "num_beams=0 must be at least 1"),
        (dict(eos_token_ids=()), "eos_token_ids is empty"),
        (dict(repetition_penalty=0.0), r"repetition_penalty=0.0 must be above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**{"max_new_tokens": 4, "eos_token_ids": (1,), **settings})
