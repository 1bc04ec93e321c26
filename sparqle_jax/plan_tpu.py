"""Whether a run fits on TPUs, how they would communicate, and how fast it could be at best: without a TPU.

    python -m sparqle_jax.plan_tpu configs/sparqle.py --topology v5e-16
    python -m sparqle_jax.plan_tpu configs/sparqle.py --topology v5p-64 --slices 2 --max-batch

The steps that training would run are compiled, by XLA's own compiler for these chips, for the batches of
every bucket. Nothing is run: memory and collectives are the compiler's, times are bounds and no measurements.
Needs no weights: of a folder that is not there, the config.json of the same name in `models` beside the
configuration is read. Exit status 1 when a step does not fit, 2 for a mistake in what was asked.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparqle_jax import assemble, audio, flops, pretrained, prompts
from sparqle_jax.aligner import Aligner
from sparqle_jax.chips import chip_of, topology
from sparqle_jax.config import Config, StageConfig, read_config
from sparqle_jax.data.dataset import Corpus, DataSet
from sparqle_jax.data.pipeline import SKIPPED
from sparqle_jax.data.plan import Bucket, batch_sizes
from sparqle_jax.model import SpeechLLM, partition
from sparqle_jax.program import Census, census
from sparqle_jax.sharding import (
    MESH_AXES,
    batch_parts,
    batch_sharding,
    make_mesh,
    replicated,
    state_sharding,
)
from sparqle_jax.stages import STAGES, make_plan
from sparqle_jax.step import TrainState, abstract_state, make_optimizer, make_update, state_shardings

GIB = 2**30
# Tokens around the speech, which a tokenizer would tell; of a text, where the configuration is silent.
PROMPT_TOKENS, TEXT_TOKENS = (48, 16), 128
BERT_VOCABULARY = 30523  # of bert-base-uncased, and [DEC]


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A step, compiled. Bytes are of one chip; times are the least that is possible, in seconds.

    parameters, optimizer, batch: what of them lies on a chip. beside: what training keeps there for the other
    stage: in stage 1 the LLM. arguments: what the step is given, padded in its layout; peak: the most at any
    time, arguments, results and what is beside included.
    error: the compiler's, when it does not fit; then all that only a compiled program tells is None.
    """

    stage: str
    mesh: dict[str, int]
    batch_size: int
    seconds: float
    parameters: int
    optimizer: int
    batch: int
    beside: int
    hbm: int
    model_flops: int
    program_flops: int
    compute_time: float
    error: str | None = None
    arguments: int | None = None
    peak: int | None = None
    collectives: dict[str, dict[str, int]] | None = None
    unknown_loops: tuple[str, ...] = ()
    hbm_time: float | None = None
    ici_time: float | None = None
    dcn_time: float | None = None

    @property
    def fits(self) -> bool:
        return self.error is None

    @property
    def bound(self) -> float:
        """The least time that the step can take."""
        return max(self.compute_time, *(time or 0 for time in (self.hbm_time, self.ici_time, self.dcn_time)))

    @property
    def audio_per_hour(self) -> float:
        """An upper bound on the hours of audio in an hour."""
        return self.batch_size * self.seconds / self.bound

    def as_json(self) -> dict[str, Any]:
        """The fields and the properties."""
        derived = {name: getattr(self, name) for name in ("fits", "bound", "audio_per_hour")}
        return dataclasses.asdict(self) | derived


class Planner:
    """Compiles the steps of stages of a configuration for TPU devices that are not there.

    models: a folder with the config.json of towers whose own folders are not there. assumed: what could not
    be counted, in words. Raises FileNotFoundError and ValueError as training does for what does not fit
    together.
    """

    def __init__(
        self, config: Config, models: Path, devices: list[jax.Device], stages: Sequence[str] = STAGES
    ):
        self.config, self.models, self.devices = config, models, devices
        self.chip = chip_of(devices[0].device_kind)
        self.mesh = make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.model), devices)
        self.assumed: set[str] = set()
        hosts = {device.process_index for device in devices}
        if config.data.frames is not None and len(hosts) > 1:
            raise ValueError(
                f"data.frames are made by one host, and this slice has {len(hosts)}: set it to null."
            )
        self.stages: dict[str, StageConfig] = {
            name: getattr(config, name) for name in stages if getattr(config, name) is not None
        }
        self.modules = {stage: self._abstract_model(stage) for stage in self.stages}
        for module in self.modules.values():
            state_sharding(nnx.state(module), self.mesh)  # raises for what an axis does not divide
        self.buckets = {stage: self._buckets(stage) for stage in self.stages}
        self._text_tokens = config.data.max_text_tokens
        if self._text_tokens is None:
            self._text_tokens = TEXT_TOKENS
            self.assumed.add(f"texts of {TEXT_TOKENS} tokens (data.max_text_tokens says how many)")
        if "stage2" in self.stages:
            self.assumed.add(f"prompts of {PROMPT_TOKENS[0]} + {PROMPT_TOKENS[1]} tokens")

    def _folder(self, folder: Path) -> Path:
        """The folder, or the one of the same name in `models` where it is not there."""
        for there in (folder, self.models / folder.name):
            if (there / "config.json").is_file():
                return there
        raise FileNotFoundError(
            f"neither {folder} nor {self.models / folder.name} has a config.json: give the folder of the "
            "model, or put its config.json there; its weights are not needed."
        )

    def _abstract_model(self, stage: str) -> Aligner | SpeechLLM:
        """The model of a stage, of shapes alone, as training makes it."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        encoder_folder = self._folder(config.encoder.folder)
        # A BERT, or a file of stage 1, brings its own.
        own = config.init_from is not None or stage == "stage2"
        vocab_size = None if own else self._vocab_size()
        parts = assemble.parts_of(self._with_folders(config), vocab_size)

        def make() -> Aligner | SpeechLLM:
            rngs = nnx.Rngs(0)
            encoder = assemble.new_encoder(encoder_folder, parts, dtype=dtype, rngs=rngs)
            if stage == "stage1":
                settings = assemble.stage1_settings(config)
                return assemble.make_aligner(encoder, parts, dtype=dtype, rngs=rngs, **settings)
            return assemble.make_speech_llm(encoder, parts, self._make_llm(), dtype=dtype, rngs=rngs)

        return nnx.eval_shape(make)

    def _with_folders(self, config: Config) -> Config:
        """The configuration, its BERT folder as it is here."""
        start = config.init_from
        if start is None or start.is_file():
            return config
        return config.model_copy(update={"init_from": self._folder(start)})

    def _vocab_size(self) -> int:
        """The vocabulary of stage 1's texts, with the token that begins a text to generate."""
        tokenizer = self.config.stage1.tokenizer
        if tokenizer.is_dir():
            return max(prompts.load_tokenizer(tokenizer).get_vocab().values()) + 2
        self.assumed.add("the vocabulary of bert-base-uncased (stage1.tokenizer is not here)")
        return BERT_VOCABULARY

    def _make_llm(self) -> nnx.Module:
        part, config = pretrained.llm_config(self._folder(self.config.llm))
        dtype, remat = jnp.dtype(self.config.dtype), self.config.stage2.remat
        return part.LLM(config, dtype=dtype, param_dtype=dtype, remat=remat, rngs=nnx.Rngs(0))

    def _beside(self, stage: str, mesh: Mesh) -> int:
        """Bytes on a device of what training loads for the other stage."""
        if stage == "stage2" or self.config.stage2 is None:
            return 0
        llm = nnx.state(nnx.eval_shape(self._make_llm))
        return _bytes(_with_shardings(llm, state_sharding(llm, mesh)))

    def _buckets(self, stage: str) -> list[Bucket]:
        """The buckets of training, or without its data as many, evenly."""
        data, config = self.config.data, self.stages[stage]
        folders = [one.folder for one in data.train.values()]
        if all(_is_there(folder) for folder in folders):
            return make_plan(self.config, Corpus([DataSet(folder) for folder in folders]), config).buckets
        if isinstance(data.buckets, int):
            seconds = [data.max_seconds * (i + 1) / data.buckets for i in range(data.buckets)]
            self.assumed.add(f"buckets evenly up to {data.max_seconds:g} s (data.train is not here)")
        else:
            seconds = list(data.buckets)
        lengths = [round(s * audio.SAMPLE_RATE) for s in seconds]
        return batch_sizes(lengths, config.batch_size, data.batch_multiple)

    def _parts(self, stage: str, mesh: Mesh) -> int:
        """Into how many equal parts a batch is cut: for devices, and one after the other."""
        return batch_parts(mesh) * self.stages[stage].accumulate

    def steps(self) -> list[tuple[str, Bucket]]:
        """The steps that training would compile, the longest recordings of each stage first.

        Raises ValueError for a batch that can't be split over the mesh.
        """
        work = [(stage, bucket) for stage in self.stages for bucket in reversed(self.buckets[stage])]
        for stage, bucket in work:
            parts = self._parts(stage, self.mesh)
            if bucket.batch_size % parts:
                raise ValueError(
                    f"{stage}: batches of {bucket.batch_size} can't be split into {parts} equal parts "
                    f"(mesh.data * mesh.fsdp = {batch_parts(self.mesh)}, times accumulate): make batch_size "
                    f"and data.batch_multiple multiples of {parts}, or choose another mesh."
                )
        return work

    def plan(self, stage: str, bucket: Bucket, mesh: Mesh) -> StepPlan:
        """Compiles the step of a bucket."""
        seconds = bucket.num_samples / audio.SAMPLE_RATE
        print(
            f"{stage}: compiling a step of {bucket.batch_size} recordings of up to {seconds:.2f} s, mesh "
            f"{_sizes(mesh.shape)} ...",
            file=sys.stderr,
            flush=True,
        )
        state, frozen, update = self._abstract_step(stage, mesh)
        batch = self._abstract_batch(stage, bucket, mesh)
        with jax.set_mesh(mesh):
            traced = update.trace(state, frozen, batch, _abstract_control(mesh))
        counted = flops.count(traced.jaxpr)
        devices = self.chip.devices
        planned = StepPlan(
            stage=stage,
            mesh=dict(mesh.shape),
            batch_size=bucket.batch_size,
            seconds=seconds,
            parameters=_bytes((state.trained, frozen)) * devices,
            optimizer=_bytes(state.optimizer) * devices,
            batch=_bytes(batch) * devices,
            beside=self._beside(stage, mesh) * devices,
            hbm=self.chip.hbm_bytes,
            model_flops=sum(self.modules[stage].flops(batch).values()),
            program_flops=counted.total,
            compute_time=counted.total / (mesh.size // devices * self.chip.peak),
        )
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            words = str(error).splitlines()[0]
            if not words.startswith("RESOURCE_EXHAUSTED: "):
                raise
            return dataclasses.replace(planned, error=words.removeprefix("RESOURCE_EXHAUSTED: "))
        return self._measured(planned, compiled)

    def _measured(self, planned: StepPlan, compiled: jax.stages.Compiled) -> StepPlan:
        """With what the compiled program tells."""
        devices, memory = self.chip.devices, compiled.memory_analysis()
        peak = memory.peak_memory_in_bytes * devices + planned.beside
        if peak > planned.hbm:
            error = (
                f"The step fits, but not beside the LLM of stage 2, which training has loaded: together "
                f"{peak / GIB:.2f} of {planned.hbm / GIB:.0f} GiB. With --set stage2=null it is not loaded."
            )
            return dataclasses.replace(planned, error=error)
        found = census(compiled.as_text())
        sent = {False: 0, True: 0}
        gathered = 0
        for one in found.collectives:
            sent[one.crosses] += one.sent
            gathered += one.result * one.times
        # Arguments are read, results written, and what comes over links is written and read: at least.
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * gathered
        return dataclasses.replace(
            planned,
            arguments=memory.argument_size_in_bytes * devices,
            peak=peak,
            collectives=_by_kind(found),
            unknown_loops=found.unknown_loops,
            hbm_time=moved * devices / self.chip.hbm_bandwidth,
            # In a ring, a chip sends over half of what is published, which counts both directions.
            ici_time=sent[False] * devices / (self.chip.ici_bandwidth / 2),
            dcn_time=sent[True] * devices / self.chip.dcn_bandwidth,
        )

    def _abstract_step(self, stage: str, mesh: Mesh) -> tuple[TrainState, nnx.State, Callable]:
        """The step of a stage as training makes it, and the abstract states that it takes."""
        graph, trained, frozen = partition(self.modules[stage])
        config = self.stages[stage]
        optimizer, _ = make_optimizer(config.optim, config.steps)
        shardings = state_shardings(trained, optimizer, mesh)
        state = abstract_state(trained, optimizer, shardings)
        frozen = _with_shardings(frozen, state_sharding(frozen, mesh))
        update = make_update(graph, optimizer, shardings, accumulate=config.summed_parts)
        return state, frozen, update

    def _abstract_batch(self, stage: str, bucket: Bucket, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as `AlignmentExamples` and `InstructionExamples` make it."""
        samples, text = (bucket.num_samples,), (self._text_tokens,)
        arrays: dict[str, tuple[Any, tuple[int, ...]]] = {SKIPPED: (bool, ())}
        if self.config.data.frames is None:
            arrays |= {"waveform": (np.float32, samples), "waveform_mask": (bool, samples)}
        else:
            encoder = self.modules[stage].encoder.config
            frames = (encoder.num_frames(bucket.num_samples),)
            arrays["frames"] = (np.float16, (*frames, encoder.width))
            arrays["frames_mask"] = (bool, frames)
        if stage == "stage1":
            arrays |= {"text": (np.int32, text), "text_mask": (bool, text), "recording_id": (np.int32, ())}
        else:
            before, after = ((length,) for length in PROMPT_TOKENS)
            for name, shape in (("before", before), ("after", after), ("answer", text)):
                arrays |= {name: (np.int32, shape), f"{name}_mask": (bool, shape)}
        sharding = batch_sharding(mesh)
        return {
            name: jax.ShapeDtypeStruct((bucket.batch_size, *shape), dtype, sharding=sharding)
            for name, (dtype, shape) in arrays.items()
        }

    def nearest(self, stage: str, bucket: Bucket) -> StepPlan | None:
        """The nearest mesh, or else the nearest batch size, with which a step that does not fit does.

        Tried are meshes that split parameters further, then halves of the batch on the last of them.
        """
        data, fsdp, model = self.mesh.shape.values()
        slices = len({getattr(device, "slice_index", 0) for device in self.devices})
        inner = data // slices * fsdp
        mesh = self.mesh
        for times in (times for times in (1, 2, 4, 8) if inner % times == 0):
            sizes = (slices, inner // times, model * times)
            if sizes == (data, fsdp, model):
                continue
            try:
                other = make_mesh(sizes, self.devices)
                state_sharding(nnx.state(self.modules[stage]), other)
            except ValueError:  # an axis that does not divide
                continue
            mesh = other
            found = self.plan(stage, bucket, mesh)
            if found.fits:
                return found
        parts, size = self._parts(stage, mesh), bucket.batch_size
        while size > parts:
            size = max(size // 2 // parts, 1) * parts
            found = self.plan(stage, Bucket(bucket.num_samples, size), mesh)
            if found.fits:
                return found
        return None

    def largest_batch(self, stage: str) -> list[StepPlan]:
        """The steps with the largest batch_size that fits: of the longest recordings, and of the shortest.

        The longest have the largest attention, the shortest the most texts in a batch; what is between needs
        less than one of them. The next larger batch_size does not fit: it was compiled. Returns a step that
        does not fit when none does.
        """
        unit = math.lcm(self._parts(stage, self.mesh), self.config.data.batch_multiple)
        lengths = sorted({self.buckets[stage][i].num_samples for i in (0, -1)})
        tried: dict[int, list[StepPlan]] = {}

        def fits(times: int) -> bool:
            if times not in tried:
                tried[times] = []
                for bucket in reversed(batch_sizes(lengths, times * unit, unit)):
                    tried[times].append(self.plan(stage, bucket, self.mesh))
                    if not tried[times][-1].fits:
                        break
            return tried[times][-1].fits

        if not fits(1):
            return tried[1][-1:]
        guess = 1
        if fits(2):  # memory grows in a line with the batch, or nearly so
            room = max(0, min(self.chip.hbm_bytes - step.peak for step in tried[2]))
            growth = max(two.peak - one.peak for one, two in zip(tried[1], tried[2], strict=True))
            guess = 2 + room // max(growth, room // 1000, 1)  # growth may be too small to be seen
        return tried[_largest(fits, guess)]


def _largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that `fits`, as 1 does and all above do not: looks near the guess, then further."""
    low, high, stride = 1, math.inf, 1
    while high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        if high == math.inf:
            guess = low + stride
        elif low == 1:
            guess = max(high - stride, 2)
        else:
            guess = (low + high) // 2
        stride *= 2
    return low


def _is_there(folder: str) -> bool:
    try:
        DataSet(folder)
    except FileNotFoundError:
        return False
    return True


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _abstract_control(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a step's input besides its batch (see `make_update`)."""
    split = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    return {
        "seed": jax.ShapeDtypeStruct((), np.uint32, sharding=replicated(mesh)),
        "step": jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh)),
        "signal": jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=split),
    }


def _bytes(tree: Any) -> int:
    """The bytes of a tree of abstract arrays, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _by_kind(found: Census) -> dict[str, dict[str, int]]:
    """Collectives by kind: how many there are in a step, and the bytes that a device sends for them."""
    kinds: dict[str, dict[str, int]] = {}
    for one in found.collectives:
        name = f"{one.kind} (between slices)" if one.crosses else one.kind
        kind = kinds.setdefault(name, {"times": 0, "sent": 0})
        kind["times"] += one.times
        kind["sent"] += one.sent
    return dict(sorted(kinds.items()))


def _sizes(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items())


def describe(planned: StepPlan) -> str:
    """A step in words and figures."""
    lines = [
        f"{planned.stage}: {planned.batch_size} recordings of up to {planned.seconds:.2f} s, mesh "
        f"{_sizes(planned.mesh)}",
        f"  per chip     parameters {planned.parameters / GIB:.2f} GiB, optimizer "
        f"{planned.optimizer / GIB:.2f} GiB, batch {planned.batch / GIB:.2f} GiB",
    ]
    if planned.fits:
        activations = planned.peak - planned.arguments - planned.beside
        beside = f", the LLM of stage 2 {planned.beside / GIB:.2f} GiB" if planned.beside else ""
        lines.append(
            f"  fits         arguments {planned.arguments / GIB:.2f} GiB, activations "
            f"{activations / GIB:.2f} GiB{beside}: at most {planned.peak / GIB:.2f} of "
            f"{planned.hbm / GIB:.0f} GiB"
        )
    else:
        lines.append(f"  DOES NOT FIT {planned.error}")
    model, program = planned.model_flops, planned.program_flops
    lines.append(
        f"  FLOPs        model {model:.4g}, program {program:.4g} ({program / model:.2f} times): the rest is "
        "computed again in the backward pass"
    )
    if not planned.fits:
        return "\n".join(lines)
    for kind, numbers in planned.collectives.items():
        sent = numbers["sent"] / 2**20
        lines.append(f"  collectives  {numbers['times']:5d} {kind}: a device sends {sent:.1f} MiB")
    for loop in planned.unknown_loops:
        lines.append(f"  collectives  counted once, in a loop of unknown length: {loop}")
    times = {
        "compute": planned.compute_time,
        "HBM": planned.hbm_time,
        "interconnect": planned.ici_time,
        "between slices": planned.dcn_time,
    }
    shown = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in times.items() if value)
    lines.append(
        f"  bound        {1000 * planned.bound:.1f} ms a step ({shown}): at best "
        f"{planned.audio_per_hour:.0f} hours of audio an hour"
    )
    return "\n".join(lines)


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """Plans what is asked for and prints it; returns the same, for JSON."""
    began = time.monotonic()
    config = read_config(args.config, args.set)
    for stage in args.stage or []:
        if getattr(config, stage) is None:
            raise ValueError(f"--stage {stage}: the configuration has none.")
    if args.batch is not None:
        stages = {stage: one for stage in STAGES if (one := getattr(config, stage)) is not None}
        changed = {n: one.model_copy(update={"batch_size": args.batch}) for n, one in stages.items()}
        config = config.model_copy(update=changed)
    devices = topology(args.topology, args.slices)
    planner = Planner(config, args.config.parent / "models", devices, args.stage or STAGES)
    chips, assumed = len(devices) // planner.chip.devices, sorted(planner.assumed)
    what = f"{args.slices} x {args.topology}" if args.slices > 1 else args.topology
    print(f"{args.config} on {what}: {chips} chips, {planner.chip.name}, {config.dtype}")
    for text in assumed:
        print(f"assumed: {text}")
    steps: list[StepPlan] = []
    nearest: dict[str, StepPlan | None] = {}
    if args.max_batch:
        for stage in planner.stages:
            for planned in planner.largest_batch(stage):
                steps.append(planned)
                print(f"\n{describe(planned)}")
    else:
        for stage, bucket in planner.steps():
            steps.append(planner.plan(stage, bucket, planner.mesh))
            print(f"\n{describe(steps[-1])}")
            if not steps[-1].fits and stage not in nearest:
                nearest[stage] = found = planner.nearest(stage, bucket)
                instead = " none was found" if found is None else f"\n{describe(found)}"
                print(f"the nearest mesh or batch that fits:{instead}")
    fits = all(step.fits for step in steps)
    print(
        f"\n{'fits' if fits else 'DOES NOT FIT'}. Compiled in {time.monotonic() - began:.0f} s by the TPU "
        "compiler and not run: memory and collectives are the program's, times are what no step can be "
        "faster than, not what one takes."
    )
    return {
        "topology": args.topology,
        "slices": args.slices,
        "chips": chips,
        "assumed": assumed,
        "fits": fits,
        "steps": [step.as_json() for step in steps],
        "nearest": {stage: found and found.as_json() for stage, found in nearest.items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.plan_tpu", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="a configuration, such as configs/sparqle.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one key")
    parser.add_argument(
        "--topology", required=True, help="a slice, such as v4-32, v5e-16, v5p-8, v6e-8, tpu7x-8"
    )
    parser.add_argument("--slices", type=int, default=1, help="how many slices train together")
    parser.add_argument("--stage", action="append", choices=STAGES, help="this stage alone")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch", type=int, help="batch_size, in place of the configuration's")
    size.add_argument("--max-batch", action="store_true", help="looks for the largest batch_size that fits")
    parser.add_argument(
        "--json", action="store_true", help="prints one JSON object, and what is meant to be read on stderr"
    )
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    # Of a device that is not there, programs can't be read back from JAX's cache: nothing is written to it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            report = _report(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))  # with status 2
    if args.json:
        print(json.dumps(report))
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
