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
import itertools
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
import optax
import tqdm
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tensorboardX import SummaryWriter
from transformers import AutoTokenizer

from sparqle_jax import audio, pretrained, prompts
from sparqle_jax.adapters.qformer import QFormer, QFormerConfig
from sparqle_jax.config import Config, OptimConfig, StageConfig, read_config
from sparqle_jax.data.frames import keep_frames
from sparqle_jax.data.manifest import Utterance, read_manifest
from sparqle_jax.data.pipeline import (
    TRANSCRIBE,
    AlignmentExamples,
    Examples,
    InstructionExamples,
    Waveforms,
    answer_of,
    batches,
)
from sparqle_jax.encoders.hubert import Hubert
from sparqle_jax.evaluate import evaluate, table
from sparqle_jax.llms.decoder import Decoder
from sparqle_jax.model import Aligner, AlignmentHeads, SparQLe, make_projection, partition
from sparqle_jax.transcribe import Listener, save_model


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "trained", "optimizer"], meta_fields=[]
)
@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds: the number of steps done, what trains, and the optimizer's state."""

    step: jax.Array
    trained: nnx.State
    optimizer: optax.OptState


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


def train(model: nnx.Module, examples: Examples, config: StageConfig, folder: Path, seed: int) -> nnx.Module:
    """The model after `config.steps` steps, from the last checkpoint in `folder` if there is one.

    Raises Stopped after Ctrl-C or SIGTERM, when it has saved a checkpoint, and FloatingPointError for a loss
    that is not finite.
    """
    graph, trained, frozen = partition(model)
    optimizer, schedule = make_optimizer(config.optim, config.steps)
    state = TrainState(jnp.int32(0), trained, optimizer.init(trained))
    key = jax.random.key(seed)
    keep = ocp.training.preservation_policies.LatestN(2)
    with (
        ocp.training.Checkpointer(folder.resolve() / "checkpoints", preservation_policy=keep) as checkpointer,
        _stop_requested() as stop_requested,
    ):
        if checkpointer.latest is not None:
            state = checkpointer.load(abstract_state=jax.tree.map(_abstract, state))
        start = int(state.step)
        if start == config.steps:
            return nnx.merge(graph, state.trained, frozen)
        inputs = batches(examples, config.batch_size, seed=seed, start=start)
        batch = next(inputs)
        print(f"{folder.name}: compiling one step ...", flush=True)
        began = time.monotonic()
        # Compiled ahead, so that a batch of another shape is an error, and not another minute of compiling.
        update = make_update(graph, optimizer).lower(state, frozen, batch, key).compile()
        print(f"{folder.name}: compiled in {time.monotonic() - began:.0f} s", flush=True)
        with _Log(folder, start, config.steps) as log:
            for step in range(start + 1, config.steps + 1):
                state, metrics = update(state, frozen, batch, key)
                if step % config.log_every == 0 or step == config.steps:
                    log.write(
                        step, {k: float(v) for k, v in metrics.items()}, float(schedule(step - 1)), batch
                    )
                stop = stop_requested()
                if step % config.save_every == 0 or step == config.steps or stop:
                    checkpointer.save(step, state)
                if stop:
                    raise Stopped(f"{folder.name} stopped at step {step} of {config.steps}")
                if step < config.steps:
                    batch = next(inputs)
                log.advance()
    return nnx.merge(graph, state.trained, frozen)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Catches Ctrl-C and SIGTERM meanwhile; the function given says whether one has come."""
    came = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: came.append(True)) for number in numbers]
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Log:
    """The numbers of a run as it goes: progress bar, metrics.jsonl and TensorBoard."""

    def __init__(self, folder: Path, start: int, steps: int):
        self.file = folder / "metrics.jsonl"
        # What a killed run wrote after its last checkpoint is done again.
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.file.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm.tqdm(
            total=steps, initial=start, desc=folder.name, unit="step", dynamic_ncols=True, mininterval=0.5
        )
        self.last = (start, time.monotonic())

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_) -> None:
        self.board.close()
        self.bar.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, step: int, metrics: dict[str, float], lr: float, batch: dict) -> None:
        """Raises FloatingPointError for a loss that is not finite."""
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the loss of step {step} is {metrics['loss']}: a smaller learning rate (optim.lr) or a "
                "longer warm-up (optim.warmup_steps) may help; the checkpoints before it are there."
            )
        last_step, last_time = self.last
        self.last = (step, time.monotonic())
        per_second = (step - last_step) / max(self.last[1] - last_time, 1e-9)
        seconds = (
            float(batch["frames_mask"].sum()) * audio.FRAME_SECONDS
            if "frames" in batch
            else float(batch["waveform_mask"].sum()) / audio.SAMPLE_RATE
        )
        values = metrics | {"lr": lr, "audio_seconds_per_second": seconds * per_second}
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        shown = {name: f"{value:.3f}" for name, value in metrics.items() if name != "tokens"}
        self.bar.set_postfix(shown | {"audio": f"{seconds * per_second:.0f}x"}, refresh=False)


def run(config: Config) -> dict[str, Any]:
    """Trains all stages of a configuration and returns their scores; see the module.

    All that can be wrong with folders, sizes, texts and vocabularies is found before the first step, and
    leaves no trace: FileNotFoundError and ValueError say what to change. Raises Stopped as `train` does.
    """
    _check_folder(config)
    rngs = nnx.Rngs(config.seed)
    dtype = jnp.dtype(config.dtype)
    extractor = audio.FeatureExtractor.from_folder(config.encoder)
    encoder = pretrained.load_hubert(config.encoder, dtype=dtype)
    utterances = read_manifest(config.data.train)
    tests = {name: read_manifest(folder) for name, folder in config.data.test.items()}
    waveforms = Waveforms(utterances, extractor, config.data.max_seconds)
    test_waveforms = {
        name: Waveforms(test, extractor, config.data.max_seconds) for name, test in tests.items()
    }
    aligner = alignment = instruction = None
    if config.stage1 is not None:
        tokenizer = AutoTokenizer.from_pretrained(config.adapter.tokenizer)
        aligner = _make_aligner(config, encoder, tokenizer, rngs)
        vocab_size = aligner.adapter.config.vocab_size
        alignment = AlignmentExamples(utterances, waveforms, tokenizer, vocab_size)
        alignment_tests = {
            name: AlignmentExamples(test, test_waveforms[name], tokenizer, vocab_size)
            for name, test in tests.items()
        }
        _try(aligner, alignment, config.stage1.batch_size)
    if config.stage2 is not None:
        llm = pretrained.load_decoder(config.llm, dtype=dtype)
        vocab_size = llm.config.vocab_size
        prompter = prompts.Prompter.from_folder(config.llm, vocab_size)
        instruction = InstructionExamples(utterances, waveforms, prompter, vocab_size, config.stage2.tasks)
        for task in (TRANSCRIBE, *config.test_languages):
            for utterance in itertools.chain(*tests.values()):
                answer_of(utterance, task)
        model = (
            _make_sparqle(config, encoder, llm, rngs)
            if aligner is None
            else SparQLe.from_aligner(aligner, llm, rngs=rngs)
        )
        _try(model, instruction, config.stage2.batch_size)
    if config.data.frames is not None:
        frames = keep_frames(config.data.frames, waveforms, encoder)
        for examples in (alignment, instruction):
            if examples is not None:
                examples.speech = frames

    _claim_folder(config)
    results = {}
    if aligner is not None:
        folder = _stage_folder(config, "stage1")
        aligner = train(aligner, alignment, config.stage1, folder, config.seed)
        pretrained.save_published(aligner, folder / "adapter.safetensors")
        results["stage1"] = _once(
            folder / "results.json",
            lambda: (
                _evaluate_losses(aligner, alignment_tests, config.stage1.batch_size)
                if config.stage1.evaluate
                else {}
            ),
        )
    if config.stage2 is not None:
        folder = _stage_folder(config, "stage2")
        if aligner is not None:
            model = SparQLe.from_aligner(aligner, llm, rngs=nnx.Rngs(config.seed))
        model = train(model, instruction, config.stage2, folder, config.seed)
        save_model(model, folder, encoder=config.encoder, llm=config.llm, max_seconds=config.data.max_seconds)
        listener = Listener(model, prompter, extractor, max_seconds=config.data.max_seconds)
        results["stage2"] = _once(
            folder / "results.json",
            lambda: (
                _evaluate_answers(listener, tests, config.test_languages) if config.stage2.evaluate else {}
            ),
        )
    return results


def _try(model: Aligner | SparQLe, examples: Examples, batch_size: int) -> None:
    """Traces the loss of a first batch, without running it: sizes that do not fit raise ValueError here."""
    batch = next(batches(examples, batch_size, seed=0))
    graph, state = nnx.split(model)
    jax.eval_shape(lambda state, key: nnx.merge(graph, state).loss(batch, key), state, jax.random.key(0))


def _check_folder(config: Config) -> None:
    """Raises ValueError when the run's folder holds a run with another configuration."""
    file = config.run / "config.json"
    if file.is_file():
        differences = _differences(json.loads(file.read_text()), config.model_dump(mode="json"))
        if differences:
            raise ValueError(
                f"{config.run} holds a run with another configuration (other: {', '.join(differences)}): "
                "choose another folder with --set run=FOLDER, or delete that one."
            )


def _claim_folder(config: Config) -> None:
    config.run.mkdir(parents=True, exist_ok=True)
    (config.run / "config.json").write_text(config.model_dump_json(indent=2) + "\n")


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
        file.write_text(json.dumps(make(), indent=1) + "\n")
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
            _qformer_config(sizes, vocab_size=words + 1, bos_token_id=words), dtype=dtype, rngs=rngs
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
        adapter = QFormer(_qformer_config(sizes), dtype=dtype, rngs=rngs)
    projection = make_projection(adapter.config.hidden_size, llm.config.hidden_size, dtype=dtype, rngs=rngs)
    return SparQLe(encoder, adapter, projection, llm)


def _qformer_config(sizes: dict[str, Any], **values) -> QFormerConfig:
    names = {field.name for field in dataclasses.fields(QFormerConfig)}
    if unknown := sizes.keys() - names:
        raise ValueError(f"adapter.sizes has unknown keys {sorted(unknown)}; valid: {sorted(names)}.")
    return QFormerConfig(**sizes, **values)


def _evaluate_losses(
    aligner: Aligner, tests: dict[str, AlignmentExamples], batch_size: int
) -> dict[str, dict[str, float]]:
    """The mean of each loss on each data set, over its whole batches."""
    graph, state = nnx.split(aligner)
    loss_of = jax.jit(lambda state, batch, key: nnx.merge(graph, state).loss(batch, key, train=False)[1])
    results = {}
    for name, examples in tests.items():
        size = min(batch_size, len(examples))
        inputs = batches(examples, size, seed=0)
        number = len(examples) // size
        bar = tqdm.trange(number, desc=f"evaluate stage 1: {name}", unit="batch")
        parts = [loss_of(state, next(inputs), jax.random.key(step)) for step in bar]
        results[name] = {key: float(sum(part[key] for part in parts)) / number for key in parts[0]}
    return results


def _evaluate_answers(
    listener: Listener, tests: dict[str, list[Utterance]], languages: tuple[str, ...]
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
        config = read_config(args.config, args.set)
        run(config)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"{str(stopped) or 'stopped'}; the same command goes on from there.", file=sys.stderr)
        return 130
    print(f"done: {config.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
