"""Whether a run fits on TPUs, how they would communicate, and how fast it could be at best: without a TPU.

    python -m sparqle_jax.plan_tpu configs/sparqle.py --topology v5e-16
    python -m sparqle_jax.plan_tpu configs/sparqle.py --topology v5p-64 --slices 2 --max-batch

The steps that training would run are compiled, by XLA's own compiler for these chips, for the batches of
every bucket. Nothing is run: memory and collectives are the compiler's, times are bounds and no measurements.
Needs no weights: of a folder that is not there, the config.json of the same name in `models` beside the
configuration is read. Exit status 1 when a step does not fit.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sparqle_jax import audio, flops, pretrained, prompts
from sparqle_jax.adapters.qformer import QFormer, QFormerConfig
from sparqle_jax.chips import Chip, chip_of, topology
from sparqle_jax.config import Config, StageConfig, read_config
from sparqle_jax.data.dataset import Corpus, DataSet
from sparqle_jax.data.pipeline import SKIPPED
from sparqle_jax.data.plan import Bucket, batch_sizes
from sparqle_jax.encoders.hubert import Hubert, HubertConfig
from sparqle_jax.llms.decoder import FAMILIES, Decoder, DecoderConfig
from sparqle_jax.model import Aligner, AlignmentHeads, SparQLe, make_projection, partition
from sparqle_jax.program import Census, census
from sparqle_jax.sharding import MESH_AXES, batch_parts, batch_sharding, make_mesh, state_sharding
from sparqle_jax.train import TrainState, make_optimizer, make_plan, make_update, state_shardings

GIB = 2**30
# What is taken where neither the data nor the tokenizer is there to count.
PROMPT_TOKENS, TEXT_TOKENS = (48, 16), 128


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The batches of a stage: its buckets, and how many tokens there are before and after the speech (stage
    2), and in a text. assumed: what of it was not counted, in words."""

    buckets: list[Bucket]
    prompt: tuple[int, int]
    text: int
    assumed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A compiled step. Bytes are of one chip; times are the least, in seconds.

    error: the compiler's, when it does not fit; then all that only a compiled program tells is None.
    """

    stage: str
    mesh: dict[str, int]
    batch_size: int
    seconds: float
    parameters: int
    optimizer: int
    batch: int
    hbm: int
    model_flops: int
    program_flops: int
    compute_time: float
    error: str | None = None
    arguments: int | None = None
    activations: int | None = None
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
        """At most so many hours of audio in an hour."""
        return self.batch_size * self.seconds / self.bound


class Planner:
    """Compiles the steps of a configuration for TPU devices that are not there.

    models: a folder with the config.json of towers whose own folders are not there. Raises
    FileNotFoundError and ValueError as training does for what does not fit together.
    """

    def __init__(self, config: Config, models: Path, devices: list[jax.Device]):
        self.config, self.models, self.devices = config, models, devices
        self.chip: Chip = chip_of(devices[0].device_kind)
        self.sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.model)
        self.stages: dict[str, StageConfig] = {
            name: stage for name in ("stage1", "stage2") if (stage := getattr(config, name)) is not None
        }
        self.models_of = {name: self._abstract_model(name) for name in self.stages}

    def _folder(self, folder: Path) -> Path:
        """The folder, or the one of the same name in `models` where it is not there."""
        for there in (folder, self.models / folder.name):
            if (there / "config.json").is_file():
                return there
        raise FileNotFoundError(
            f"neither {folder} nor {self.models / folder.name} has a config.json: give the folder of the "
            "model, or put its config.json there; its weights are not needed."
        )

    def _abstract_model(self, stage: str) -> Aligner | SparQLe:
        """The model of a stage, of shapes alone, as training makes it."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        hubert = HubertConfig.from_dict(pretrained.read_config(self._folder(config.encoder), ("hubert",)))
        qformer = self._qformer_config(hubert.hidden_size, text=stage == "stage1")
        if stage == "stage2":
            folder = self._folder(config.llm)
            llm = DecoderConfig.from_dict(pretrained.read_config(folder, tuple(FAMILIES)))

        def make() -> Aligner | SparQLe:
            rngs = nnx.Rngs(0)
            encoder = Hubert(hubert, dtype=dtype, param_dtype=dtype, rngs=rngs)
            adapter = QFormer(qformer, dtype=dtype, rngs=rngs)
            if stage == "stage1":
                heads = AlignmentHeads(qformer.hidden_size, config.adapter.features, dtype=dtype, rngs=rngs)
                return Aligner(encoder, adapter, heads, losses=config.stage1.losses)
            remat = config.stage2.remat
            decoder = Decoder(llm, dtype=dtype, param_dtype=dtype, remat=remat, rngs=rngs)
            projection = make_projection(qformer.hidden_size, llm.hidden_size, dtype=dtype, rngs=rngs)
            return SparQLe(encoder, adapter, projection, decoder)

        return nnx.eval_shape(make)

    def _qformer_config(self, encoder_width: int, *, text: bool) -> QFormerConfig:
        start, sizes = self.config.adapter.start, dict(self.config.adapter.sizes)
        if start is not None and start.is_file():
            return dataclasses.replace(pretrained.qformer_config(start, **sizes), text=text)
        sizes.update(encoder_width=encoder_width, text=text)
        if start is not None:
            return QFormerConfig.from_bert(pretrained.read_config(self._folder(start), ("bert",)), **sizes)
        tokenizer = self.config.adapter.tokenizer
        if text and tokenizer is not None and tokenizer.is_dir():
            words = max(prompts.load_tokenizer(tokenizer).get_vocab().values()) + 1
            sizes.update(vocab_size=words + 1, bos_token_id=words)
        return QFormerConfig(**sizes)

    def shapes(self, stage: str, batch_size: int | None = None) -> Shapes:
        """The batches of a stage; batch_size: in place of the configuration's."""
        data, config = self.config.data, self.stages[stage]
        batch_size = batch_size or config.batch_size
        assumed = []
        folders = [one.folder for one in data.train.values()]
        if all(_is_there(folder) for folder in folders):
            corpus = Corpus([DataSet(folder) for folder in folders])
            buckets = make_plan(
                self.config, corpus, config.model_copy(update={"batch_size": batch_size})
            ).buckets
        else:
            if isinstance(data.buckets, int):
                seconds = [data.max_seconds * (i + 1) / data.buckets for i in range(data.buckets)]
                assumed.append(f"buckets evenly up to {data.max_seconds:g} s (data.train is not here)")
            else:
                seconds = list(data.buckets)
            lengths = [round(s * audio.SAMPLE_RATE) for s in seconds]
            buckets = batch_sizes(lengths, batch_size, data.batch_multiple)
        text = data.max_text_tokens
        if text is None:
            text = TEXT_TOKENS
            assumed.append(f"texts of {text} tokens (data.max_text_tokens says how many)")
        before, after = PROMPT_TOKENS
        if stage == "stage2":
            assumed.append(f"prompts of {before} + {after} tokens")
        return Shapes(buckets, (before, after), text, tuple(assumed))

    def mesh(self, sizes: tuple[int, int, int] | None = None) -> Mesh:
        return make_mesh(sizes or self.sizes, self.devices)

    def plan(self, stage: str, bucket: Bucket, shapes: Shapes, mesh: Mesh) -> StepPlan:
        """Compiles the step of a bucket."""
        accumulate = getattr(self.stages[stage], "accumulate", 1)
        parts = batch_parts(mesh) * accumulate
        if bucket.batch_size % parts:
            raise ValueError(
                f"{stage}: batches of {bucket.batch_size} can't be split into {parts} equal parts (mesh.data "
                f"* mesh.fsdp = {batch_parts(mesh)}, times accumulate): make batch_size and "
                f"data.batch_multiple multiples of {parts}, or choose another mesh."
            )
        model = self.models_of[stage]
        state, frozen, update = self._abstract_step(stage, mesh)
        batch = _abstract_batch(stage, bucket, shapes, mesh)
        chips = mesh.size // self.chip.devices
        with jax.set_mesh(mesh):
            traced = update.trace(state, frozen, batch, _abstract_control(mesh))
        counted = flops.count(traced.jaxpr)
        sizes = {
            "parameters": _bytes((state.trained, frozen)),
            "optimizer": _bytes(state.optimizer),
            "batch": _bytes(batch),
        }
        planned = StepPlan(
            stage=stage,
            mesh=dict(mesh.shape),
            batch_size=bucket.batch_size,
            seconds=bucket.num_samples / audio.SAMPLE_RATE,
            hbm=self.chip.hbm_bytes,
            model_flops=sum(flops.analytic(model, batch).values()),
            program_flops=counted.total,
            compute_time=counted.total / (chips * self.chip.peak),
            **{name: size * self.chip.devices for name, size in sizes.items()},
        )
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return dataclasses.replace(planned, error=_out_of_memory(str(error)))
        return self._measured(planned, compiled)

    def _measured(self, planned: StepPlan, compiled: jax.stages.Compiled) -> StepPlan:
        """With what the compiled program tells."""
        devices, memory, found = self.chip.devices, compiled.memory_analysis(), census(compiled.as_text())
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
            activations=memory.temp_size_in_bytes * devices,
            peak=memory.peak_memory_in_bytes * devices,
            collectives=_by_kind(found),
            unknown_loops=found.unknown_loops,
            hbm_time=moved * devices / self.chip.hbm_bandwidth,
            # In a ring, a chip sends over half of what is published, which counts both directions.
            ici_time=sent[False] * devices / (self.chip.ici_bandwidth / 2),
            dcn_time=sent[True] * devices / self.chip.dcn_bandwidth,
        )

    def _abstract_step(self, stage: str, mesh: Mesh):
        graph, trained, frozen = partition(self.models_of[stage])
        config = self.stages[stage]
        optimizer, _ = make_optimizer(config.optim, config.steps)
        shardings = state_shardings(trained, optimizer, mesh)
        moments = jax.eval_shape(optimizer.init, trained)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        state = _with_shardings(TrainState(step, trained, moments), shardings)
        frozen = _with_shardings(frozen, state_sharding(frozen, mesh))
        update = make_update(graph, optimizer, shardings, accumulate=getattr(config, "accumulate", 1))
        return state, frozen, update

    def nearest(self, planned: StepPlan, shapes: Shapes) -> StepPlan | None:
        """The nearest mesh, or else the nearest batch size, with which a step that does not fit does.

        Tried are meshes that split parameters further, then halves of the batch on the last of them.
        """
        bucket = Bucket(round(planned.seconds * audio.SAMPLE_RATE), planned.batch_size)
        accumulate = getattr(self.stages[planned.stage], "accumulate", 1)
        data, fsdp = planned.mesh["data"], planned.mesh["fsdp"]
        slices = len({getattr(device, "slice_index", 0) for device in self.devices})
        inner = data // slices * fsdp
        meshes = [(slices, inner // model, planned.mesh["model"] * model) for model in (1, 2, 4, 8)]
        mesh = None
        for sizes in meshes:
            if math.prod(sizes) != len(self.devices) or sizes == tuple(planned.mesh.values()):
                continue
            try:
                mesh = self.mesh(sizes)
                state_sharding(nnx.state(self.models_of[planned.stage]), mesh)
            except ValueError:  # an axis that does not divide
                continue
            if bucket.batch_size % (batch_parts(mesh) * accumulate) == 0:
                found = self.plan(planned.stage, bucket, shapes, mesh)
                if found.fits:
                    return found
        mesh = mesh or self.mesh(tuple(planned.mesh.values()))
        unit, size = batch_parts(mesh) * accumulate, bucket.batch_size
        while size > unit:
            size = max(size // 2 // unit * unit, unit)
            found = self.plan(planned.stage, Bucket(bucket.num_samples, size), shapes, mesh)
            if found.fits:
                return found
        return None

    def largest_batch(self, stage: str, mesh: Mesh) -> StepPlan:
        """The step with the largest batch of the longest recordings that fits.

        Memory grows in a line with the batch, so two sizes tell which others to look at; the one returned is
        compiled, and so is the next larger one, unless it was seen to be far off. Returns a step that does
        not fit when none does.
        """
        shapes = self.shapes(stage)
        longest = shapes.buckets[-1].num_samples
        unit = math.lcm(
            batch_parts(mesh) * getattr(self.stages[stage], "accumulate", 1), self.config.data.batch_multiple
        )
        tried: dict[int, StepPlan] = {}

        def fits(times: int) -> bool:
            if times not in tried:
                tried[times] = self.plan(stage, Bucket(longest, times * unit), shapes, mesh)
            return tried[times].fits

        if not fits(1):
            return tried[1]
        low, high = 1, 2
        while fits(high):
            low, step = high, (tried[high].peak - tried[low].peak) / (high - low)
            room = self.chip.hbm_bytes - tried[high].peak
            high = high + max(1, int(room / max(step, 1)))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return tried[low]


def _is_there(folder: str) -> bool:
    try:
        DataSet(folder)
    except FileNotFoundError:
        return False
    return True


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _abstract_batch(
    stage: str, bucket: Bucket, shapes: Shapes, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as `AlignmentExamples` and `InstructionExamples` make it."""
    arrays = {"waveform": (np.float32, bucket.num_samples), "waveform_mask": (bool, bucket.num_samples)}
    if stage == "stage1":
        arrays |= {
            "text": (np.int32, shapes.text),
            "text_mask": (bool, shapes.text),
            "recording_id": (np.int32,),
        }
    else:
        lengths = dict(zip(("before", "after"), shapes.prompt, strict=True), answer=shapes.text)
        arrays |= {name: (np.int32, length) for name, length in lengths.items()}
        arrays |= {f"{name}_mask": (bool, length) for name, length in lengths.items()}
    arrays[SKIPPED] = (bool,)
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((bucket.batch_size, *shape), dtype, sharding=sharding)
        for name, (dtype, *shape) in arrays.items()
    }


def _abstract_control(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    return {
        "seed": jax.ShapeDtypeStruct((), np.uint32, sharding=everywhere),
        "step": jax.ShapeDtypeStruct((), np.int32, sharding=everywhere),
        "signal": jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=split),
    }


def _bytes(tree: Any) -> int:
    """Of a tree of abstract arrays, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _by_kind(found: Census) -> dict[str, dict[str, int]]:
    """Collectives by kind: how many there are in a step, and the bytes that a device sends for them."""
    kinds: dict[str, dict[str, int]] = {}
    for one in found.collectives:
        kind = kinds.setdefault(
            one.kind + (" (between slices)" if one.crosses else ""), {"times": 0, "sent": 0}
        )
        kind["times"] += one.times
        kind["sent"] += one.sent
    return kinds


def _out_of_memory(message: str) -> str:
    """What the compiler says of memory, in its own words."""
    for part in message.replace("\n", " ").split(". "):
        if "hbm" in part.lower() and ("used" in part.lower() or "exceed" in part.lower()):
            return part.strip()
    return message.splitlines()[0]


def describe(planned: StepPlan, devices: int) -> str:
    """A step in words and figures."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in planned.mesh.items())
    lines = [
        f"{planned.stage}: {planned.batch_size} recordings of up to {planned.seconds:.2f} s, mesh {sizes}",
        f"  per chip     parameters {planned.parameters / GIB:.2f} GiB, optimizer "
        f"{planned.optimizer / GIB:.2f} GiB, batch {planned.batch / GIB:.2f} GiB",
    ]
    if planned.error is not None:
        lines.append(f"  DOES NOT FIT {planned.error}")
    else:
        lines.append(
            f"  fits         activations {planned.activations / GIB:.2f} GiB; peak {planned.peak / GIB:.2f} "
            f"of {planned.hbm / GIB:.0f} GiB"
        )
    model, program = planned.model_flops, planned.program_flops
    lines.append(
        f"  FLOPs        model {model:.4g}, program {program:.4g} ({program / model:.2f} times): the rest is "
        "computed again in the backward pass"
    )
    if planned.error is not None:
        return "\n".join(lines)
    for kind, numbers in sorted(planned.collectives.items()):
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


def _steps(planner: Planner, args: argparse.Namespace) -> Iterator[tuple[StepPlan, StepPlan | None]]:
    """All steps, each with the nearest that fits where it does not."""
    mesh = planner.mesh()
    stages = args.stage or list(planner.stages)
    if args.max_batch:
        for stage in stages:
            yield planner.largest_batch(stage, mesh), None
        return
    work = [
        (stage, bucket, shapes)
        for stage in stages
        for shapes in [planner.shapes(stage, args.batch)]
        for bucket in reversed(shapes.buckets)
    ]
    for stage, bucket, shapes in tqdm(work, desc="compiling", unit="step", dynamic_ncols=True):
        planned = planner.plan(stage, bucket, shapes, mesh)
        yield planned, None if planned.fits else planner.nearest(planned, shapes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.plan_tpu", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="a configuration, such as configs/sparqle.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one key")
    parser.add_argument(
        "--topology", required=True, help="a slice, such as v4-32, v5e-16, v5p-8, v6e-8, tpu7x-8"
    )
    parser.add_argument("--slices", type=int, default=1, help="how many slices train together")
    parser.add_argument("--stage", action="append", choices=["stage1", "stage2"], help="this stage alone")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--batch", type=int, help="batch_size, in place of the configuration's")
    size.add_argument("--max-batch", action="store_true", help="looks for the largest batch_size that fits")
    parser.add_argument("--json", action="store_true", help="prints one JSON object instead of text")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    began = time.monotonic()
    try:
        config = read_config(args.config, args.set)
        devices = topology(args.topology, args.slices)
        planner = Planner(config, args.config.parent / "models", devices)
        for stage in args.stage or []:
            if stage not in planner.stages:
                raise ValueError(f"--stage {stage}: the configuration has none.")
        assumed = sorted({text for stage in planner.stages for text in planner.shapes(stage).assumed})
        chips = len(devices) // planner.chip.devices
        what = f"{args.slices} x {args.topology}" if args.slices > 1 else args.topology
        if not args.json:
            print(f"{args.config} on {what}: {chips} chips, {planner.chip.name}, {config.dtype}")
            for text in assumed:
                print(f"assumed: {text}")
        steps = []
        for planned, instead in _steps(planner, args):
            steps.append({**dataclasses.asdict(planned), "bound": planned.bound, "fits": planned.fits})
            steps[-1]["audio_per_hour"] = planned.audio_per_hour
            if not planned.fits and not args.max_batch:
                steps[-1]["nearest"] = None if instead is None else dataclasses.asdict(instead)
            if not args.json:
                tqdm.write("\n" + describe(planned, len(devices)))
                if not planned.fits and not args.max_batch:
                    nearest = "none was found" if instead is None else "\n" + describe(instead, len(devices))
                    tqdm.write(f"the nearest mesh or batch that fits: {nearest}")
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    fits = all(step["fits"] for step in steps)
    if args.json:
        print(
            json.dumps(
                {"topology": args.topology, "chips": chips, "assumed": assumed, "fits": fits, "steps": steps}
            )
        )
    else:
        print(
            f"\n{'fits' if fits else 'DOES NOT FIT'}. Compiled in {time.monotonic() - began:.0f} s by the TPU "
            "compiler and not run: memory and collectives are the program's, times are what no step can be "
            "faster than, not what one takes."
        )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
