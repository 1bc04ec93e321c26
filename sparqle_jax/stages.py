"""A stage of a run: what it is trained and tested on, and in which batches."""

import dataclasses

import numpy as np

from sparqle_jax import audio, hosts
from sparqle_jax.config import Config, Stage1Config, StageConfig
from sparqle_jax.data.dataset import Corpus
from sparqle_jax.data.pipeline import AlignmentExamples, Examples, InstructionExamples, Waveforms
from sparqle_jax.data.plan import BatchPlan, choose_buckets
from sparqle_jax.tasks import TRANSCRIBE, check_tasks, have_any

STAGES = ("stage1", "stage2")  # in their order


@dataclasses.dataclass
class Stage:
    """A stage: its data and their batches. valid_sets: by name, examples and the plan of their batches."""

    name: str
    config: StageConfig
    examples: AlignmentExamples | InstructionExamples
    plan: BatchPlan
    valid_sets: dict[str, tuple[Examples, BatchPlan]]


def tasks_of_sets(config: Config) -> list[dict[str, float]]:
    """The tasks of stage 2 for each training set, by weight."""
    return [one.tasks or config.stage2.tasks for one in config.data.train.values()]


def tasks_of(corpus: Corpus, tasks: dict[str, float]) -> dict[str, float]:
    """The tasks that a test set has answers to."""
    there = (TRANSCRIBE, *corpus.data_sets[0].languages)
    return {task: weight for task, weight in tasks.items() if task in there} or {TRANSCRIBE: 1.0}


def used_by(config: Config, corpus: Corpus, stage: StageConfig) -> list[np.ndarray]:
    """bool [N] for each training set: which of its utterances a stage trains on.

    In stage 1 those in which somebody speaks, in stage 2 those that have an answer to one of its tasks.
    Raises ValueError for a set in which there are none, and for a task that none of a set has.
    """
    if isinstance(stage, Stage1Config):
        used = [data_set.has_speech for data_set in corpus.data_sets]
        for data_set, some in zip(corpus.data_sets, used, strict=True):
            if not some.any():
                raise ValueError(
                    f"in no recording of {data_set.folder} anybody speaks: stage 1 can't use it."
                )
        return used
    for data_set, tasks in zip(corpus.data_sets, tasks_of_sets(config), strict=True):
        check_tasks(data_set, tasks)
    return [
        have_any(data_set, tasks)
        for data_set, tasks in zip(corpus.data_sets, tasks_of_sets(config), strict=True)
    ]


def say_counts(config: Config, corpus: Corpus, name: str, stage: StageConfig) -> None:
    """Prints how many utterances of each training set a stage can use, and for which task."""
    used = used_by(config, corpus, stage)
    tasks = [{TRANSCRIBE: 1.0}] * len(used) if isinstance(stage, Stage1Config) else tasks_of_sets(config)
    for key, data_set, some, asked in zip(config.data.train, corpus.data_sets, used, tasks, strict=True):
        counts = ", ".join(f"{task} {int((some & data_set.has(task)).sum())}" for task in asked)
        out = len(some) - int(some.sum())
        left_out = f"; {out} have {'no text' if name == 'stage1' else 'none of these'} and are left out"
        hosts.print_once(
            f"{name}: data.train.{key} has {len(some)} utterances: {counts}{left_out if out else ''}"
        )


def make_plan(config: Config, corpus: Corpus, stage: StageConfig) -> BatchPlan:
    """The batches of a stage. Raises ValueError as `BatchPlan` does, and for a task that a data set lacks."""
    buckets = config.data.buckets
    used = np.concatenate(used_by(config, corpus, stage))
    lengths = (
        choose_buckets(corpus.num_samples[used], buckets)
        if isinstance(buckets, int)
        else [round(seconds * audio.SAMPLE_RATE) for seconds in buckets]
    )
    weights = [one.weight for one in config.data.train.values() if one.weight is not None]
    plan = BatchPlan(
        corpus.num_samples,
        lengths,
        stage.batch_size,
        seed=config.seed,
        multiple=config.data.batch_multiple,
        sizes=corpus.sizes,
        weights=weights or None,
        used=used,
    )
    if len(plan.buckets) < len(lengths):
        hosts.print_once(
            f"{len(plan.buckets)} buckets instead of {len(lengths)}: an epoch has too few examples for more "
            f"({plan.batches_per_epoch} batches of {stage.batch_size} and up)."
        )
    return plan


def test_plan(waveforms: Waveforms, used: np.ndarray, batch_size: int, parts: int, name: str) -> BatchPlan:
    """The batches of a test set, all of one length and a multiple of `parts` examples."""
    lengths = waveforms.corpus.num_samples
    number = int(used.sum())
    size = min(batch_size, number) // parts * parts
    if not size:
        raise ValueError(
            f"data.valid.{name} has {number} utterances, too few to be split over mesh.data * mesh.fsdp "
            f"= {parts} devices: give more, leave it out, or choose another mesh."
        )
    return BatchPlan(lengths, choose_buckets(lengths[used], 1), size, seed=0, used=used)
