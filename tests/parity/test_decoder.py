"""Language models against transformers in PyTorch, on random weights that it saves."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from sparqle_jax import pretrained
from tests.conftest import call

SIZES = dict(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
LLAMA31 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
QWEN_WINDOW = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
FAMILIES = {
    "llama 2": LlamaConfig(**SIZES | dict(num_key_value_heads=4)),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=dict(rope_type="default", rope_theta=500_000.0)),
    "llama 3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA31),
    "llama 3.2, tied": LlamaConfig(**SIZES, rope_parameters=LLAMA31, tie_word_embeddings=True, head_dim=24),
    "llama, linear rope": LlamaConfig(
        **SIZES, rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0)
    ),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2.5, tied": Qwen2Config(
        **SIZES, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)
    ),
    "qwen2, window": Qwen2Config(**SIZES | QWEN_WINDOW),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("llm")
    model.save_pretrained(folder, max_shard_size="100KB")  # several files and an index
    assert (folder / "model.safetensors.index.json").exists()
    return model, pretrained.load_llm(folder)


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 101, (2, 40))


def test_full_sequence(models, ids):
    theirs, ours = models
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True)
    hidden, _ = call(ours.__call__, ids)
    np.testing.assert_allclose(hidden, expected.hidden_states[-1], atol=1e-4)
    np.testing.assert_allclose(call(ours.logits, hidden), expected.logits, atol=1e-4, rtol=1e-4)


def test_cached_steps(models, ids):
    """A prefill of 30 tokens, then ten steps of one, in both."""
    theirs, ours = models
    cache, past = ours.init_cache(2, 48), None
    for piece in (slice(0, 30), *(slice(i, i + 1) for i in range(30, 40))):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(ids[:, piece]), past_key_values=past, use_cache=True)
        past = expected.past_key_values
        hidden, cache = call(ours.__call__, ids[:, piece], None, cache)
        np.testing.assert_allclose(call(ours.logits, hidden), expected.logits, atol=1e-4, rtol=1e-4)


def test_left_padded_batch(models, ids):
    theirs, ours = models
    mask = np.arange(40) >= np.array([[0], [11]])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask).long(),
            position_ids=torch.from_numpy(positions),
        ).logits
    hidden, _ = call(ours.__call__, ids, mask)
    logits = np.asarray(call(ours.logits, hidden))
    np.testing.assert_allclose(logits[mask], expected[mask], atol=1e-4, rtol=1e-4)
