"""Greedy and beam search against transformers' `generate`, on random settings."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparqle_jax.generate import GenerationConfig, generate
from tests.batches import stage2_batch
from tests.conftest import call, part_of


@pytest.fixture(scope="module")
def llama(tiny):
    model = LlamaForCausalLM(LlamaConfig(**tiny.config["llm"])).eval()
    model.load_state_dict(part_of(load_file(tiny.folder / "stage2_state_dict.safetensors"), "llama_model."))
    return model


@pytest.mark.parametrize("seed", range(12))
def test_random_settings(sparqle, llama, seed):
    """Our padded batch against each prompt alone: transformers' answers change with a batch's padding."""
    rng = np.random.default_rng(seed)
    batch = stage2_batch(rng, 3)
    settings = dict(
        max_new_tokens=int(rng.integers(1, 12)),
        num_beams=int(rng.choice([1, 2, 4])),
        length_penalty=float(rng.choice([0.0, 0.6, 1.0, 2.0])),
        early_stopping=bool(rng.integers(2)),
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
        no_repeat_ngram_size=int(rng.choice([0, 1, 2, 3])),
    )
    # Among these random logits an end token is seldom; one in three of the vocabulary is not.
    ends = rng.choice(97, int(rng.choice([1, 2, 30])), replace=False).tolist()
    config = GenerationConfig(**settings, eos_token_ids=tuple(ends), pad_token_id=ends[0])
    ours = np.asarray(generate(sparqle, batch, config))

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
