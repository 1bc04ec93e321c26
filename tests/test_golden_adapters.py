"""The adapters of published systems against numbers that their PyTorch code computed on tiny random weights.

Outputs, and the gradients of inputs and of every parameter. Further folders of these formats, of any size,
can be given in SPARQLE_GOLDEN, separated by colons.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sparqle_jax.adapters import KINDS, conv1d, linear, qformer, windowed_qformer, windows
from sparqle_jax.model import Projection
from sparqle_jax.published import salmonn, slam_asr, ultravox
from sparqle_jax.tables import Table, export, load
from sparqle_jax.tensors import open_checkpoint

HERE = Path(__file__).parent / "golden"
GIVEN = [Path(folder) for folder in os.environ.get("SPARQLE_GOLDEN", "").split(":") if folder]
# A key of config.json that no other format has.
FORMATS = {"slam": "encoder_projector_ds_rate", "ultravox": "stack_factor", "salmonn": "window_frames"}


@dataclasses.dataclass(frozen=True)
class Golden:
    folder: Path
    config: dict
    numbers: dict[str, np.ndarray]

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """The numbers whose names begin so, without that."""
        return {k.removeprefix(prefix): v for k, v in self.numbers.items() if k.startswith(prefix)}

    def tensors(self, prefix: str = "") -> dict:
        tensors = open_checkpoint(self.folder / "state_dict.safetensors")
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def folders(kind: str) -> list:
    found = []
    for folder in (*sorted(HERE.iterdir()), *GIVEN):
        config = json.loads((folder / "config.json").read_text())
        if FORMATS[kind] in config:
            found.append(pytest.param(folder, id=folder.name))
    return found


def golden(folder: Path) -> Golden:
    config = json.loads((folder / "config.json").read_text())
    return Golden(folder, config, load_file(folder / "numbers.safetensors"))


def load_model(config, frames_width: int, llm_width: int, table: Table, tensors: dict, **options) -> nnx.Dict:
    """An adapter and its projection from published names; all tensors are used, or `load` raises."""

    def make(rngs: nnx.Rngs) -> nnx.Dict:
        return nnx.Dict(
            adapter=KINDS[config.kind].Adapter(config, frames_width, rngs=rngs),
            projection=Projection(config, llm_width, rngs=rngs),
        )

    return load(make, table, tensors, name=config.kind, **options)


def all_real(frames) -> np.ndarray:
    return np.ones(frames.shape[:2], bool)


@dataclasses.dataclass(frozen=True)
class Result:
    tokens: jax.Array
    mask: jax.Array
    out: jax.Array
    loss: jax.Array
    gradients: nnx.State
    inputs: tuple


def run(model: nnx.Dict, inputs: tuple, probe, mask=None, frames_of: Callable = lambda frames: frames):
    """The model on frames_of(*inputs), and the gradients of sum(out * probe)."""
    graph, state = nnx.split(model)

    @jax.jit
    def compute(state, inputs):
        def loss_of(state, inputs):
            frames = frames_of(*inputs)
            module = nnx.merge(graph, state)
            tokens, real = module.adapter(frames, all_real(frames) if mask is None else mask)
            out = module.projection(tokens)
            return (out * probe).sum(), (tokens, real, out)

        return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(state, inputs)

    (loss, (tokens, real, out)), (gradients, of_inputs) = compute(state, inputs)
    return Result(tokens, real, out, loss, gradients, of_inputs)


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_gradients_close(gradients: dict, expected: dict):
    assert gradients.keys() == expected.keys()
    total = np.sqrt(sum(np.square(value).sum() for value in expected.values()))
    for name, value in expected.items():
        # A key's bias adds the same to all scores of a query, which softmax ignores; and a softmax over one
        # key is 1: there both sides hold rounding errors alone.
        vanishes = name.endswith("key.bias") or not value.any()
        floor = 1e-5 * total if vanishes else 0.0
        error = np.linalg.norm(gradients[name] - value)
        assert error <= 1e-4 * np.linalg.norm(value) + floor, f"{name}: {error:.2e}"


def check(model: nnx.Dict, table: Table, prefix: str, numbers: dict, mask=None) -> Result:
    """Output and all gradients, of one input x."""
    result = run(model, (numbers["x"],), numbers["probe"], mask)
    assert np.asarray(result.mask).all()
    assert_close(result.out, numbers["out"])
    np.testing.assert_allclose(result.loss, numbers["loss"], rtol=1e-4)
    expected = {k.removeprefix("grad."): v for k, v in numbers.items() if k.startswith("grad.")}
    gradients = export(result.gradients, table) | {f"{prefix}x": np.asarray(result.inputs[0])}
    assert_gradients_close({k.removeprefix(prefix): v for k, v in gradients.items()}, expected)
    assert jax.tree.leaves(result.gradients)
    return result


@pytest.mark.parametrize("folder", folders("slam"))
class TestSlamAsr:
    def test_linear(self, folder):
        data, prefix = golden(folder), "linear."
        sizes, table = data.config, slam_asr.linear_table(prefix)
        config = linear.Config(k=sizes["encoder_projector_ds_rate"], hidden=sizes["mid_dim"])
        model = load_model(config, sizes["encoder_dim"], sizes["llm_dim"], table, data.tensors(prefix))
        check(model, table, prefix, data.part(prefix))

    def test_cov1d(self, folder):
        data, prefix = golden(folder), "cov1d."
        sizes, table = data.config, slam_asr.conv1d_table(prefix)
        k = sizes["encoder_projector_ds_rate"]
        config = conv1d.Config(kernel=k, stride=k, hidden=sizes["mid_dim"])
        model = load_model(config, sizes["encoder_dim"], sizes["llm_dim"], table, data.tensors(prefix))
        check(model, table, prefix, data.part(prefix))

    def test_qformer(self, folder):
        data, prefix = golden(folder), "qformer."
        sizes, qformer_sizes = data.config, data.config["qformer"]
        config = qformer.Config(
            num_queries=qformer_sizes["query_len"],
            frames_norm=False,
            projection_norm="layer",
            cross_attention_freq=qformer_sizes["cross_attention_frequency"],
            **{name: value for name, value in qformer_sizes.items() if name in qformer.Config.model_fields},
        )
        table, numbers = slam_asr.qformer_table(config, prefix), data.part(prefix)
        model = load_model(config, sizes["encoder_dim"], sizes["llm_dim"], table, data.tensors(prefix))
        result = check(model, table, prefix, numbers, numbers["mask"].astype(bool))
        assert_close(result.tokens, numbers["query_output"])


@pytest.mark.parametrize("variant", ["ln_mid", "ln_post"])
@pytest.mark.parametrize("folder", folders("ultravox"))
def test_ultravox(folder, variant):
    data, prefix = golden(folder), f"{variant}."
    sizes, table = data.config, ultravox.table(prefix)
    config = linear.Config(
        k=sizes["stack_factor"],
        remainder="pad",
        hidden=sizes["hidden_size"],
        activation=sizes["projector_act"],
        bias=False,
        pre_norm=True,
        mid_norm=variant == "ln_mid",
        norm_start=sizes["norm_init"],
        norm_eps=sizes["rms_norm_eps"],
        projection_bias=False,
        projection_norm="rms" if variant == "ln_post" else None,
    )
    widths = sizes["audio_hidden_size"], sizes["text_hidden_size"]
    model = load_model(config, *widths, table, data.tensors(prefix))
    result = check(model, table, prefix, data.part(prefix))
    if variant == "ln_post":
        assert_close(result.tokens, data.part(prefix)["swiglu"])
    fresh = linear.Adapter(config, widths[0], rngs=nnx.Rngs(0))
    start = data.part(prefix)["init_norm_value"][0]
    np.testing.assert_array_equal(fresh.pre_norm.scale[...], start)


def joined(norms: dict, whisper, beats):
    """Whisper's and BEATs' frames, each with its layer norm, the shorter padded with zeros, side by side."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
        return x * norms[f"{name}.weight"] + norms[f"{name}.bias"]

    both = [norm(whisper, "ln_speech"), norm(beats, "ln_audio")]
    length = max(x.shape[1] for x in both)
    both = [jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0))) for x in both]
    return jnp.concatenate(both, -1)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("folder", folders("salmonn"))
def test_salmonn(folder, case):
    data = golden(folder)
    sizes, numbers, tensors = data.config, data.part(f"{case}."), data.tensors()
    names = qformer.Config.model_fields
    config = windowed_qformer.Config(
        window=sizes["window_frames"],
        stride=sizes["stride_frames"],
        num_queries=sizes["qformer"]["num_query_tokens"],
        frames_norm=False,
        **{
            name: v
            for name, v in sizes["qformer"].items()
            if name in names and name != "cross_attention_freq"
        },
    )
    frames_width, table = sizes["whisper_dim"] + sizes["beats_dim"], salmonn.table()
    model = load_model(
        config, frames_width, sizes["llm_dim"], table, tensors, ignored=(r"ln_(speech|audio)\..*",)
    )
    norms = {k: v.read((slice(None),)) for k, v in tensors.items() if k.startswith("ln_")}
    inputs = (norms, numbers["whisper"], numbers["beats"])
    result = run(model, inputs, numbers["probe"], frames_of=joined)

    frames = joined(*inputs)
    cut, _ = windows.cut(frames, all_real(frames), config.window, config.stride)
    assert_close(cut.reshape(numbers["windows"].shape), numbers["windows"])
    assert_close(result.tokens.reshape(numbers["query_output"].shape), numbers["query_output"])
    assert_close(result.out, numbers["out"])
    np.testing.assert_allclose(result.loss, numbers["loss"], rtol=1e-4)

    of_norms, of_whisper, of_beats = jax.tree.map(np.asarray, result.inputs)
    gradients = export(result.gradients, table) | of_norms | {"whisper": of_whisper, "beats": of_beats}
    expected = {k.removeprefix("grad."): v for k, v in numbers.items() if k.startswith("grad.")}
    parameters = {k.removeprefix("a.grad."): v for k, v in data.numbers.items() if k.startswith("a.grad.")}
    assert gradients.keys() == parameters.keys()  # case a has all, b those of the inputs
    assert_gradients_close({name: gradients[name] for name in expected}, expected)
