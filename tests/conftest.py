"""Tests run on 8 CPU devices, in full float32, with compiled programs kept between runs."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the tests' time is LLVM's, for programs that run once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sparqle_jax.demo import datasets
from sparqle_jax.encoders.hubert import Config as HubertConfig
from sparqle_jax.llms.decoder import Config as DecoderConfig
from sparqle_jax.published import sparqle as published

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

GOLDEN = Path(__file__).parent / "golden" / "sparqle_tiny"


def pytest_sessionstart():
    if jax.device_count("cpu") != 8:
        raise pytest.UsageError(f"the tests need 8 CPU devices, JAX made {jax.device_count('cpu')}.")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a file go with it: those of all files are more than a process may map."""
    yield
    jax.clear_caches()


class Golden:
    """A folder of golden numbers: configurations, numbers, and the models loaded from its weights."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.numbers = {n: load_file(folder / f"stage{n}_numbers.safetensors") for n in (1, 2)}

    @property
    def qformer_values(self) -> dict:
        """What the weights of the Q-Former do not tell."""
        config = self.config["qformer"]
        return dict(
            num_attention_heads=config["num_attention_heads"],
            cross_attention_freq=config["cross_attention_freq"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def aligner(self):
        return published.load_aligner(
            self.folder / "stage1_state_dict.safetensors",
            HubertConfig.from_dict(self.config["hubert"]),
            **self.qformer_values,
        )

    def sparqle(self, **kwargs):
        return published.load_speech_llm(
            self.folder / "stage2_state_dict.safetensors",
            HubertConfig.from_dict(self.config["hubert"]),
            DecoderConfig.from_dict(self.config["llm"]),
            **self.qformer_values,
            **kwargs,
        )


@pytest.fixture(scope="session")
def tiny() -> Golden:
    return Golden(GOLDEN)


@pytest.fixture(scope="session")
def aligner(tiny):
    return tiny.aligner()


@pytest.fixture(scope="session")
def sparqle(tiny):
    return tiny.sparqle()


def with_compat(encoder, compat):
    """The same encoder, as it is with `compat`."""
    state = nnx.state(encoder)
    config = dataclasses.replace(encoder.config, compat=compat)
    other = nnx.eval_shape(lambda: type(encoder)(config, dtype=encoder.dtype, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(other), state)


def call(method, *args, **options):
    """Calls a module's method under `jax.jit`: faster than operation by operation. Options are static."""
    graph, state = nnx.split(method.__self__)
    return _call(graph, method.__name__, tuple(options.items()), state, args)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _call(graph, name, options, state, args):
    return getattr(nnx.merge(graph, state), name)(*args, **dict(options))


def part_of(tensors: dict, prefix: str) -> dict:
    """The tensors of one tower, under its own names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def assert_same_parameters(a, b):
    a, b = (dict(nnx.to_flat_state(nnx.state(module))) for module in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path].get_value(), b[path].get_value(), str(path))


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """Data sets train (24 utterances), seen and unseen (8 each) of the miniature's world."""
    folder = tmp_path_factory.mktemp("world")
    datasets.make_world(folder, train=24, test=8, seed=0)
    return folder
