"""The configuration of a run: typed and frozen, from a file in configs/ and overrides of single keys.

A file is Python with `get_config() -> Config`. Unknown keys and values of a wrong type are errors, in the
file as in an override.
"""

import json
import runpy
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from etils import epath

from sparqle_jax import adapters
from sparqle_jax.llms.lora import Config as LoraConfig

Share = Annotated[float, pydantic.Field(ge=0, lt=1)]
# How often each is drawn, by weight: "transcribe", or a language's code for translation into it.
Tasks = Annotated[dict[str, Annotated[float, pydantic.Field(gt=0)]], pydantic.Field(min_length=1)]


# Local or on gs://.
Folder = Annotated[
    Any, pydantic.BeforeValidator(lambda folder: epath.Path(folder)), pydantic.PlainSerializer(str)
]


# Keys of former versions.
RENAMED = {
    "adapter.sizes": "the adapter's own fields, such as adapter.num_queries",
    "adapter.start": "init_from",
    "adapter.tokenizer": "stage1.tokenizer",
    "adapter.features": "stage1.embed_dim",
    "data.test": "data.valid",
    "margin": "speech_pad",
    "test_languages": "eval_languages",
    **{f"{stage}.test_every": f"{stage}.eval_every" for stage in ("stage1", "stage2")},
    **{f"{stage}.optim.final_lr": f"{stage}.optim.final_lr_factor" for stage in ("stage1", "stage2")},
}


class Model(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """Base of all parts: what is not listed is an error, and so is "1" or true for 1."""


class OptimConfig(Model):
    """AdamW with weight decay on matrices; after a linear warm-up a cosine or a line down to
    `final_lr_factor` * lr, or lr throughout ("constant") but for the last `cooldown_steps`, in which it falls
    in a line: a constant run can so be cooled down from several of its steps (see `Config.start`).

    A run of no more than `warmup_steps` steps has its warm-up on all but its last.
    """

    lr: Annotated[float, pydantic.Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, pydantic.Field(ge=0)] = 1000
    final_lr_factor: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.01
    cooldown_steps: pydantic.NonNegativeInt = 0
    b1: Share = 0.9
    b2: Share = 0.98
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.05
    clip_norm: Annotated[float, pydantic.Field(gt=0)] = 1.0

    @pydantic.model_validator(mode="after")
    def _cools_down_from_a_constant(self) -> "OptimConfig":
        if self.cooldown_steps and self.schedule != "constant":
            raise ValueError(f"cooldown_steps={self.cooldown_steps} needs schedule='constant'")
        return self


class MeshConfig(Model):
    """Sizes of the mesh of devices; -1 is what is left. data, fsdp: over both, the examples of a batch are
    split; over fsdp, every parameter as well, gathered when it is used. model: the heads and the feed-forward
    of each layer."""

    data: int = -1
    fsdp: int = 1
    model: int = 1


class StageConfig(Model):
    """One stage. batch_size: examples in a batch of the longest recordings, on all devices together; of
    shorter ones there are more, for about the same seconds. save_every: steps between checkpoints; the last
    `keep` are kept. eval_every: steps, a multiple of save_every, between looks at the loss on data.valid; the
    checkpoint with the lowest is kept as well.

    accumulate: into how many parts a batch is cut that are computed one after the other, so that the memory
    is that of one; the loss and its gradient are those of the whole batch. In stage 1, whose losses compare
    all examples, a part is computed again in the backward pass, and features and frames of the whole batch
    stay in memory.
    """

    steps: pydantic.PositiveInt
    batch_size: pydantic.PositiveInt
    accumulate: pydantic.PositiveInt = 1
    optim: OptimConfig = OptimConfig()
    save_every: pydantic.PositiveInt = 1000
    keep: pydantic.PositiveInt = 2
    log_every: pydantic.PositiveInt = 10
    eval_every: pydantic.PositiveInt | None = None
    evaluate: bool = True  # on data.valid, when the stage ends

    @property
    def summed_parts(self) -> int:
        """The parts of a batch whose gradients are summed: in stage 1 one, as its model cuts the batch."""
        return 1

    @pydantic.model_validator(mode="after")
    def _tests_are_saved(self) -> "StageConfig":
        if self.eval_every is not None and self.eval_every % self.save_every:
            raise ValueError(
                f"eval_every={self.eval_every} is not a multiple of save_every={self.save_every}: of those "
                "that are saved, the best is kept"
            )
        return self


class Stage1Config(StageConfig):
    """Speech and text meet in the adapter, without the LLM.

    tokenizer: the folder of the tokenizer of the adapter's text half. embed_dim: width of the contrastive
    features.
    """

    tokenizer: Path
    embed_dim: pydantic.PositiveInt = 256
    losses: Annotated[tuple[Literal["stc", "stm", "stg"], ...], pydantic.Field(min_length=1)] = (
        "stc",
        "stm",
        "stg",
    )


class Stage2Config(StageConfig):
    """The adapter learns to speak to the frozen LLM.

    tasks: an utterance draws one of those that it has an answer to, by these weights; one that has none is
    not used. Where not all are translated, translation is thus drawn less often than its weight says.
    remat: what the LLM's backward pass computes again instead of keeping: nothing (null), all but matrix
    products ("dots"), or everything ("full"). lora: low-rank changes of the LLM, which train beside the
    adapter.
    """

    tasks: Tasks = {"transcribe": 1.0}
    lora: LoraConfig | None = None
    remat: Literal["dots", "full"] | None = None

    @property
    def summed_parts(self) -> int:
        return self.accumulate


class EncoderOptions(Model):
    """Options of an encoder. None: as its folder says.

    layer_mix: frames are a learned mix of all layers (as in SpeechVerse and s3prl), in place of the last one.
    pad_to_window: of Whisper: whether silence fills its window of 30 s, as when it was trained, or short
    recordings cost less.
    """

    layer_mix: bool = False
    pad_to_window: bool | None = None


class EncoderConfig(EncoderOptions):
    """A frozen encoder, whose config.json says of which family it is. folder: in transformers' format."""

    folder: Annotated[Path, pydantic.Field(strict=False)]

    @property
    def options(self) -> EncoderOptions:
        return EncoderOptions(**self.model_dump(exclude={"folder"}))


class TrainSet(Model):
    """A data set of a mixture. weight: how often its examples are drawn, beside those of the others; None,
    for all sets alike: by their sizes. tasks: its own, in place of those of stage 2."""

    folder: str
    weight: Annotated[float, pydantic.Field(gt=0)] | None = None
    tasks: Tasks | None = None


class DataConfig(Model):
    """Data sets that `python -m sparqle_jax.data.prepare` made, local or on gs://: some to train on, mixed,
    by a name of your choice (a folder alone is a mixture of one), and any number to evaluate on.

    max_seconds: a longer recording is an error. buckets: the lengths to which recordings are padded, in
    seconds, or how many, to be chosen from the training data; each is compiled. batch_multiple: every batch
    size is a multiple of it; mesh.data * mesh.fsdp (times the accumulate of the stages) must divide it.
    max_text_tokens: to which texts are padded; None counts the tokens of all before the first step. workers:
    processes of each host that read; 0 reads in threads. skip_corrupt: a record that can't be read is
    counted and replaced by another of its batch, the same on any number of hosts, and not an error.

    frames: a folder for what the frozen encoder makes of the training data, float16, 100 * width bytes for
    each second: computed before the first step, once for all runs; None: the encoder hears each batch as it
    comes.
    """

    train: Annotated[dict[str, TrainSet], pydantic.Field(min_length=1)]
    valid: dict[str, str] = {}
    max_seconds: Annotated[float, pydantic.Field(gt=0)] = 30.0
    buckets: pydantic.PositiveInt | Annotated[tuple[float, ...], pydantic.Field(min_length=1)] = 8
    batch_multiple: pydantic.PositiveInt = 1
    max_text_tokens: pydantic.PositiveInt | None = None
    workers: Annotated[int, pydantic.Field(ge=0)] = 0
    skip_corrupt: bool = False
    frames: Path | None = None

    @pydantic.field_validator("train", mode="before")
    @classmethod
    def _one_folder(cls, train: Any) -> Any:
        return {"train": {"folder": train}} if isinstance(train, str) else train

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        lacking = [name for name, one in self.train.items() if one.weight is None]
        if 0 < len(lacking) < len(self.train):
            raise ValueError(f"data.train has weights, but not for {lacking}: give all a weight, or none")
        if self.frames is not None and self.skip_corrupt:
            raise ValueError("frames are kept of all recordings: with skip_corrupt, set frames to null")
        return self


class Config(Model):
    """A run. run: its folder, which all hosts must reach. encoder, llm: folders of the frozen towers. A stage
    that is None is left out.

    adapter: which one, by `kind`, and its sizes; None: that of `init_from`, or else the paper's Q-Former.
    init_from: a file that training saved, a checkpoint with the published names, or a BERT folder for a
    Q-Former to start from; None begins at random. start: RUN or RUN@STEP, the folder of another run whose
    full state this one begins with, at that step or its last: weights, moments, steps, place in the data.

    eval_languages: into which to translate when evaluating; the adapter need not have been trained for them.
    max_new_tokens: of an answer, when evaluating and in the model folder that stage 2 leaves. speech_pad:
    seconds of silence that this model gets before and after speech: as many as in the recordings it learns
    from.
    """

    run: Folder
    mesh: MeshConfig = MeshConfig()
    encoder: EncoderConfig
    llm: Path
    data: DataConfig
    adapter: adapters.Config | None = None
    init_from: Path | None = None
    start: str | None = None
    stage1: Stage1Config | None = None
    stage2: Stage2Config | None = None
    eval_languages: tuple[str, ...] = ()
    max_new_tokens: pydantic.PositiveInt = 256
    speech_pad: Annotated[float, pydantic.Field(ge=0)] = 0.25
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products and of the frozen towers
    seed: Annotated[int, pydantic.Field(ge=0)] = 0

    @pydantic.field_validator("encoder", mode="before")
    @classmethod
    def _folder_alone(cls, encoder: Any) -> Any:
        return {"folder": encoder} if isinstance(encoder, str | Path) else encoder

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.encoder.layer_mix and self.data.frames is not None:
            raise ValueError(
                "data.frames keep what a frozen encoder makes, but with encoder.layer_mix it trains: set "
                "data.frames to null"
            )
        if self.stage1 is None and self.stage2 is None:
            raise ValueError("neither stage1 nor stage2 is there: nothing would be trained")
        if self.data.valid == {} and any(s and s.eval_every for s in (self.stage1, self.stage2)):
            raise ValueError("eval_every needs data.valid, which is empty")
        return self


def read_config(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a Python file (its `get_config()`) or a run's config.json, with overrides.

    overrides: "key.subkey=value" each; a value is JSON, or else text. "stage1=null" leaves a stage out.
    Raises FileNotFoundError for no file, ValueError naming every key that is unknown or of a wrong type, with
    what is valid there.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a configuration file, such as configs/tiny.py.")
    is_json = file.suffix == ".json"  # as a run keeps it
    values = json.loads(file.read_text()) if is_json else _run(file).model_dump(mode="json")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override}: write key=value, such as --set stage2.optim.lr=1e-4.")
        _set(values, key.split("."), text, Config)
    try:
        return Config.model_validate_json(json.dumps(values))  # as JSON a path is a string
    except pydantic.ValidationError as error:
        raise ValueError(_explain(file, error)) from error


def _run(file: Path) -> Config:
    """The configuration that a Python file gives."""
    try:
        names = runpy.run_path(str(file))
        if "get_config" not in names:
            raise ValueError(f"{file} is no configuration: it has no function get_config() -> Config.")
        return names["get_config"]()
    except pydantic.ValidationError as error:
        raise ValueError(_explain(file, error)) from error
    except ImportError as error:
        hint = "; the adapter is now one of adapters.Config, such as qformer.Config(num_queries=100)"
        hint = hint if "AdapterConfig" in str(error) else ""
        raise ValueError(f"{file} is no configuration: {error}{hint}.") from error


def _explain(file: Path, error: pydantic.ValidationError) -> str:
    """All that is wrong in a configuration, a line each."""
    lines = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
        text = f"{problem['msg']}{given if where else ''}"
        if problem["type"] == "extra_forbidden":
            last = where.rpartition(".")[2]
            text = _renamed(where) or next(
                (f"it is now {new}" for old, new in RENAMED.items() if old.rpartition(".")[2] == last), text
            )
        lines.append(f"  {where or 'the whole'}: {text}")
    return f"{file} is not a configuration:\n" + "\n".join(lines)


def _set(values: Any, path: list[str], text: str, model: Any, done: str = "") -> None:
    """Sets a key in nested dictionaries, after a look whether the configuration has it."""
    key, *rest = path
    model = _model_of(model, values)
    if model is not None and key not in model.model_fields:
        raise ValueError(
            f"--set {done}{key}: {_renamed(done + key) or 'there is no such key'}; valid here: "
            f"{', '.join(model.model_fields)}."
        )
    if not rest:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        part = None if model is None else _model_of(model.model_fields[key].annotation, None)
        if isinstance(value, str) and part is not None and "folder" in part.model_fields:
            value = {"folder": value}
        if key == "kind" and value != values.get("kind"):
            values.clear()  # the fields of another part
        values[key] = value
        return
    inner = None if model is None else model.model_fields[key].annotation
    is_value = model is not None and _model_of(inner, values.get(key)) is None
    is_value = is_value and typing.get_origin(inner) is not dict
    if is_value or not isinstance(values.get(key, {}), dict | None):
        raise ValueError(f"--set {done}{'.'.join(path)}: {done}{key} has no keys.")
    if values.get(key) is None and rest == ["kind"]:
        values[key] = {}
    if values.get(key) is None:
        raise ValueError(f"--set {done}{'.'.join(path)}: {done}{key} is not in this configuration.")
    _set(values[key], rest, text, inner, f"{done}{key}.")


def _model_of(annotation: Any, values: Any) -> type[pydantic.BaseModel] | None:
    """The part of the configuration that an annotation names: `Part`, `Part | None`, or the one of several
    whose `kind` the values have; None for a value."""
    options, parts = [annotation], []
    while options:
        option = options.pop(0)
        if isinstance(option, type):
            parts += [option] if issubclass(option, pydantic.BaseModel) else []
        else:
            options += typing.get_args(option)
    if len(parts) > 1 and isinstance(values, dict):
        named = [part for part in parts if part.model_fields["kind"].default == values.get("kind")]
        return named[0] if named else parts[0]
    return parts[0] if parts and typing.get_origin(annotation) is not dict else None


def _renamed(key: str) -> str | None:
    return f"it is now {RENAMED[key]}" if key in RENAMED else None
