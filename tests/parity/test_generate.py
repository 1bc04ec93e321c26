"""Greedy and beam search against transformers' `generate`, on random settings; what sampling draws from."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparqle_jax.generate import GenerationConfig, generate, process
from tests.batches import stage2_batch
from tests.conftest import call, part_of


@pytest.fixture(scope="module")
def llama(tiny):
    model = LlamaForCausalLM(LlamaConfig(**tiny.config["llm"])).eval()
    model.load_state_dict(part_of(load_file(tiny.folder / "stage2_state_dict.safetensors"), "llama_model."))
    return model


def random_settings(rng) -> tuple[dict, list[int]]:
    """Settings of all that is not sampling, and end tokens."""
    longest = int(rng.integers(1, 20))
    settings = dict(
        max_new_tokens=longest,
        min_new_tokens=int(rng.integers(0, min(longest, 5) + 1)),
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
        no_repeat_ngram_size=int(rng.choice([0, 1, 2, 3])),
    )
    # Among these random logits an end token is seldom; one in three of the vocabulary is not.
    return settings, rng.choice(97, int(rng.choice([1, 2, 30])), replace=False).tolist()


@pytest.mark.parametrize("seed", range(50))
def test_random_settings(sparqle, llama, seed):
    """Our padded batch against each prompt alone: transformers' answers change with a batch's padding."""
    rng = np.random.default_rng(seed)
    batch = stage2_batch(rng, 3)
    if seed >= 10:  # the LLM alone, which compiles sooner
        batch = {name: value for name, value in batch.items() if not name.startswith("waveform")}
    settings, ends = random_settings(rng)
    settings |= dict(
        num_beams=int(rng.choice([1, 2, 3, 5])),
        length_penalty=float(rng.choice([-0.5, 0.0, 0.6, 1.0, 2.0])),
        early_stopping=[False, True, "never"][rng.integers(3)],
    )
    config = GenerationConfig(**settings, eos_token_ids=tuple(ends), pad_token_id=ends[0])
    ours = generate(sparqle, batch, config)

    prompt, mask = call(sparqle.embed_prompt, batch)
    for row, real in enumerate(np.asarray(mask)):
        with torch.no_grad():
            theirs = llama.generate(
                inputs_embeds=torch.from_numpy(np.array(prompt[row, real]))[None],
                attention_mask=torch.ones(1, real.sum(), dtype=torch.long),
                eos_token_id=ends,
                pad_token_id=ends[0],
                do_sample=False,
                **settings,
            )[0]
        np.testing.assert_array_equal(ours[row, : len(theirs)], theirs)
        assert (ours[row, len(theirs) :] == ends[0]).all()


@pytest.mark.parametrize("seed", range(12))
def test_what_sampling_draws_from(llama, seed):
    """The scores of each step of an answer that transformers has drawn, from its logits there."""
    rng = np.random.default_rng(seed)
    settings, ends = random_settings(rng)
    settings |= dict(
        do_sample=True,
        temperature=float(rng.choice([0.5, 1.0, 1.7])),
        top_k=int(rng.choice([0, 1, 7, 200])),
        top_p=float(rng.choice([0.0, 0.5, 0.9, 1.0])),
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        theirs = llama.generate(
            inputs_embeds=torch.randn(1, 5, llama.config.hidden_size),
            attention_mask=torch.ones(1, 5, dtype=torch.long),
            eos_token_id=ends,
            pad_token_id=ends[0],
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **settings,
        )
    config = GenerationConfig(**settings, eos_token_ids=tuple(ends))
    tokens = np.zeros((1, config.max_new_tokens), np.int32)
    tokens[:, : theirs.sequences.shape[1]] = theirs.sequences
    for step, (logits, scores) in enumerate(zip(theirs.logits, theirs.scores, strict=True)):
        np.testing.assert_allclose(process(logits.numpy(), tokens, step, config), scores, rtol=1e-6)
