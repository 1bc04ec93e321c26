"""PyTorch files: the published checkpoint's wrapper, and what must not run."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparqle_jax.encoders.hubert import Config as HubertConfig
from sparqle_jax.llms.decoder import Config as DecoderConfig
from sparqle_jax.published import sparqle as published
from sparqle_jax.tensors import open_checkpoint
from tests.conftest import assert_same_parameters
from tests.memory import measure


@pytest.fixture
def state(tiny):
    return load_file(tiny.folder / "stage2_state_dict.safetensors")


def test_fairseqs_wrapper_with_towers(tmp_path, tiny, state, sparqle):
    """A dictionary with `model` and a command line beside it, names from DataParallel, llm_ for llama_."""
    names = {name: "module." + name.replace("llama_", "llm_") for name in state}
    checkpoint = dict(
        args=None,
        cfg={"model": argparse.Namespace(num_query_token=6)},
        model={names[name]: tensor for name, tensor in state.items()},
        optimizer_history=[{"num_updates": 3}],
        extra_state={"best": np.float64(1.5), "loss": np.float32(2.0)},
    )
    torch.save(checkpoint, tmp_path / "SparQLe_best.pt")
    loaded = published.load_speech_llm(
        tmp_path / "SparQLe_best.pt",
        HubertConfig.from_dict(tiny.config["hubert"]),
        DecoderConfig.from_dict(tiny.config["llm"]),
        **tiny.qformer_values,
    )
    assert_same_parameters(loaded, sparqle)


def test_bfloat16(tmp_path):
    torch.save({"x": torch.arange(6.0).reshape(2, 3).bfloat16()}, tmp_path / "x.bin")
    tensor = open_checkpoint(tmp_path / "x.bin")["x"]
    assert tensor.shape == (2, 3)
    np.testing.assert_array_equal(tensor.read((slice(1, 2), slice(0, 2))).astype(np.float32), [[3, 4]])


def test_saved_for_pytorch(tmp_path, state, sparqle):
    """What we save loads in PyTorch as the reference does it, tensor for tensor."""
    published.save(sparqle, tmp_path / "adapter.pt")
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)["model"]
    expected = {k: v for k, v in state.items() if not k.startswith(("speech_encoder.", "llama_model."))}
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": {"x": Exploit()}}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="running code from a checkpoint is refused"):
        open_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_files_of_old_torch_and_of_parameters(tmp_path):
    state = {"x": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))}
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    tensor = open_checkpoint(tmp_path / "x.bin")["x"]
    np.testing.assert_array_equal(tensor.read((slice(0, 2), slice(1, 2))), [[1], [4]])


def test_not_a_dictionary(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a list, not a dictionary of tensors"):
        open_checkpoint(tmp_path / "x.pt")


def test_peak_host_memory(tmp_path):
    """The bound holds for .bin files too: 268 MB, of which the largest tensor is half."""
    config = dict(model_type="llama", vocab_size=64_000, hidden_size=512, intermediate_size=512)
    config |= dict(num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM(LlamaConfig(**config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    figures = measure(tmp_path, "float32")
    assert figures["peak"] > figures["parameters"]
    assert figures["peak"] <= figures["bound"], figures


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"hello")
    with pytest.raises(ValueError, match="could not be read as tensors alone"):
        open_checkpoint(tmp_path / "x.pt")
