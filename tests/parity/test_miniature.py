"""The miniature's towers are transformers folders: PyTorch loads them and computes the same."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from sparqle_jax import pretrained
from sparqle_jax.demo.__main__ import MODELS
from sparqle_jax.tensors import open_checkpoint
from tests.conftest import call


def test_hubert():
    theirs, info = AutoModel.from_pretrained(MODELS / "hubert", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    waveform = np.random.default_rng(0).normal(size=(1, 16_000)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(waveform)).last_hidden_state
    frames, _ = call(pretrained.load_encoder(MODELS / "hubert", normalize=None).__call__, waveform)
    np.testing.assert_allclose(frames, expected, atol=1e-4)


def test_llm():
    theirs, info = AutoModelForCausalLM.from_pretrained(
        MODELS / "llm", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = pretrained.load_llm(MODELS / "llm")
    ids = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 20))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits
    hidden, _ = call(ours.__call__, ids)
    logits = call(ours.logits, hidden)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("tower", ["hubert", "llm"])
def test_weights_are_float16(tower):
    tensors = open_checkpoint(MODELS / tower)
    assert all(tensor.read(()).dtype == np.float16 for tensor in tensors.values())
