"""Trains a model: stage 1, stage 2, or one after the other.

    python -m sparqle_jax.train configs/tiny.py --set stage2.optim.lr=1e-4
    python -m sparqle_jax.train configs/sparqle.py --set run=gs://bucket/run --distributed   # on every host

Everything goes into the folder `run` of the configuration: the configuration itself (config.json), and for
each stage its checkpoints, metrics.jsonl, TensorBoard's files, at its end its scores (results.json) and what
was trained (adapter.safetensors; after stage 2 a model folder for `transcribe` and `evaluate`). The same
command again goes on from the last checkpoint; it ends with the numbers of a run that was never stopped.

Exit status: 0 done; 130 stopped by Ctrl-C and 143 by SIGTERM, with a checkpoint; 2 a mistake in the
configuration, or a folder that another command trains into; 3 training can't go on: the numbers, the data or
the disk are at fault, not the machine.
"""

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from sparqle_jax import (
    assemble,
    audio,
    commands,
    hosts,
    loop,
    pretrained,
    prompts,
    quiet,
    run_folder,
    stages,
    tensors,
)
from sparqle_jax.aligner import Aligner
from sparqle_jax.checkpoint import CheckpointError, check_room
from sparqle_jax.config import Config, StageConfig, read_config
from sparqle_jax.data.dataset import Corpus, CorruptRecord, DataSet, overlap_line
from sparqle_jax.data.frames import keep_frames
from sparqle_jax.data.pipeline import SKIPPED, AlignmentExamples, InstructionExamples, Waveforms
from sparqle_jax.data.plan import BatchPlan
from sparqle_jax.evaluate import evaluate
from sparqle_jax.loop import HostFailed, Stopped
from sparqle_jax.metrics import Validation
from sparqle_jax.model import SpeechLLM, min_samples, partition
from sparqle_jax.scores import silence_line, table, without_speech
from sparqle_jax.sharding import batch_parts, make_mesh
from sparqle_jax.sparqle import ModelConfig, SparQLe, Tower
from sparqle_jax.start import Start, lines
from sparqle_jax.step import make_optimizer
from sparqle_jax.tasks import TRANSCRIBE, check_tasks, have_any

FAILED = 3  # the exit status when it is no use to try again


class Run:
    """A run that has been checked whole, up to its first step; `train` trains its stages.

    All that can be wrong with devices, folders, recordings, texts, vocabularies and sizes is found here, and
    leaves no trace: FileNotFoundError and ValueError say what to change. All hosts make one together.
    """

    def __init__(self, config: Config):
        self.start = None
        if config.start is not None:
            self.start, stage = run_folder.find_start(config)
            if stage == "stage2" and config.stage1 is not None:
                hosts.print_once(f"stage1: left out, start={config.start} is after it")
                config = config.model_copy(update={"stage1": None})
        self.config = config
        self.mesh = make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.model))
        if config.data.frames is not None and jax.process_count() > 1:
            raise ValueError("data.frames are made by one host, and there are several: set it to null.")
        corpus = Corpus([DataSet(one.folder) for one in config.data.train.values()])
        self.identity: dict[str, Any] = {
            "config": run_folder.frozen_keys(config.model_dump(mode="json")),
            "data": [data_set.fingerprint for data_set in corpus.data_sets],
        }
        run_folder.check_owner(config.run)
        run_folder.check_folder(config.run, self.identity)
        run_folder.check_writable(config.run)
        rngs = nnx.Rngs(config.seed)
        dtype = jnp.dtype(config.dtype)
        self.parts = assemble.parts_of(config)
        self._check_window()
        encoder = assemble.load_encoder(config.encoder.folder, self.parts, dtype=dtype, mesh=self.mesh)
        self.identity["encoder"] = run_folder.tower_identity(config.encoder.folder, encoder)
        speech = self._waveforms(corpus, encoder)
        self.valid_sets = {name: DataSet(folder) for name, folder in config.data.valid.items()}
        for name, test in self.valid_sets.items():
            shared = overlap_line(test.overlap(corpus.data_sets), len(test))
            hosts.print_once(f"data.valid.{name}: {shared}")
        test_speech = {
            name: self._waveforms(Corpus([test]), encoder) for name, test in self.valid_sets.items()
        }
        self.aligner = self.model = None
        self.stages: list[stages.Stage] = []
        if config.stage1 is not None:
            self._prepare_stage1(encoder, speech, test_speech, rngs)
        if config.stage2 is not None:
            self._prepare_stage2(encoder, speech, test_speech, rngs)
        if (start := config.init_from) is not None:
            self.identity["init_from"] = {"hash": tensors.hash_of(start), "path": str(start)}
        if self.start is not None:
            self.identity["start"] = self._begin_from(self.start)
        elif config.start is not None:
            self.identity["start"] = run_folder.read_identity(config.run)["start"]
        run_folder.check_folder(config.run, self.identity)
        for stage in self.stages:
            self._say_costs(stage)
        self.release = run_folder.claim_folder(config, self.identity)
        try:
            # Another command may have begun meanwhile.
            run_folder.check_folder(config.run, self.identity)
            if config.data.frames is not None:
                frames = keep_frames(config.data.frames, speech, encoder)
                for stage in self.stages:
                    stage.examples.speech = frames
        except BaseException:
            self.release()
            raise

    def _prepare_stage1(
        self, encoder: nnx.Module, speech: Waveforms, test_speech: dict[str, Waveforms], rngs: nnx.Rngs
    ) -> None:
        config = self.config
        tokenizer = prompts.load_tokenizer(config.stage1.tokenizer)
        self.identity["stage1.tokenizer"] = prompts.fingerprint(tokenizer)
        words = max(tokenizer.get_vocab().values()) + 1
        # One more token begins a text to generate.
        self.aligner = assemble.new_aligner(config, encoder, words + 1, self.mesh, rngs)
        vocab_size, options = self.aligner.adapter.vocab_size, self._text_options()

        def aligned(speech: Waveforms, plan: BatchPlan) -> AlignmentExamples:
            return AlignmentExamples(speech.corpus, speech, tokenizer, vocab_size, plan, **options)

        self._add_stage("stage1", config.stage1, speech, test_speech, aligned)
        _dry_run(self.aligner, self.stages[-1])

    def _prepare_stage2(
        self, encoder: nnx.Module, speech: Waveforms, test_speech: dict[str, Waveforms], rngs: nnx.Rngs
    ) -> None:
        config = self.config
        dtype, remat = jnp.dtype(config.dtype), config.stage2.remat
        self.llm = pretrained.load_llm(config.llm, dtype=dtype, mesh=self.mesh, remat=remat)
        self.identity["llm"] = run_folder.tower_identity(config.llm, self.llm)
        vocab_size, options = self.llm.config.vocab_size, self._text_options()
        self.prompter = prompts.Prompter.from_folder(config.llm, vocab_size)
        self.identity["llm tokenizer and template"] = prompts.fingerprint(self.prompter.tokenizer)
        tasks, corpus = stages.tasks_of_sets(config), speech.corpus

        def instructed(speech: Waveforms, plan: BatchPlan) -> InstructionExamples:
            training = speech.corpus is corpus
            some = tasks if training else [stages.tasks_of(speech.corpus, config.stage2.tasks)]
            return InstructionExamples(
                speech.corpus, speech, self.prompter, vocab_size, some, plan, **options
            )

        self._add_stage("stage2", config.stage2, speech, test_speech, instructed)
        for test in self.valid_sets.values():
            check_tasks(test, config.eval_languages)
        if self.aligner is None:
            self.model = assemble.new_speech_llm(config, encoder, self.llm, self.mesh, rngs)
        else:
            self.model = self._stage2_model(rngs)
        _dry_run(self.model, self.stages[-1])

    def _text_options(self) -> dict[str, Any]:
        data = self.config.data
        return {"max_tokens": data.max_text_tokens, "skip_corrupt": data.skip_corrupt}

    def _say_costs(self, stage: stages.Stage) -> None:
        """Prints what a stage is trained on, of what, for how long, and what it writes.

        Raises ValueError when the disk has no room for its checkpoints.
        """
        model = self.aligner if stage.name == "stage1" else self.model
        _, trained, frozen = partition(model)
        config, plan = stage.config, stage.plan
        optimizer, _ = make_optimizer(config.optim, config.steps)
        state = jax.tree.leaves((trained, jax.eval_shape(optimizer.init, trained)))
        size = sum(x.size * x.dtype.itemsize for x in state)
        hours, epochs = plan.total_samples / audio.SAMPLE_RATE / 3600, config.steps / plan.batches_per_epoch
        train, rest = (sum(x.size for x in jax.tree.leaves(part)) / 1e6 for part in (trained, frozen))
        folder = self.config.run / stage.name
        hosts.print_once(
            f"{stage.name}: {config.steps} steps on {jax.device_count()} x {jax.devices()[0].device_kind}, "
            f"{epochs:.3g} epochs of {hours:.3g} h; {train:.4g} million parameters train, {rest:.4g} million "
            f"are frozen; into {folder}, with up to {config.keep + 1} checkpoints of {size / 1e6:.4g} MB"
        )
        check_room(folder / "checkpoints", size, config.keep + 1)

    def _begin_from(self, start: Start) -> dict[str, Any]:
        """Says how this run differs from the one that it starts from, and returns it for the identity.

        Raises ValueError for another model, and for no steps that are left.
        """
        stage = next(stage for stage in self.stages if stage.name == start.stage)
        if stage.config.steps <= start.step:
            raise ValueError(
                f"start={start.text} has done {start.step} steps of {start.stage}, and {start.stage}.steps="
                f"{stage.config.steps} are wanted in all: set more, or start from an earlier step."
            )
        ancestry = start.ancestry(self.identity)
        hosts.print_once("\n".join(["starts from:", *(f"  {line}" for line in lines(ancestry))]))
        return ancestry

    def _check_window(self) -> None:
        """Raises ValueError for recordings longer than the encoder hears at once."""
        _, encoder = pretrained.encoder_config(self.config.encoder.folder)
        most, seconds = encoder.max_samples, self.config.data.max_seconds
        if most is not None and round(seconds * audio.SAMPLE_RATE) > most:
            raise ValueError(
                f"data.max_seconds={seconds:g} is more than the {most / audio.SAMPLE_RATE:g} s that the "
                f"encoder in {self.config.encoder.folder} hears at once: set data.max_seconds to that, and "
                "prepare the data with --max-seconds."
            )

    def _waveforms(self, corpus: Corpus, encoder: nnx.Module) -> Waveforms:
        shortest = min_samples(encoder.config, self.parts.adapter)
        return Waveforms(corpus, self.config.data.max_seconds, min_samples=shortest)

    def _add_stage(
        self,
        name: str,
        config: StageConfig,
        speech: Waveforms,
        test_speech: dict[str, Waveforms],
        make_examples: Callable[[Waveforms, BatchPlan], AlignmentExamples | InstructionExamples],
    ) -> None:
        plan = stages.make_plan(self.config, speech.corpus, config)
        stages.say_counts(self.config, speech.corpus, name, config)
        parts = batch_parts(self.mesh)
        needed = parts * config.accumulate
        for bucket in plan.buckets:
            if bucket.batch_size % needed:
                raise ValueError(
                    f"{name}: batches of {bucket.batch_size} can't be split into {needed} equal parts "
                    f"(mesh.data * mesh.fsdp = {parts}, times accumulate): make batch_size and "
                    f"data.batch_multiple multiples of {needed}, or choose another mesh."
                )
        tests = {}
        for test, waveforms in test_speech.items():
            (data_set,) = waveforms.corpus.data_sets
            tasks = None if name == "stage1" else stages.tasks_of(waveforms.corpus, config.tasks)
            used = data_set.has_speech if tasks is None else have_any(data_set, tasks)
            if not used.any():
                hosts.print_once(f"{name}: in data.valid.{test} nobody speaks: it has no part in the loss.")
                continue
            test_plan = stages.test_plan(waveforms, used, config.batch_size, parts, test)
            tests[test] = (make_examples(waveforms, test_plan), test_plan)
        self.stages.append(stages.Stage(name, config, make_examples(speech, plan), plan, tests))

    def train(self, profile: int = 0) -> dict[str, Any]:
        """Trains what is not trained yet, and returns the scores by stage. Raises as the function `train`."""
        train_stage = {"stage1": self._train_stage1, "stage2": self._train_stage2}
        return {stage.name: train_stage[stage.name](stage, profile) for stage in self.stages}

    def _stage2_model(self, rngs: nnx.Rngs) -> SpeechLLM:
        """Stage 2 on what stage 1 has trained."""
        lora = self.config.stage2.lora
        return assemble.from_aligner(self.aligner, self.llm, lora_config=lora, rngs=rngs)

    def _run(self, model: nnx.Module, stage: stages.Stage, folder: epath.Path, profile: int) -> nnx.Module:
        config = self.config
        return loop.train(
            model,
            stage,
            folder,
            self.mesh,
            seed=config.seed,
            identity=self.identity,
            start_from=self.start if self.start is not None and self.start.stage == stage.name else None,
            workers=config.data.workers,
            profile=profile,
        )

    def _train_stage1(self, stage: stages.Stage, profile: int) -> dict[str, Any]:
        folder = run_folder.stage_folder(self.config, stage.name)
        self.aligner = self._run(self.aligner, stage, folder, profile)
        assemble.save(self.aligner, folder / "adapter.safetensors")
        if not stage.config.evaluate:
            return {}
        graph, trained, frozen = partition(self.aligner)
        return _cached_json(
            folder / "results.json", lambda: Validation(graph, stage.valid_sets, self.mesh)(trained, frozen)
        )

    def _train_stage2(self, stage: stages.Stage, profile: int) -> dict[str, Any]:
        config, folder = self.config, run_folder.stage_folder(self.config, stage.name)
        if self.aligner is not None:
            self.model = self._stage2_model(nnx.Rngs(config.seed))
        self.model = self._run(self.model, stage, folder, profile)
        settings = ModelConfig(
            encoder=Tower.of(config.encoder.folder),
            llm=Tower.of(config.llm),
            max_seconds=config.data.max_seconds,
            max_new_tokens=config.max_new_tokens,
            speech_pad=config.speech_pad,
            dtype=config.dtype,
            ancestry=tuple(lines(self.identity.get("start"))),
            trained_on=tuple(str(epath.Path(one.folder).resolve()) for one in config.data.train.values()),
        )
        sparqle = SparQLe(self.model, self.prompter, settings, self.mesh)
        sparqle.save_pretrained(folder)
        if not stage.config.evaluate:
            return {}
        return _cached_json(
            folder / "results.json",
            lambda: _evaluate_answers(sparqle, self.valid_sets, config.eval_languages),
        )


def _check_devices() -> None:
    """Raises ValueError where training would be on the CPU of a machine with accelerators, unasked."""
    there = quiet.accelerators()
    if jax.default_backend() != "cpu" or "cpu" in os.environ.get("JAX_PLATFORMS", "") or not there:
        return
    reasons = []
    for platform in ("tpu", "cuda", "rocm"):
        try:
            jax.devices(platform)
        except RuntimeError as error:
            reasons.append(f"{platform}: {' '.join(str(error).split())[:300]}")
    raise ValueError(
        f"this machine has {', '.join(there)}, but JAX finds only its CPU ({'; '.join(reasons)}). Another "
        "process may hold the device, or JAX may be installed without it: jax[tpu] or jax[cuda13]. To train "
        "on the CPU all the same, set JAX_PLATFORMS=cpu."
    )


def _dry_run(model: Aligner | SpeechLLM, stage: stages.Stage) -> None:
    """Traces the loss of a batch of the longest recordings, without running it: sizes that do not fit raise
    ValueError here."""
    longest = stage.plan.one_of_each()[-1]
    batch = stage.examples.rows(longest, range(min(8, len(longest.indices))), 0)
    del batch[SKIPPED]
    graph, state = nnx.split(model)
    jax.eval_shape(lambda state, key: nnx.merge(graph, state).loss(batch, key), state, jax.random.key(0))


def _cached_json(file: epath.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `make`, kept in a JSON file from the first time on."""
    if hosts.broadcast(file.is_file()):
        return json.loads(file.read_text())
    made = make()
    if hosts.is_first():
        commands.write_text(file, json.dumps(made, indent=1) + "\n")
    return made


def _evaluate_answers(
    sparqle: SparQLe, tests: dict[str, DataSet], languages: tuple[str, ...]
) -> dict[str, Any]:
    results, lines = {}, []
    for name, test in tests.items():
        results[name], answers = evaluate(sparqle, test, languages)
        for task in languages:
            if (number := int(test.has(task).sum())) < len(test):
                lines.append(f"{name}: {number} of {len(test)} utterances have a reference in {task}")
        silent = np.flatnonzero(~test.has_speech)
        if len(silent):
            seconds = float(test.num_samples[silent].sum()) / audio.SAMPLE_RATE
            found = without_speech([answers[i][TRANSCRIBE] for i in silent], seconds)
            lines.append(f"{name}: {silence_line(found)}")
    if results:
        hosts.print_once("\n".join([table(results), *lines]))
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sparqle_jax.train", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="a configuration, such as configs/tiny.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one key")
    parser.add_argument(
        "--distributed",
        nargs="*",
        metavar="WHERE",
        help="one of several hosts; they find each other on TPU pods, GKE and Slurm, and elsewhere by: the "
        "first one's ADDRESS:PORT, how many there are, and the number of this one",
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="traces so many steps of each stage for xprof"
    )
    args = parser.parse_args(argv)
    try:
        if args.distributed is not None:
            hosts.join(args.distributed)
        config = read_config(args.config, args.set)
        _check_devices()
        run = Run(config)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))  # with status 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if jax.config.jax_compilation_cache_dir is None:  # a resumed run compiles nothing again
        jax.config.update("jax_compilation_cache_dir", str(config.run / "compiled"))
    try:
        run.train(args.profile)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there.", file=sys.stderr)
        return stopped.status
    except (FloatingPointError, CorruptRecord, CheckpointError, HostFailed) as error:
        print(error, file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"{config.run} can't be written to: {error}", file=sys.stderr)
        return FAILED
    finally:
        run.release()
    hosts.print_once(f"done: {config.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
