"""Plans for TPUs that are not there: steps of tiny models, compiled; and the searches, with stand-ins."""

import dataclasses
import io
import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparqle_jax import loop, plan_tpu, train
from sparqle_jax.chips import CHIPS, topology
from sparqle_jax.config import read_config
from sparqle_jax.data.plan import Bucket
from sparqle_jax.demo.__main__ import MODELS
from sparqle_jax.plan_tpu import GIB, Planner, StepPlan, describe
from sparqle_jax.program import census
from sparqle_jax.sharding import make_mesh
from tests import test_parts as parts

pytest.importorskip("libtpu", reason="only Linux on x86-64 has TPU's compiler")

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.py")
# What a step takes beside parameters, optimizer and batch: its number, twice, and a signal. The seed is for
# dropout, which is left out here: half of the time it takes to compile a step so small.
CONTROL = 3 * 4

CONFIG = """
from pathlib import Path
from sparqle_jax.adapters import qformer
from sparqle_jax.config import *

def get_config():
    return Config(
        run=Path("run"),
        encoder=EncoderConfig(folder=Path("hubert")),
        llm=Path("llama"),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=DataConfig(
            train="nowhere", max_seconds=1.0, buckets=1, batch_multiple=16, max_text_tokens=32
        ),
        adapter=qformer.Config(
            num_queries=8,
            hidden_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        init_from=Path("bert"),
        stage1=Stage1Config(
            tokenizer=Path("bert"), embed_dim=128, steps=10, batch_size=16, losses=("stc",)
        ),
        stage2=Stage2Config(steps=10, batch_size=16),
        dtype="bfloat16",
    )
"""
SIZES = dict(hidden_size=128, num_attention_heads=2, intermediate_size=128)
HUBERT = SIZES | dict(
    model_type="hubert",
    num_hidden_layers=2,
    conv_dim=[128],
    conv_stride=[320],
    conv_kernel=[320],
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=1,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
)
BERT = SIZES | dict(model_type="bert", num_hidden_layers=1, vocab_size=127, max_position_embeddings=64)
LLAMA = SIZES | dict(model_type="llama", num_hidden_layers=2, num_key_value_heads=2, vocab_size=136)
# 16 GiB in bfloat16, in many layers: as quickly compiled as a small one.
LARGE = LLAMA | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=512)


@pytest.fixture(scope="module", autouse=True)
def settings():
    """Little effort is enough for such small programs, and nothing of them goes into JAX's cache."""
    changes = {"jax_optimization_level": "O0", "jax_persistent_cache_min_compile_time_secs": math.inf}
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """A configuration whose towers are config.json files in `models` beside it, and nothing else."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.py").write_text(CONFIG)
    for name, sizes in {"hubert": HUBERT, "bert": BERT, "llama": LLAMA, "large": LARGE}.items():
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text(json.dumps(sizes))
    return str(folder / "config.py")


def make_planner(config: str, slice_: str, slices: int = 1, *changes: str) -> Planner:
    return Planner(read_config(config, changes), Path(config).parent / "models", topology(slice_, slices))


# --- Compiled --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Planned:
    """What the command made with --json: its exit status and output, and the texts of the programs."""

    status: int
    report: dict
    text: str
    programs: list[str]


# Of every chip the smallest slice with several chips. In float32 gradients cross slices as they are kept.
TWO_SLICES = ["--slices", "2", "--set", "mesh.data=2", "--set", "dtype=float32"]
RUNS = {
    "v4-8": ["--stage", "stage2"],
    "v5e-4": [],
    "v5p-8": ["--stage", "stage2"],
    "v6e-4": ["--stage", "stage2", *TWO_SLICES],
    "tpu7x-8": ["--stage", "stage2"],
}


@pytest.fixture(scope="module")
def planned(config):
    """By the name of a slice, what was planned for it; each is compiled once."""
    made = {}

    def plan(slice_: str) -> Planned:
        if slice_ not in made:
            made[slice_] = command(config, "--topology", slice_, *RUNS[slice_])
        return made[slice_]

    return plan


def command(config: str, *arguments: str) -> Planned:
    programs = []

    def kept(text: str):
        programs.append(text)
        return census(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_tpu, "census", kept)
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            status = plan_tpu.main([config, *arguments, "--json"])
    return Planned(status, json.loads(out.getvalue()), err.getvalue(), programs)


def steps_of(report: dict) -> list[StepPlan]:
    names = {field.name for field in dataclasses.fields(StepPlan)}
    return [StepPlan(**{k: v for k, v in step.items() if k in names}) for step in report["steps"]]


@pytest.mark.slow
@pytest.mark.parametrize("slice_", RUNS)
def test_every_generation_of_chips_has_a_table_and_the_same_as_json(slice_, planned):
    made = planned(slice_)
    assert made.status == 0
    assert made.report["fits"]
    assert "\nfits. Compiled in " in made.text
    assert made.report["chips"] == 4 * made.report["slices"]
    assert f" {made.report['chips']} chips, {slice_.partition('-')[0]}, " in made.text
    assert made.report["assumed"] == [
        "buckets evenly up to 1 s (data.train is not here)",
        "prompts of 48 + 16 tokens",
    ]
    for assumed in made.report["assumed"]:
        assert f"\nassumed: {assumed}\n" in made.text
    steps = steps_of(made.report)
    assert [step.stage for step in steps] == (["stage1", "stage2"] if slice_ == "v5e-4" else ["stage2"])
    for step, whole in zip(steps, made.report["steps"], strict=True):
        assert f"\n{describe(step)}\n" in made.text
        assert whole == json.loads(json.dumps(step.as_json()))
        assert not step.unknown_loops


@pytest.mark.parametrize("slice_", RUNS)
def test_arguments_are_what_the_sharding_rules_say(slice_, planned):
    """To the byte: of values, what lies on a chip by the rules; in memory, these with a layout's padding."""
    made = planned(slice_)
    for step, text in zip(steps_of(made.report), made.programs, strict=True):
        devices = chip_named(slice_).devices
        values, padded = argument_bytes(text)
        assert (step.parameters + step.optimizer + step.batch) / devices + CONTROL == values
        assert step.arguments / devices == padded
        assert step.arguments < step.peak < step.hbm


def argument_bytes(text: str) -> tuple[int, int]:
    """Of the arguments of a program on one device: of their values, and as they lie in memory.

    There the smallest dimensions are filled up to whole tiles, T(8,128) say, and an array begins at a
    multiple of 512 bytes.
    """
    layout = text.partition("\n")[0].partition("entry_computation_layout={(")[2].partition(")->")[0]
    values = padded = 0
    for dtype, sizes, order, tile in re.findall(
        r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]*)\))?[^}]*\})?", layout
    ):
        sizes, order, tile = ([int(x) for x in numbers.split(",") if x] for numbers in (sizes, order, tile))
        width = 1 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) // 8
        values += math.prod(sizes) * width
        stored = [sizes[axis] for axis in reversed(order)]
        for i, size in zip(range(-1, -len(stored) - 1, -1), reversed(tile), strict=False):
            stored[i] = -(-stored[i] // size) * size
        padded += -(-math.prod(stored) * width // 512) * 512
    return values, padded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "adapter", "llm"),
    [
        *((encoder, "linear", "llama") for encoder in parts.ENCODERS),
        *(("hubert", adapter, "llama") for adapter in parts.ADAPTERS),
        *(("hubert", "linear", llm) for llm in parts.LLMS),
    ],
)
def test_every_part_compiles(encoder, adapter, llm, config, tmp_path):
    """A step of stage 2 with each encoder, adapter and LLM that is listed, for four chips of v5e."""
    for folder, name, sizes in (("hubert", encoder, parts.ENCODERS), ("llama", llm, parts.LLMS)):
        (tmp_path / folder).mkdir()
        values = {"model_type": name} | transformers_fields(sizes[name])
        (tmp_path / folder / "config.json").write_text(json.dumps(values))
    changes = {"adapter": parts.ADAPTERS[adapter].model_dump(), "data.max_seconds": 0.5, "init_from": None}
    values = read_config(config, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    planner = Planner(values, tmp_path, topology("v5e-4", 1), ["stage2"])
    step = planner.plan("stage2", planner.buckets["stage2"][0], planner.mesh)
    assert step.fits
    assert step.model_flops > 0


def transformers_fields(config) -> dict:
    """A Config as a config.json says it."""
    values = dataclasses.asdict(config)
    if any(windows := values.pop("sliding_windows", ())):
        values |= {"sliding_window": windows[0], "use_sliding_window": True}
    return values


def test_stage_1_has_the_llm_beside_it_that_training_has_loaded(planned):
    """All its matrices have a dimension that is split over fsdp=4; its norms are whole."""
    stage1, stage2 = steps_of(planned("v5e-4").report)
    matrices = 2 * 136 * 128 + 2 * 7 * 128 * 128
    assert stage1.beside == 2 * (matrices // 4 + (2 * 2 + 1) * 128)
    assert stage2.beside == 0
    assert "the LLM of stage 2 0.00 GiB: at most" in describe(stage1)


def test_a_step_fits_only_with_what_is_beside_it(config, monkeypatch):
    planner = make_planner(config, "v5e-4")
    monkeypatch.setattr(planner, "_beside", lambda stage, mesh: 16 * GIB)
    step = planner.plan("stage1", planner.buckets["stage1"][0], planner.mesh)
    assert not step.fits
    assert "not beside the LLM of stage 2, which training has loaded: together 16.0" in step.error


@pytest.mark.parametrize("slice_", RUNS)
def test_times_are_bytes_and_operations_by_the_published_figures(slice_, planned):
    made, chip = planned(slice_), chip_named(slice_)
    for step in steps_of(made.report):
        sent = {"slices": 0, "chips": 0}
        for kind, numbers in step.collectives.items():
            sent["slices" if "(between slices)" in kind else "chips"] += numbers["sent"] * chip.devices
        assert step.compute_time == pytest.approx(step.program_flops / made.report["chips"] / chip.peak)
        assert step.ici_time == pytest.approx(2 * sent["chips"] / chip.ici_bandwidth)
        assert step.dcn_time == pytest.approx(sent["slices"] / chip.dcn_bandwidth)
        assert step.hbm_time * chip.hbm_bandwidth > step.arguments + step.optimizer
        assert step.bound == max(step.compute_time, step.hbm_time, step.ici_time, step.dcn_time)
        assert step.audio_per_hour == pytest.approx(16 * 1.0 / step.bound)
        assert 1 <= step.program_flops / step.model_flops < 1.3


def test_nothing_but_gradients_travels_between_slices(planned):
    """Which are as large as one of the two moments of the optimizer, and scalars."""
    (step,) = steps_of(planned("v6e-4").report)
    assert step.mesh == {"data": 2, "fsdp": 4, "model": 1}
    crossing = {kind: numbers for kind, numbers in step.collectives.items() if "slices" in kind}
    assert list(crossing) == ["all-reduce (between slices)"]
    sent = crossing["all-reduce (between slices)"]["sent"]
    assert step.optimizer / 2 < sent < 1.1 * step.optimizer / 2
    assert step.dcn_time > 0
    assert steps_of(planned("v5e-4").report)[1].dcn_time == 0


@pytest.mark.slow
def test_a_step_that_does_not_fit_and_the_nearest_that_does(config):
    """Of parameters that are whole on every chip there are too many; split over four, they fit."""
    changes = ["llm=large", "mesh.data=4", "mesh.fsdp=1", "stage2.batch_size=4", "data.batch_multiple=4"]
    made = command(
        config, "--topology", "v5e-4", "--stage", "stage2", *(x for c in changes for x in ("--set", c))
    )
    assert made.status == 1
    (step,), found = made.report["steps"], made.report["nearest"]["stage2"]
    assert not made.report["fits"]
    assert not step["fits"]
    assert re.search(r"\n  DOES NOT FIT .*Ran out of memory on HBM.* available HBM \(15.75G\)", made.text)
    assert step["parameters"] > step["hbm"]
    assert step["peak"] is step["ici_time"] is None
    assert step["bound"] == step["compute_time"]
    assert found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 4, "model": 1}
    assert found["batch_size"] == 4
    assert found["parameters"] < step["parameters"] / 3.9
    assert "\nthe nearest mesh or batch that fits:\nstage2: 4 recordings of up to 1.00 s" in made.text
    assert "\nDOES NOT FIT. Compiled in " in made.text


def test_another_failure_of_the_compiler_is_raised(config, monkeypatch):
    def fail(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    planner = make_planner(config, "v5e-4")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        planner.plan("stage2", planner.buckets["stage2"][0], planner.mesh)


@pytest.mark.parametrize(("slice_", "parts"), [("v5e-4", 3), ("v5e-16", 17)])
def test_a_product_in_a_ring_sends_what_gathering_its_weight_would(slice_, parts):
    """TPU's compiler sends the parts of a weight round while it multiplies, of a large batch.

    On 4 chips in one direction, 3 parts; on 16 in both, with two parts (of 15) too many.
    """
    mesh = make_mesh((1, -1, 1), topology(slice_))

    def layers(x, weights):
        def layer(x, weight):
            hidden = jnp.maximum(x @ weight[0], 0)
            return jax.lax.with_sharding_constraint(hidden @ weight[1], jax.P("fsdp")), None

        return jax.lax.scan(layer, x, weights)[0]

    def array(spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    weights = array((None, "fsdp"), 5, 1024, 4096), array((None, None, "fsdp"), 5, 4096, 1024)
    with jax.set_mesh(mesh):
        x = array(("fsdp",), 64 * 300, 1024)
        found = census(jax.jit(layers).lower(x, weights).compile().as_text())
    assert found.unknown_loops == ()
    assert {one.kind for one in found.collectives} == {"collective-permute"}
    whole = 5 * 2 * 1024 * 4096 * 2
    assert sum(one.sent for one in found.collectives) == whole // mesh.size * parts


def chip_named(slice_: str):
    return next(chip for chip in CHIPS if chip.name == slice_.partition("-")[0])


# --- As training does it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["null", str(MODELS / "stage1.safetensors")])
def test_models_buckets_and_batches_are_those_of_training(start, small_world, tmp_path, monkeypatch, capsys):
    sizes = dict(kind="qformer", num_queries=4, hidden_size=48, num_hidden_layers=1)
    adapter = None if start != "null" else sizes
    changes = [
        f"run={tmp_path}",
        f"data.train={small_world / 'train'}",
        "data.valid={}",
        "data.frames=null",
        "data.buckets=2",
        "data.max_text_tokens=24",
        f"init_from={start}",
        f"adapter={json.dumps(adapter)}",
        "stage1.batch_size=8",
        "stage2.batch_size=8",
    ]
    config = read_config(TINY, changes)
    run = train.Run(config)
    monkeypatch.setattr(
        plan_tpu, "PROMPT_TOKENS", (run.stages[1].examples.before, run.stages[1].examples.after)
    )
    planner = Planner(config, tmp_path, jax.devices())
    for stage, model in zip(run.stages, (run.aligner, run.model), strict=True):
        assert shapes(nnx.state(planner.modules[stage.name])) == shapes(nnx.state(model))
        assert planner.buckets[stage.name] == stage.plan.buckets
        for batch, bucket in zip(stage.plan.one_of_each(), stage.plan.buckets, strict=True):
            expected = loop.abstract_batch(stage.examples, batch, planner.mesh)
            assert planner._abstract_batch(stage.name, bucket, planner.mesh) == expected
    assert "data.train" not in " ".join(planner.assumed)
    # The encoder's frames, where they are kept, come in place of the waveform.
    planner = Planner(read_config(TINY, [*changes, "data.frames=frames"]), tmp_path, jax.devices())
    bucket = planner.buckets["stage2"][-1]
    batch = planner._abstract_batch("stage2", bucket, planner.mesh)
    length = run.model.encoder.config.num_frames(bucket.num_samples)
    assert batch["frames"].shape == (bucket.batch_size, length, run.model.encoder.config.hidden_size)
    assert (batch["frames"].dtype, batch["frames_mask"].dtype) == ("float16", "bool")
    assert batch["frames_mask"].shape == (bucket.batch_size, length)
    assert "waveform" not in batch


def shapes(tree) -> dict:
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree.leaves_with_path(tree)}


def test_what_is_not_there_is_assumed_and_said(config):
    changes = ["init_from=null", "data.max_text_tokens=null", "data.buckets=[0.25,0.5]"]
    planner = make_planner(config, "v5e-4", 1, *changes)
    assert planner.assumed == {
        "prompts of 48 + 16 tokens",
        "texts of 128 tokens (data.max_text_tokens says how many)",
        "the vocabulary of bert-base-uncased (stage1.tokenizer is not here)",
    }
    assert planner.modules["stage1"].adapter.vocab_size == 30523
    assert planner.buckets["stage2"] == [Bucket(4000, 32), Bucket(8000, 16)]
    assert planner.steps()[:2] == [("stage1", Bucket(8000, 16)), ("stage1", Bucket(4000, 32))]


# --- Searches, with stand-ins ----------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """Steps are not compiled: a function (bucket, mesh) -> bytes says what they take. Lists those planned."""

    def use(bytes_of) -> list[StepPlan]:
        made = []

        def plan(self, stage, bucket, mesh):
            step = StepPlan(
                stage=stage,
                mesh=dict(mesh.shape),
                batch_size=bucket.batch_size,
                seconds=bucket.num_samples / 16000,
                parameters=0,
                optimizer=0,
                batch=0,
                beside=0,
                hbm=self.chip.hbm_bytes,
                model_flops=1,
                program_flops=1,
                compute_time=1.0,
            )
            peak = bytes_of(bucket, mesh)
            if peak > self.chip.hbm_bytes - GIB // 4:  # programs don't get all of it
                step = dataclasses.replace(step, error=f"{peak} bytes do not fit")
            else:
                step = dataclasses.replace(
                    step, arguments=0, peak=peak, collectives={}, hbm_time=0.5, ici_time=0.5, dcn_time=0.0
                )
            made.append(step)
            return step

        monkeypatch.setattr(Planner, "plan", plan)
        return made

    return use


def sizes_of(step: StepPlan) -> tuple[int, ...]:
    return tuple(step.mesh.values())


class TestNearest:
    BUCKET = Bucket(16000, 64)

    def test_a_mesh_that_splits_parameters_further(self, config, memory):
        made = memory(lambda bucket, mesh: 100 * GIB // (mesh.shape["fsdp"] * mesh.shape["model"]))
        planner = make_planner(config, "v5e-16", 1, "mesh.data=4", "mesh.fsdp=4")
        found = planner.nearest("stage2", self.BUCKET)
        assert sizes_of(found) == (1, 16, 1)
        assert found.batch_size == 64
        assert made == [found]

    def test_the_model_axis_comes_after_fsdp_and_only_where_it_divides(self, config, memory):
        made = memory(lambda bucket, mesh: 60 * GIB // mesh.shape["model"])
        found = make_planner(config, "v5e-16").nearest("stage2", self.BUCKET)
        assert [sizes_of(step) for step in made] == [(1, 8, 2), (1, 4, 4)]
        assert found == made[-1]
        made.clear()
        # Conv kernels of 132 can be split into 4 parts, not into 8.
        memory(lambda bucket, mesh: 1000 * GIB // mesh.shape["model"] * bucket.batch_size // 64)
        hubert = Path(config).parent / "models" / "odd"
        hubert.mkdir()
        (hubert / "config.json").write_text(json.dumps(HUBERT | dict(intermediate_size=132)))
        planner = make_planner(config, "v5e-16", 1, "encoder=odd")
        found = planner.nearest("stage2", self.BUCKET)
        assert sizes_of(found) == (1, 4, 4)
        assert found.batch_size == 4

    def test_else_the_batch_is_halved(self, config, memory):
        made = memory(lambda bucket, mesh: bucket.batch_size * GIB)
        planner = make_planner(config, "v5e-4", 1, "stage2.accumulate=2")
        found = planner.nearest("stage2", Bucket(16000, 48))
        assert [sizes_of(step) for step in made] == [(1, 2, 2), (1, 1, 4)] + [(1, 1, 4)] * 2
        assert [step.batch_size for step in made] == [48, 48, 24, 12]
        assert found == made[-1]
        assert found.fits
        assert not made[-2].fits

    def test_batches_stay_whole_for_every_device_and_part(self, config, memory):
        made = memory(lambda bucket, mesh: 20 * GIB)
        planner = make_planner(config, "v5e-4", 2, "mesh.data=2", "stage2.accumulate=3")
        assert planner.nearest("stage2", Bucket(16000, 60)) is None
        assert [sizes_of(step) for step in made[:2]] == [(2, 2, 2), (2, 1, 4)]
        assert [step.batch_size for step in made] == [60, 60, 30, 12, 6]
        for step in made[2:]:
            assert sizes_of(step) == (2, 1, 4)


class TestLargestBatch:
    @pytest.mark.parametrize("truth", [1, 2, 3, 7, 64, 65, 100])
    def test_the_largest_number_is_found_from_any_guess(self, truth):
        for guess in range(1, 200):
            tried = set()

            def fits(number, tried=tried):
                tried.add(number)
                return number <= truth

            assert plan_tpu._largest(fits, guess) == truth
            assert truth + 1 in tried
            assert truth in tried | {1}
            assert len(tried) <= 2 + 2 * math.log2(max(2, abs(truth - guess) + 1, truth))

    @pytest.mark.parametrize("each", [GIB // 50, GIB // 10, GIB // 3, GIB])
    @pytest.mark.parametrize("fixed", [0, 5 * GIB])
    def test_it_fits_and_the_next_does_not(self, each, fixed, config, memory):
        made = memory(lambda bucket, mesh: fixed + each * bucket.batch_size // 4)
        planner = make_planner(config, "v5e-4", 1, "data.batch_multiple=2")
        (found,) = planner.largest_batch("stage2")  # one bucket: the longest is the shortest
        assert found.fits
        assert found.batch_size == (16 * GIB - GIB // 4 - fixed) // each * 4
        (above,) = [step for step in made if step.batch_size == found.batch_size + 4]
        assert not above.fits
        # The line tells where to look; what programs don't get of the memory it does not know.
        assert len(made) <= 5 + 2 * math.log2(1 + GIB / 4 / each)

    def test_memory_that_grows_faster_than_in_a_line(self, config, memory):
        memory(lambda bucket, mesh: GIB * bucket.batch_size**2 // 4096)
        (found,) = make_planner(config, "v5e-4").largest_batch("stage2")
        assert found.batch_size == 240  # 16 at a time: the square root of 15.75 * 4096 is 253.99

    @pytest.mark.parametrize("length", [4000, 16000])
    def test_the_shortest_recordings_must_fit_as_well(self, length, config, memory):
        """Of those there are more in a batch."""
        made = memory(
            lambda bucket, mesh: bucket.batch_size * (GIB // 64 if bucket.num_samples == length else 1)
        )
        planner = make_planner(config, "v5e-4", 1, "data.buckets=4")
        long, short = planner.largest_batch("stage1")
        assert (long.seconds, short.seconds) == (1.0, 0.25)
        assert short.batch_size == 4 * long.batch_size
        assert long.fits
        assert short.fits
        assert {step.seconds for step in made} == {1.0, 0.25}
        assert long.batch_size == (15.75 * 64 // 16 * 16 if length == 16000 else 15.75 * 64 // 4 // 16 * 16)

    def test_accumulated_batches_are_whole(self, config, memory):
        memory(lambda bucket, mesh: bucket.batch_size * GIB // 100)
        planner = make_planner(config, "v5e-4", 1, "stage2.accumulate=5")
        assert planner.largest_batch("stage2")[0].batch_size == 1520  # 15.75 * 100 in units of 4 * 5 * 4

    def test_when_none_fits_that_is_said(self, config, memory, capsys):
        memory(lambda bucket, mesh: 20 * GIB)
        assert plan_tpu.main([config, "--topology", "v5e-4", "--max-batch", "--stage", "stage2"]) == 1
        text = capsys.readouterr().out
        assert "stage2: 16 recordings" in text
        assert "DOES NOT FIT 21474836480 bytes do not fit" in text
        assert "nearest" not in text

    def test_through_the_command(self, config, memory, capsys):
        memory(lambda bucket, mesh: bucket.batch_size * GIB // 100)
        assert plan_tpu.main([config, "--topology", "v5e-4", "--max-batch"]) == 0
        text = capsys.readouterr().out
        assert "stage1: 1568 recordings of up to 1.00 s" in text
        assert "stage2: 1568 recordings of up to 1.00 s" in text


def test_a_batch_size_in_place_of_the_configurations(config, memory):
    made = memory(lambda bucket, mesh: GIB)
    assert plan_tpu.main([config, "--topology", "v5e-4", "--batch", "48", "--set", "data.buckets=2"]) == 0
    assert [(step.stage, step.seconds, step.batch_size) for step in made] == [
        (stage, seconds, size) for stage in ("stage1", "stage2") for seconds, size in ((1.0, 48), (0.5, 96))
    ]


def test_the_nearest_is_looked_for_once_in_a_stage(config, memory, capsys):
    made = memory(lambda bucket, mesh: 20 * GIB)
    arguments = [config, "--topology", "v5e-4", "--stage", "stage2", "--set", "data.buckets=2"]
    assert plan_tpu.main(arguments) == 1
    text = capsys.readouterr().out
    assert text.count("the nearest mesh or batch that fits: none was found") == 1
    assert [step.seconds for step in made].count(0.5) == 1


# --- Mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--topology", "v5e-3"],
            r"'v5e-3' is not the name of a TPU slice; there are(.|\n)*v5e-1, v5e-4, v5e-8",
        ),
        (["--slices", "0"], r"slices=0 must be at least 1"),
        (
            ["--set", "mesh.data=3"],
            r"data=3, fsdp=-1, model=1 needs a multiple of 3 devices, but there are 4",
        ),
        (["--slices", "2", "--set", "mesh.fsdp=8"], r"can't lie on 2 slices: data=1 is not a multiple"),
        (
            ["--set", "stage2.batch_size=18", "--set", "data.batch_multiple=6"],
            r"stage2: batches of 18 can't be split into 4 equal parts \(mesh.data \* mesh.fsdp = 4, times",
        ),
        (["--set", "stage2.accumulate=3"], r"stage2: batches of 16 can't be split into 12 equal parts"),
        (["--set", "llm=nowhere"], r"neither nowhere nor .*/models/nowhere has a config.json"),
        (["--set", "llm=bert"], r"model_type='bert'; supported here: \['llama'"),
        (["--set", "stage1=null", "--stage", "stage1"], r"--stage stage1: the configuration has none"),
        (["--stage", "stage3"], r"invalid choice: 'stage3'"),
        (
            ["--set", "data.frames=f", "--topology", "v5e-16"],
            r"made by one host, and this slice has 4: set it",
        ),
        (
            ["--set", "mesh.fsdp=1", "--set", "mesh.model=-1", "--topology", "v5e-16"],
            r"136 is not a multiple of model=16",
        ),
    ],
)
def test_a_mistake_is_explained(arguments, message, config, memory, capsys):
    memory(lambda bucket, mesh: pytest.fail("it was noticed too late"))
    with pytest.raises(SystemExit) as exit_:
        plan_tpu.main([config, "--topology", "v5e-4", *arguments])
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_the_compiler(config, monkeypatch, capsys):
    def missing(*_):
        raise ImportError("to compile for TPUs libtpu must be installed")

    monkeypatch.setattr(plan_tpu, "topology", missing)
    with pytest.raises(SystemExit) as exit_:
        plan_tpu.main([config, "--topology", "v5e-4"])
    assert exit_.value.code == 2
    assert "libtpu must be installed" in capsys.readouterr().err
