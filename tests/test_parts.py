"""The contracts of the parts (the docstrings of `encoders`, `adapters` and `llms`), for every part that is
listed there: a new one is tested by standing in its dictionary, and with its sizes here."""

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparqle_jax
from sparqle_jax import adapters, assemble, encoders, flops, llms, tables
from sparqle_jax.config import Config, DataConfig, EncoderConfig, OptimConfig, Stage2Config
from sparqle_jax.data.pipeline import SKIPPED
from sparqle_jax.encoders.layer_mix import LayerMix
from sparqle_jax.model import SpeechLLM, min_samples, partition
from sparqle_jax.published import sparqle as published
from sparqle_jax.sharding import batch_sharding, make_mesh, state_sharding
from sparqle_jax.step import TrainState, make_optimizer, make_update, state_shardings
from sparqle_jax.tensors import Tensor
from tests.conftest import call

WIDTH = 32
SPEECH = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
CONVOLUTIONS = dict(
    conv_dim=(16, 16),
    conv_stride=(20, 8),
    conv_kernel=(20, 8),
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
# All widths are multiples of 8, which is how far a mesh of 8 devices splits them.
ENCODERS = {
    "hubert": encoders.FAMILIES["hubert"].Config(**SPEECH, **CONVOLUTIONS, normalize="variance"),
    "wav2vec2": encoders.FAMILIES["wav2vec2"].Config(
        **SPEECH, **CONVOLUTIONS, feat_extract_norm="layer", do_stable_layer_norm=True
    ),
    "wavlm": encoders.FAMILIES["wavlm"].Config(**SPEECH, **CONVOLUTIONS, num_buckets=8),
    "whisper": encoders.FAMILIES["whisper"].Config(
        num_mel_bins=8,
        d_model=WIDTH,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        max_source_positions=32,
    ),
}
BERT = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
ADAPTERS = {
    "conv1d": adapters.KINDS["conv1d"].Config(kernel=3, stride=2, num_layers=2, channels=16, hidden=16),
    "cross_attention": adapters.KINDS["cross_attention"].Config(num_queries=4, num_hidden_layers=1, **BERT),
    "fully_connected": adapters.KINDS["fully_connected"].Config(k=3, hidden=(32, 16)),
    "linear": adapters.KINDS["linear"].Config(k=5, hidden=16),
    "pooling": adapters.KINDS["pooling"].Config(k=2, width=WIDTH),
    "qformer": adapters.KINDS["qformer"].Config(num_queries=4, num_hidden_layers=2, **BERT),
    "windowed_qformer": adapters.KINDS["windowed_qformer"].Config(window=7, stride=7, num_queries=1, **BERT),
}
DECODER = dict(
    vocab_size=104,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
LLMS = {
    "llama": llms.FAMILIES["llama"].Config(**DECODER),
    "mistral": llms.FAMILIES["mistral"].Config(**DECODER, sliding_windows=(8, 8)),
    "qwen2": llms.FAMILIES["qwen2"].Config(**DECODER, qkv_bias=True, tie_word_embeddings=True),
    "qwen3": llms.FAMILIES["qwen3"].Config(**DECODER, qk_norm=True),
}
LENGTHS = np.array([4800, 3137, 2000])  # samples


def test_every_part_is_tested_here():
    assert ENCODERS.keys() == encoders.FAMILIES.keys()
    assert ADAPTERS.keys() == adapters.KINDS.keys()
    assert LLMS.keys() == llms.FAMILIES.keys()


def no_dropout(config):
    rates = {name: 0.0 for name in type(config).model_fields if "dropout" in name}
    return config.model_copy(update=rates)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    part = encoders.FAMILIES[request.param]
    return part, part.Encoder(ENCODERS[request.param], rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request):
    part = adapters.KINDS[request.param]
    return part, part.Adapter(no_dropout(ADAPTERS[request.param]), WIDTH, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=LLMS)
def llm(request):
    part = llms.FAMILIES[request.param]
    return part, part.LLM(LLMS[request.param], rngs=nnx.Rngs(0))


def waveforms(size: int = 3, samples: int = 4800) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.resize(LENGTHS, size)
    return rng.normal(0, 0.1, (size, samples)).astype(np.float32), np.arange(samples) < lengths[:, None]


def counted(function, *args) -> int:
    return flops.count(jax.jit(function).trace(*args).jaxpr).model


def axes_of(module: nnx.Module) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        axes = variable.get_metadata().get("axes")
        shape = variable.get_value().shape
        stacked = len(shape) - len(axes or ()) in (0, 1)  # layers in front
        assert axes is not None, f"{path} has no axes"
        assert stacked, f"{path}: {axes} for {shape}"


def back_and_forth(part, module: nnx.Module) -> None:
    """Exported under the published names and loaded again, every parameter is the same, bit for bit."""
    table = part.table(module.config)
    tensors = tables.export(nnx.state(module), table)
    make = type(module)
    loaded = tables.load(
        lambda rngs: make(module.config, dtype=module.dtype, rngs=rngs),
        table,
        {name: Tensor(value.shape, value.__getitem__) for name, value in tensors.items()},
        name="exported",
    )
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (module, loaded))
    assert before.keys() == after.keys()
    for path, variable in before.items():
        np.testing.assert_array_equal(variable.get_value(), after[path].get_value(), str(path))


class TestEncoder:
    def test_padding_changes_nothing(self, encoder):
        """Whatever stands in the padding, and however much of it there is."""
        _, encoder = encoder
        waveform, mask = waveforms()
        frames, frames_mask = call(encoder.__call__, waveform, mask)
        other = np.pad(np.where(mask, waveform, 3.0), ((0, 0), (0, 640))).astype(np.float32)
        longer, longer_mask = call(encoder.__call__, other, np.pad(mask, ((0, 0), (0, 640))))
        np.testing.assert_array_equal(frames_mask.sum(1), longer_mask.sum(1))
        for row, real in enumerate(np.asarray(frames_mask)):
            np.testing.assert_allclose(frames[row][real], longer[row][: real.sum()], atol=1e-4)

    def test_a_batch_gives_what_each_gives_alone(self, encoder):
        _, encoder = encoder
        waveform, mask = waveforms()
        frames, frames_mask = call(encoder.__call__, waveform, mask)
        for row, length in enumerate(LENGTHS):
            alone, alone_mask = call(encoder.__call__, waveform[row, None, :length])
            real = int(frames_mask[row].sum())
            assert real == int(alone_mask.sum())
            np.testing.assert_allclose(frames[row, :real], alone[0, :real], atol=1e-4)

    def test_lengths_are_as_computed(self, encoder):
        _, encoder = encoder
        config = encoder.config
        assert frames_of(encoder, config.min_samples).shape == (
            1,
            config.num_frames(config.min_samples),
            WIDTH,
        )
        assert config.num_frames(config.min_samples) >= 1
        for samples in (2000, 4799, 4800):
            frames = frames_of(encoder, samples)
            assert frames.shape == (1, config.num_frames(samples), config.width)
        counts = [config.num_frames(n) for n in (2000, 4800)]
        np.testing.assert_array_equal(config.num_frames(np.array([2000, 4800])), counts)
        assert config.max_samples is None or config.max_samples > 4800

    def test_the_last_layer_is_the_output(self, encoder):
        _, encoder = encoder
        waveform, mask = waveforms()
        frames, frames_mask = call(encoder.__call__, waveform, mask)
        states, states_mask = call(encoder.hidden_states, waveform, mask)
        assert states.shape == (encoder.config.num_hidden_layers + 1, *frames.shape)
        np.testing.assert_array_equal(states_mask, frames_mask)
        np.testing.assert_allclose(states[-1][frames_mask], frames[frames_mask], atol=1e-5)

    def test_parameters_have_axes_and_rows(self, encoder):
        part, encoder = encoder
        axes_of(encoder)
        back_and_forth(part, encoder)

    def test_flops_are_the_programs(self, encoder):
        _, encoder = encoder
        graph, state = nnx.split(encoder)
        program = lambda state, x: nnx.merge(graph, state)(x)[0]  # noqa: E731
        assert counted(program, state, waveforms()[0]) == encoder.config.flops(3, 4800)


def frames_of(encoder: nnx.Module, samples: int) -> jax.ShapeDtypeStruct:
    waveform = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    return nnx.eval_shape(lambda encoder, waveform: encoder(waveform)[0], encoder, waveform)


class TestAdapter:
    FRAMES = np.array([60, 37, 23])

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        frames = np.random.default_rng(1).normal(size=(3, 60, WIDTH)).astype(np.float32)
        return frames, np.arange(60) < self.FRAMES[:, None]

    def test_padding_changes_nothing(self, adapter):
        _, adapter = adapter
        frames, mask = self.frames()
        tokens, tokens_mask = call(adapter.__call__, frames, mask)
        other = np.pad(np.where(mask[..., None], frames, 3.0), ((0, 0), (0, 7), (0, 0))).astype(np.float32)
        longer, longer_mask = call(adapter.__call__, other, np.pad(mask, ((0, 0), (0, 7))))
        np.testing.assert_array_equal(tokens_mask.sum(1), longer_mask.sum(1))
        for row, real in enumerate(np.asarray(tokens_mask)):
            np.testing.assert_allclose(tokens[row][real], longer[row][: real.sum()], atol=1e-5)

    def test_a_batch_gives_what_each_gives_alone(self, adapter):
        _, adapter = adapter
        frames, mask = self.frames()
        tokens, tokens_mask = call(adapter.__call__, frames, mask)
        for row, length in enumerate(self.FRAMES):
            alone, alone_mask = call(adapter.__call__, frames[row, None, :length], mask[row, None, :length])
            assert alone.shape[1] == adapter.config.num_tokens(int(length))
            real = int(alone_mask.sum())
            assert real == int(tokens_mask[row].sum()) > 0
            np.testing.assert_allclose(tokens[row, :real], alone[0, :real], atol=1e-5)

    def test_lengths_are_as_computed(self, adapter):
        _, adapter = adapter
        config = adapter.config
        for number in (config.min_frames, 23, 60):
            frames, mask = jnp.zeros((2, number, WIDTH)), jnp.ones((2, number), bool)
            tokens, tokens_mask = nnx.eval_shape(adapter, frames, mask)
            assert tokens.shape == (2, config.num_tokens(number), config.width)
            assert tokens_mask.shape == tokens.shape[:2]
            assert tokens.dtype == jnp.float32
        assert config.num_tokens(config.min_frames) >= 1
        assert config.min_frames == 1 or config.num_tokens(config.min_frames - 1) < 1
        counts = [config.num_tokens(n) for n in (23, 60)]
        np.testing.assert_array_equal(config.num_tokens(np.array([23, 60])), counts)

    def test_attention_where_there_is_one(self, adapter):
        _, adapter = adapter
        if not hasattr(adapter, "attention"):
            return
        frames, mask = self.frames()
        tokens, tokens_mask = call(adapter.__call__, frames, mask)
        weights = call(adapter.attention, frames, mask)
        assert weights.shape[1:] == (*tokens.shape[:2], 60)
        for row, real in enumerate(np.asarray(tokens_mask)):
            np.testing.assert_allclose(weights[:, row, real].sum(-1), 1, atol=1e-5)

    def test_parameters_have_axes(self, adapter):
        axes_of(adapter[1])

    @pytest.mark.parametrize("frames_gradient", [False, True])
    def test_flops_are_the_programs(self, adapter, frames_gradient):
        _, adapter = adapter
        graph, state = nnx.split(adapter)
        frames, mask = self.frames()

        def loss(state, frames):
            tokens, tokens_mask = nnx.merge(graph, state)(frames, mask)
            return jnp.where(tokens_mask[..., None], jnp.sin(tokens), 0).sum()

        argnums = (0, 1) if frames_gradient else 0
        program = jax.value_and_grad(loss, argnums)
        assert counted(program, state, frames) == adapter.config.flops(3, 60, WIDTH, frames_gradient)


class TestLLM:
    def batch(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(2)
        return dict(
            prompt=rng.normal(size=(3, 12, 32)).astype(np.float32),
            prompt_mask=np.arange(12) >= np.array([[0], [4], [7]]),
            answer=rng.integers(0, 100, (3, 6)),
            answer_mask=np.arange(6) < np.array([[6], [3], [5]]),
        )

    def test_padding_changes_nothing(self, llm):
        _, llm = llm
        batch = self.batch()
        hidden = call(llm.answer_states, *batch.values())
        for row in range(3):
            prompt = batch["prompt"][row][batch["prompt_mask"][row]][None]
            answer = batch["answer"][row][batch["answer_mask"][row]][None]
            ones = [np.ones(x.shape[:2], bool) for x in (prompt, answer)]
            alone = call(llm.answer_states, prompt, ones[0], answer, ones[1])
            np.testing.assert_allclose(hidden[row, : answer.shape[1]], alone[0], atol=1e-4)

    def test_step_by_step_it_says_the_same(self, llm):
        """Prefill and steps give the states of the whole answer; a cache may be repeated and cut down."""
        _, llm = llm
        batch = self.batch()
        expected = call(llm.answer_states, *batch.values())
        hidden, cache = call(llm.prefill, batch["prompt"], batch["prompt_mask"], size=20)
        np.testing.assert_allclose(hidden, expected[:, 0], atol=1e-4)
        cache = cache.repeat(2).take(np.array([0, 3, 5])).split()
        for place in range(5):
            hidden, cache = call(llm.step, batch["answer"][:, place], cache)
            real = batch["answer_mask"][:, place + 1]  # what follows padding is of no matter
            np.testing.assert_allclose(hidden[real], expected[real, place + 1], atol=1e-4)

    def test_parameters_have_axes_and_rows(self, llm):
        part, llm = llm
        axes_of(llm)
        back_and_forth(part, llm)

    def test_flops_are_the_programs(self, llm):
        _, llm = llm
        graph, state = nnx.split(llm)
        program = lambda state, *batch: nnx.merge(graph, state).answer_states(*batch)  # noqa: E731
        assert counted(program, state, *self.batch().values()) == sum(llm.config.flops(3, 12, 6))


# --- Together ---------------------------------------------------------------------------------------------

PAIRS = [("hubert", kind) for kind in ADAPTERS] + [(family, "qformer") for family in ENCODERS]
PAIRS += [("wavlm mix", "conv1d")]  # as in SpeechVerse


def make_model(family: str, kind: str, llm: str = "llama") -> SpeechLLM:
    rngs = nnx.Rngs(0)
    encoder = encoders.FAMILIES[family.removesuffix(" mix")].Encoder(
        ENCODERS[family.removesuffix(" mix")], rngs=rngs
    )
    if family.endswith(" mix"):
        encoder = LayerMix(encoder, rngs=rngs)
    parts = assemble.Parts(adapter=no_dropout(ADAPTERS[kind]))
    model = llms.FAMILIES[llm].LLM(LLMS[llm], rngs=rngs)
    return assemble.make_speech_llm(encoder, parts, model, dtype=jnp.float32, rngs=rngs)


def make_batch(size: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    waveform, mask = waveforms(size)
    batch = {"waveform": waveform, "waveform_mask": mask}
    for name, length, left in (("before", 4, True), ("after", 3, True), ("answer", 5, False)):
        real = np.arange(length) < rng.integers(1, length + 1, size)[:, None]
        batch |= {name: rng.integers(0, 100, (size, length)), f"{name}_mask": real[:, ::-1] if left else real}
    return batch


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), dict.fromkeys(PAIRS))
def test_a_step_on_eight_devices_is_one_on_one(family, kind):
    batch = make_batch() | {SKIPPED: np.zeros(8, bool)}
    results = []
    for sizes, devices in (((1, 1, 1), jax.devices()[:1]), ((2, 2, 2), jax.devices())):
        mesh = make_mesh(sizes, devices)
        graph, trained, frozen = partition(make_model(family, kind))
        optimizer, _ = make_optimizer(OptimConfig(lr=1e-2, warmup_steps=0), 10)
        shardings = state_shardings(trained, optimizer, mesh)
        trained = jax.device_put(trained, shardings.trained)
        state = TrainState(jnp.int32(0), trained, optimizer.init(trained))
        state = jax.device_put(state, shardings)
        frozen = jax.device_put(frozen, state_sharding(frozen, mesh))
        update = make_update(graph, optimizer, shardings)
        control = {"seed": np.uint32(0), "step": np.int32(0), "signal": np.zeros(mesh.size, np.int32)}
        with jax.set_mesh(mesh):
            state, metrics = update(state, frozen, jax.device_put(batch, batch_sharding(mesh)), control)
        results.append(jax.device_get((state.trained, metrics)))
    (one, metrics), (eight, other) = results
    assert np.isfinite(metrics["loss"])
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], other["gradient_norm"], rtol=1e-4)
    assert jax.tree.structure(one) == jax.tree.structure(eight)


@pytest.mark.parametrize(("family", "kind"), dict.fromkeys(PAIRS))
def test_what_trains_is_saved_and_comes_back(family, kind, tmp_path):
    model = make_model(family, kind)
    assemble.save(model, tmp_path / "adapter.safetensors")
    again = assemble.load_speech_llm(tmp_path / "adapter.safetensors", model.encoder, model.llm)
    assert assemble.parts_in(again) == assemble.parts_in(model)
    before, after = (dict(nnx.to_flat_state(partition(m)[1])) for m in (model, again))
    assert before.keys() == after.keys()
    for path, variable in before.items():
        np.testing.assert_array_equal(variable.get_value(), after[path].get_value(), str(path))


def a_run(start: Path, **options) -> Config:
    """The configuration of a stage 2 that starts from a file, with another dropout than the file's."""
    adapter = ADAPTERS["qformer"].model_copy(update={"hidden_dropout_prob": 0.3})
    encoder = EncoderConfig(folder=Path("encoder"), **options)
    stage = Stage2Config(steps=1, batch_size=1)
    towers = dict(encoder=encoder, llm=Path("llm"), data=DataConfig(train="data"), stage2=stage)
    return Config(run="run", **towers, adapter=adapter, init_from=start)


@pytest.mark.parametrize("save", [assemble.save, published.save])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_starts_from_a_file_has_its_own_dropout(stage, save, tmp_path):
    saved = model = make_model("hubert", "qformer")
    file = tmp_path / "adapter.safetensors"
    if stage == 1:
        parts = assemble.Parts(adapter=ADAPTERS["qformer"], vocab_size=40, embed_dim=8)
        saved = assemble.make_aligner(model.encoder, parts, dtype=jnp.float32, rngs=nnx.Rngs(1))
    save(saved, file)
    started = assemble.new_speech_llm(a_run(file), model.encoder, model.llm, None, nnx.Rngs(0))
    assert started.adapter.config == a_run(file).adapter
    queries, given = (np.asarray(m.adapter.query_tokens[...]) for m in (started, saved))
    np.testing.assert_array_equal(queries, given)


def test_a_run_hears_as_the_file_does_from_which_it_starts(tmp_path):
    model, file = make_model("hubert", "qformer"), tmp_path / "adapter.safetensors"
    model.encoder = LayerMix(model.encoder, rngs=nnx.Rngs(0))
    assemble.save(model, file)
    assert assemble.parts_of(a_run(file)).encoder.layer_mix
    assert not assemble.parts_of(a_run(file, pad_to_window=False)).encoder.pad_to_window
    assemble.save(make_model("hubert", "qformer"), file)
    with pytest.raises(ValueError, match=r"encoder.layer_mix=True, but init_from=.* was trained with False"):
        assemble.parts_of(a_run(file, layer_mix=True))


@pytest.mark.parametrize(("family", "kind"), dict.fromkeys(PAIRS))
def test_flops_of_a_step(family, kind):
    model, batch = make_model(family, kind), make_batch()
    graph, trained, frozen = partition(model)

    def loss(trained, frozen, batch):
        return nnx.merge(graph, trained, frozen).loss(batch, jax.random.key(0))[0]

    assert counted(jax.value_and_grad(loss), trained, frozen, batch) == sum(model.flops(batch).values())


def test_the_shortest_recording_gives_a_token():
    for family, encoder in ENCODERS.items():
        for kind, adapter in ADAPTERS.items():
            samples = min_samples(encoder, adapter)
            assert adapter.num_tokens(encoder.num_frames(samples)) >= 1, (family, kind)


def test_a_recording_without_tokens_leaves_the_others_alone():
    """Its tokens are masked, so the LLM answers to the prompt alone; nothing is NaN."""
    for kind in ADAPTERS:
        model, batch = make_model("hubert", kind), make_batch(2)
        batch["waveform_mask"] = np.arange(4800) < np.array([[4800], [0]])
        loss, _ = call(model.loss, batch, jax.random.key(0), train=False)
        assert np.isfinite(loss), kind


PACKAGE = Path(sparqle_jax.__file__).parent


def test_no_other_file_names_a_part():
    """But its own, the dictionary, and those of published systems: composing files know contracts alone."""
    parts = {f"sparqle_jax.{package}" for package in ("encoders", "adapters", "llms")}
    modules = {
        f"{package}.{file.stem}"
        for package in parts
        for file in (PACKAGE / package.rpartition(".")[2]).glob("*.py")
        if file.stem != "__init__"
    }
    # What several parts share, or stands over any of them, and so is in no dictionary.
    shared = {"encoders.wav2vec2", "encoders.transformer", "encoders.layer_mix"}
    shared |= {"adapters.bert", "adapters.windows", "llms.lora"}
    shared = {f"sparqle_jax.{name}" for name in shared}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(("sparqle_jax", *file.relative_to(PACKAGE).with_suffix("").parts))
        if name.endswith("__init__") or name.startswith("sparqle_jax.published."):
            continue
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert not (imported & modules) - shared - {name}, f"{file} names a part"


class TestDocumentation:
    """The adapter that docs/parts.md writes goes through the tests of all adapters."""

    @pytest.fixture
    def adapter(self, monkeypatch):
        page = (PACKAGE.parent / "docs" / "parts.md").read_text()
        (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        part = ModuleType("stride")
        monkeypatch.setitem(sys.modules, "stride", part)
        exec(compile(block, "docs/parts.md", "exec"), vars(part))
        return part, part.Adapter(part.Config(k=3, width=16), WIDTH, rngs=nnx.Rngs(0))

    def test_it_keeps_the_contract(self, adapter):
        suite = TestAdapter()
        for name in dir(TestAdapter):
            if name.startswith("test_") and name != "test_flops_are_the_programs":
                getattr(suite, name)(adapter)
        for frames_gradient in (False, True):
            suite.test_flops_are_the_programs(adapter, frames_gradient)
