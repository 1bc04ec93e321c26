"""Trains a model: stage 1, stage 2, or one after the other.

    python -m sparqle_jax.train configs/tiny.py --set stage2.optim.lr=1e-4

Everything goes into the folder `run` of the configuration: the configuration itself (config.json), and for
each stage its checkpoints, metrics.jsonl, TensorBoard's files, at its end its scores (results.json) and what
was trained (adapter.safetensors; after stage 2 a model folder for `transcribe` and `evaluate`). The same
command again goes on from the last checkpoint; it ends with the numbers of a run that was never stopped.
"""

import argparse
import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tensorboardX import SummaryWriter

from sparqle_jax import audio, pretrained, prompts
from sparqle_jax.adapters.qformer import QFormer, QFormerConfig
from sparqle_jax.config import Config, OptimConfig, Stage1Config, Stage2Config, StageConfig, read_config
from sparqle_jax.data.dataset import Corpus, CorruptRecord, DataSet
from sparqle_jax.data.frames import keep_frames
from sparqle_jax.data.pipeline import (
    SKIPPED,
    AlignmentExamples,
    Arrays,
    Examples,
    InstructionExamples,
    Waveforms,
    batches,
    check_tasks,
)
from sparqle_jax.data.plan import Batch, Plan, choose_buckets
from sparqle_jax.encoders.hubert import Hubert
from sparqle_jax.evaluate import evaluate, table
from sparqle_jax.llms.decoder import Decoder
from sparqle_jax.model import Aligner, AlignmentHeads, SparQLe, make_projection, partition
from sparqle_jax.transcribe import Listener, ModelSettings, save_model

DATA_HASHES = "data.json"  # in the run's folder: of the data sets that it is trained on


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "trained", "optimizer"], meta_fields=[]
)
@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds: the number of steps done, what trains, and the optimizer's state."""

    step: jax.Array
    trained: nnx.State
    optimizer: optax.OptState


STOPPED = 130  # the exit status after Ctrl-C or SIGTERM: the same command goes on


class Stopped(Exception):
    """Training was asked to stop, and has saved a checkpoint."""


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW as the configuration says, and its learning rate by step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, min(config.warmup_steps, steps - 1), steps, config.final_lr * config.lr
    )

    def is_matrix(trained: nnx.State) -> nnx.State:
        return nnx.map_state(lambda path, variable: variable.replace(path[-1] == "kernel"), trained)

    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=is_matrix),
    )
    return optimizer, schedule


def make_update(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """One step: (TrainState, frozen, batch, key) -> (TrainState, metrics). The TrainState is donated."""

    def update(state: TrainState, frozen: nnx.State, batch: dict, key: jax.Array):
        def loss_of(trained: nnx.State):
            return nnx.merge(graph, trained, frozen).loss(batch, jax.random.fold_in(key, state.step))

        (loss, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"loss": loss, **parts, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, trained, optimizer_state), metrics

    return jax.jit(update, donate_argnums=0)


def train(
    model: nnx.Module,
    examples: Examples,
    plan: Plan,
    config: StageConfig,
    folder: Path,
    *,
    seed: int,
    workers: int,
) -> nnx.Module:
    """The model after `config.steps` steps, from the last checkpoint in `folder` if there is one.

    The model given can't be used any more. Raises Stopped after Ctrl-C or SIGTERM, when it has saved a
    checkpoint, FloatingPointError for a loss or gradient that is not finite (no such step is saved), and
    CorruptRecord.
    """
    graph, trained, frozen = partition(model)
    optimizer, schedule = make_optimizer(config.optim, config.steps)
    state = TrainState(jnp.int32(0), trained, optimizer.init(trained))
    key = jax.random.key(seed)
    keep = ocp.training.preservation_policies.LatestN(2)
    with ocp.training.Checkpointer(
        folder.resolve() / "checkpoints", preservation_policy=keep
    ) as checkpointer:
        if checkpointer.latest is not None:
            state = checkpointer.load(abstract_state=jax.tree.map(_abstract, state))
        start = int(state.step)
        if start == config.steps:
            return nnx.merge(graph, state.trained, frozen)
        updates = _compile(make_update(graph, optimizer), state, frozen, key, examples, plan, folder.name)
        inputs = batches(
            examples,
            plan,
            seed=seed,
            start=start,
            stop=config.steps,
            workers=workers,
            device=jax.devices()[0],
        )
        with _stop_requested() as stop_requested, _Log(folder, start, config.steps) as log:
            for step in range(start + 1, config.steps + 1):
                batch, planned = next(inputs), plan.batch(step - 1)
                skipped = batch.pop(SKIPPED)
                state, metrics = updates[planned.bucket](state, frozen, batch, key)
                log.advance(
                    planned.indices.size * planned.num_samples, plan.num_samples[planned.indices], skipped
                )
                last, stop = step == config.steps, stop_requested()
                write, save = step % config.log_every == 0, step % config.save_every == 0
                if write or save or last or stop:
                    values = {name: float(value) for name, value in metrics.items()}
                    _check_finite(step, values)
                if write or last:
                    log.write(step, values, float(schedule(step - 1)))
                if save or last or stop:
                    checkpointer.save(step, state)
                if stop:
                    raise Stopped(f"{folder.name} stopped at step {step} of {config.steps}")
    return nnx.merge(graph, state.trained, frozen)


def _compile(
    update: Callable,
    state: TrainState,
    frozen: nnx.State,
    key: jax.Array,
    examples: Examples,
    plan: Plan,
    name: str,
) -> list[Callable]:
    """The update for the batches of each bucket. Compiled ahead, so that a batch of another shape is an
    error, and not another minute of compiling; the longest first, so that what does not fit is known soon."""
    began, programs = time.monotonic(), {}
    for batch in reversed(plan.one_of_each()):
        seconds = batch.num_samples / audio.SAMPLE_RATE
        print(
            f"{name}: compiling a step of {len(batch.indices)} recordings of up to {seconds:.2f} s for "
            f"{jax.devices()[0].device_kind} ...",
            flush=True,
        )
        programs[batch.bucket] = update.lower(state, frozen, _arrays(examples, batch), key).compile()
    print(f"{name}: compiled in {time.monotonic() - began:.0f} s", flush=True)
    return [programs[bucket] for bucket in sorted(programs)]


def _arrays(examples: Examples, batch: Batch) -> Arrays:
    arrays = examples.rows(batch, range(len(batch.indices)), 0)
    del arrays[SKIPPED]
    return arrays


def _check_finite(step: int, metrics: dict[str, float]) -> None:
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"the {name} of step {step} is {metrics[name]}. Begin again in another folder (--set run=) "
                "with a smaller learning rate (optim.lr) or a longer warm-up (optim.warmup_steps)."
            )


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Catches Ctrl-C and SIGTERM meanwhile; the function given says whether one has come.

    A second one interrupts at once.
    """
    came = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(*_) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(True)
        print("\nstopping after this step, with a checkpoint ...", file=sys.stderr, flush=True)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Log:
    """The numbers of a run as it goes: progress bar, metrics.jsonl and TensorBoard."""

    def __init__(self, folder: Path, start: int, steps: int):
        self.file = folder / "metrics.jsonl"
        # What a killed run wrote after its last checkpoint is done again; its last line may be half a line.
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        _write_text(self.file, "".join(lines))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm.tqdm(
            total=steps, initial=start, desc=folder.name, unit="step", dynamic_ncols=True, mininterval=0.5
        )
        self.skipped = jnp.int32(json.loads(lines[-1]).get("skipped", 0) if lines else 0)
        self._begin()

    def _begin(self) -> None:
        self.began, self.samples, self.padded = time.monotonic(), 0, 0

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_) -> None:
        self.board.close()
        self.bar.close()

    def advance(self, padded: int, num_samples: np.ndarray, skipped: jax.Array) -> None:
        """Counts a step: samples of its batch with padding, of each recording, and records skipped."""
        self.samples += int(num_samples.sum())
        self.padded += padded
        self.skipped = self.skipped + skipped
        self.bar.update()

    def write(self, step: int, metrics: dict[str, float], lr: float) -> None:
        """The metrics of a step, and of all steps since the last that were written how fast they were."""
        audio_rate = self.samples / audio.SAMPLE_RATE / max(time.monotonic() - self.began, 1e-9)
        values = metrics | {
            "lr": lr,
            "padding": 1 - self.samples / self.padded,
            "audio_seconds_per_second": audio_rate,
        }
        if skipped := int(self.skipped):
            values["skipped"] = skipped
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        shown = {name: f"{value:.3f}" for name, value in metrics.items() if name != "tokens"}
        self.bar.set_postfix(shown | {"audio": f"{audio_rate:.0f}x"}, refresh=False)
        self._begin()


class Run:
    """A run that has been checked whole, up to its first step; `train` trains its stages.

    All that can be wrong with folders, recordings, texts, vocabularies and sizes is found here, and leaves no
    trace: FileNotFoundError and ValueError say what to change.
    """

    def __init__(self, config: Config):
        self.config = config
        corpus = Corpus([DataSet(one.folder) for one in config.data.train.values()])
        _check_folder(config, corpus)
        rngs = nnx.Rngs(config.seed)
        dtype = jnp.dtype(config.dtype)
        self.extractor = audio.FeatureExtractor.from_folder(config.encoder)
        encoder = pretrained.load_hubert(config.encoder, dtype=dtype)
        speech = self._waveforms(corpus, encoder)
        self.tests = {name: DataSet(folder) for name, folder in config.data.test.items()}
        test_speech = {name: self._waveforms(Corpus([test]), encoder) for name, test in self.tests.items()}
        options: dict[str, Any] = dict(
            max_tokens=config.data.max_text_tokens, skip_corrupt=config.data.skip_corrupt
        )
        self.aligner = self.model = None
        examples: list[AlignmentExamples | InstructionExamples] = []
        if config.stage1 is not None:
            tokenizer = prompts.load_tokenizer(config.adapter.tokenizer)
            self.aligner = _make_aligner(config, encoder, tokenizer, rngs)
            vocab_size = self.aligner.adapter.config.vocab_size
            self.plan1 = _make_plan(config, corpus, config.stage1)
            self.alignment = AlignmentExamples(corpus, speech, tokenizer, vocab_size, self.plan1, **options)
            self.alignment_tests = {
                name: _test_alignment(waveforms, tokenizer, vocab_size, config.stage1.batch_size, **options)
                for name, waveforms in test_speech.items()
            }
            _try(self.aligner, self.alignment, self.plan1)
            examples.append(self.alignment)
        if config.stage2 is not None:
            self.llm = pretrained.load_decoder(config.llm, dtype=dtype)
            vocab_size = self.llm.config.vocab_size
            self.prompter = prompts.Prompter.from_folder(config.llm, vocab_size)
            self.plan2 = _make_plan(config, corpus, config.stage2)
            tasks = [one.tasks or config.stage2.tasks for one in config.data.train.values()]
            self.instruction = InstructionExamples(
                corpus, speech, self.prompter, vocab_size, tasks, self.plan2, **options
            )
            for test in self.tests.values():
                check_tasks(test, config.test_languages)
            if self.aligner is None:
                self.model = _make_sparqle(config, encoder, self.llm, rngs)
            else:
                self.model = SparQLe.from_aligner(self.aligner, self.llm, rngs=rngs)
            _try(self.model, self.instruction, self.plan2)
            examples.append(self.instruction)
        if config.data.frames is not None:
            frames = keep_frames(config.data.frames, speech, encoder)
            for one in examples:
                one.speech = frames
        _claim_folder(config, corpus)

    def _waveforms(self, corpus: Corpus, encoder: Hubert) -> Waveforms:
        shortest = encoder.config.min_samples
        return Waveforms(corpus, self.extractor, self.config.data.max_seconds, min_samples=shortest)

    def train(self) -> dict[str, Any]:
        """Trains what is not trained yet, and returns the scores by stage. Raises as the function `train`."""
        results = {}
        if self.aligner is not None:
            results["stage1"] = self._train_stage1(self.config.stage1)
        if self.model is not None:
            results["stage2"] = self._train_stage2(self.config.stage2)
        return results

    def _run(
        self, model: nnx.Module, examples: Examples, plan: Plan, stage: StageConfig, folder: Path
    ) -> nnx.Module:
        workers = self.config.data.workers
        return train(model, examples, plan, stage, folder, seed=self.config.seed, workers=workers)

    def _train_stage1(self, stage: Stage1Config) -> dict[str, Any]:
        folder = _stage_folder(self.config, "stage1")
        self.aligner = self._run(self.aligner, self.alignment, self.plan1, stage, folder)
        pretrained.save_published(self.aligner, folder / "adapter.safetensors")
        if not stage.evaluate:
            return {}
        return _once(
            folder / "results.json",
            lambda: _evaluate_losses(self.aligner, self.alignment_tests),
        )

    def _train_stage2(self, stage: Stage2Config) -> dict[str, Any]:
        config, folder = self.config, _stage_folder(self.config, "stage2")
        if self.aligner is not None:
            self.model = SparQLe.from_aligner(self.aligner, self.llm, rngs=nnx.Rngs(config.seed))
        self.model = self._run(self.model, self.instruction, self.plan2, stage, folder)
        settings = ModelSettings(
            encoder=config.encoder,
            llm=config.llm,
            max_seconds=config.data.max_seconds,
            max_new_tokens=config.max_new_tokens,
            dtype=config.dtype,
        )
        save_model(self.model, folder, settings)
        if not stage.evaluate:
            return {}
        listener = Listener(self.model, self.prompter, self.extractor, settings)
        return _once(
            folder / "results.json",
            lambda: _evaluate_answers(listener, self.tests, config.test_languages),
        )


def _make_plan(config: Config, corpus: Corpus, stage: StageConfig) -> Plan:
    buckets = config.data.buckets
    lengths = (
        choose_buckets(corpus.num_samples, buckets)
        if isinstance(buckets, int)
        else [round(seconds * audio.SAMPLE_RATE) for seconds in buckets]
    )
    weights = [one.weight for one in config.data.train.values() if one.weight is not None]
    plan = Plan(
        corpus.num_samples,
        lengths,
        stage.batch_size,
        seed=config.seed,
        multiple=config.data.batch_multiple,
        sizes=corpus.sizes,
        weights=weights or None,
    )
    if len(plan.buckets) < len(lengths):
        print(
            f"{len(plan.buckets)} buckets instead of {len(lengths)}: an epoch has too few examples for more "
            f"({plan.batches_per_epoch} batches of {stage.batch_size} and up)."
        )
    return plan


def _test_alignment(
    waveforms: Waveforms, tokenizer: Any, vocab_size: int, batch_size: int, **options: Any
) -> tuple[AlignmentExamples, Plan]:
    """A data set to evaluate stage 1 on, all of one length."""
    lengths = waveforms.corpus.num_samples
    plan = Plan(lengths, choose_buckets(lengths, 1), min(batch_size, len(lengths)), seed=0)
    return AlignmentExamples(waveforms.corpus, waveforms, tokenizer, vocab_size, plan, **options), plan


def _try(model: Aligner | SparQLe, examples: Examples, plan: Plan) -> None:
    """Traces the loss of a batch of the longest recordings, without running it: sizes that do not fit raise
    ValueError here."""
    batch = _arrays(examples, plan.one_of_each()[-1])
    graph, state = nnx.split(model)
    jax.eval_shape(lambda state, key: nnx.merge(graph, state).loss(batch, key), state, jax.random.key(0))


def _check_folder(config: Config, corpus: Corpus) -> None:
    """Raises ValueError when the run's folder holds a run of another configuration, or on other data."""
    file = config.run / "config.json"
    if not file.is_file():
        return
    there, wanted = json.loads(file.read_text()), config.model_dump(mode="json")
    there["run"] = wanted["run"]  # a folder may be moved
    differences = _differences(there, wanted)
    if json.loads((config.run / DATA_HASHES).read_text()) != _data_hashes(corpus):
        differences.append("what is in data.train")
    if differences:
        raise ValueError(
            f"{config.run} holds another run (other: {', '.join(differences)}): choose another folder with "
            "--set run=FOLDER, or delete that one."
        )


def _claim_folder(config: Config, corpus: Corpus) -> None:
    config.run.mkdir(parents=True, exist_ok=True)
    if not (config.run / "config.json").is_file():
        _write_text(config.run / DATA_HASHES, json.dumps(_data_hashes(corpus)) + "\n")
        _write_text(config.run / "config.json", config.model_dump_json(indent=2) + "\n")


def _data_hashes(corpus: Corpus) -> list[str]:
    return [data_set.fingerprint for data_set in corpus.data_sets]


def _write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all: whoever is stopped while writing leaves the old one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)


def _differences(a: Any, b: Any, key: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for k in sorted(a.keys() | b.keys()) for d in _differences(a.get(k), b.get(k), f"{key}.{k}")
        ]
    return [] if a == b else [key.removeprefix(".")]


def _stage_folder(config: Config, name: str) -> Path:
    folder = config.run / name
    folder.mkdir(exist_ok=True)
    return folder


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, kept in a JSON file from the first time on."""
    if not file.is_file():
        _write_text(file, json.dumps(make(), indent=1) + "\n")
    return json.loads(file.read_text())


def _make_aligner(config: Config, encoder: Hubert, tokenizer: Any, rngs: nnx.Rngs) -> Aligner:
    start, sizes, dtype = config.adapter.start, dict(config.adapter.sizes), jnp.dtype(config.dtype)
    if start is not None and not start.is_dir():
        return pretrained.load_aligner(start, encoder, dtype=dtype, losses=config.stage1.losses, **sizes)
    sizes["encoder_width"] = encoder.config.hidden_size
    if start is not None:
        adapter = pretrained.qformer_from_bert(start, dtype=dtype, rngs=rngs, **sizes)
    else:
        words = max(tokenizer.get_vocab().values()) + 1
        adapter = QFormer(
            QFormerConfig(**sizes, vocab_size=words + 1, bos_token_id=words), dtype=dtype, rngs=rngs
        )
    heads = AlignmentHeads(adapter.config.hidden_size, config.adapter.features, dtype=dtype, rngs=rngs)
    return Aligner(encoder, adapter, heads, losses=config.stage1.losses)


def _make_sparqle(config: Config, encoder: Hubert, llm: Decoder, rngs: nnx.Rngs) -> SparQLe:
    start, sizes, dtype = config.adapter.start, dict(config.adapter.sizes), jnp.dtype(config.dtype)
    if start is not None and not start.is_dir():
        return pretrained.load_sparqle(start, encoder, llm, dtype=dtype, rngs=rngs, **sizes)
    sizes.update(encoder_width=encoder.config.hidden_size, text=False)
    if start is not None:
        adapter = pretrained.qformer_from_bert(start, dtype=dtype, rngs=rngs, **sizes)
    else:
        adapter = QFormer(QFormerConfig(**sizes), dtype=dtype, rngs=rngs)
    projection = make_projection(adapter.config.hidden_size, llm.config.hidden_size, dtype=dtype, rngs=rngs)
    return SparQLe(encoder, adapter, projection, llm)


def _evaluate_losses(
    aligner: Aligner, tests: dict[str, tuple[AlignmentExamples, Plan]]
) -> dict[str, dict[str, float]]:
    """The mean of each loss on each data set, over its whole batches."""
    graph, state = nnx.split(aligner)
    loss_of = jax.jit(lambda state, batch, key: nnx.merge(graph, state).loss(batch, key, train=False)[1])
    results = {}
    for name, (examples, plan) in tests.items():
        number = plan.batches_per_epoch
        inputs = batches(examples, plan, seed=0, stop=number)
        bar = tqdm.trange(number, desc=f"evaluate stage 1: {name}", unit="batch")
        parts = [loss_of(state, next(inputs), jax.random.key(step)) for step in bar]
        results[name] = {key: float(sum(part[key] for part in parts)) / number for key in parts[0]}
    return results


def _evaluate_answers(
    listener: Listener, tests: dict[str, DataSet], languages: tuple[str, ...]
) -> dict[str, Any]:
    results = {name: evaluate(listener, test, languages)[0] for name, test in tests.items()}
    if results:
        print(table(results))
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.train", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="a configuration, such as configs/tiny.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one key")
    args = parser.parse_args(argv)
    try:
        run = Run(read_config(args.config, args.set))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return STOPPED
    try:
        run.train()
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"{str(stopped) or 'stopped'}; the same command goes on from there.", file=sys.stderr)
        return STOPPED
    except (FloatingPointError, CorruptRecord) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"done: {run.config.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
