"""Assembles a model of the parts that a configuration names: abstract, random or loaded; saves what trains.

Training, planning and inference make their models here. A file of what trains has this project's own names,
and in its metadata the configurations of the parts (`Parts`).
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pydantic
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors.numpy import save as as_safetensors

from sparqle_jax import adapters, hosts, pretrained
from sparqle_jax.aligner import Aligner, AlignmentHeads
from sparqle_jax.compat import Compat
from sparqle_jax.config import Config, EncoderOptions
from sparqle_jax.encoders.layer_mix import LayerMix
from sparqle_jax.llms import lora
from sparqle_jax.llms.lora import Config as LoraConfig
from sparqle_jax.model import Projection, SpeechLLM, partition
from sparqle_jax.published import sparqle as published
from sparqle_jax.tables import Rule, Table, load_state
from sparqle_jax.tensors import open_checkpoint, read_metadata

PARTS = "parts"  # the key of the metadata


class Parts(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The configurations of what is in a file, besides the towers' folders.

    vocab_size: of the adapter's text half, None without one; embed_dim: of stage 1's features. lora: of the
    LLM, None without it.
    """

    adapter: adapters.Config
    encoder: EncoderOptions = EncoderOptions()
    vocab_size: int | None = None
    embed_dim: int | None = None
    lora: LoraConfig | None = None


# --- Random -------------------------------------------------------------------------------------------------


def make_aligner(
    encoder: nnx.Module, parts: Parts, *, dtype: DTypeLike, rngs: nnx.Rngs, **options
) -> Aligner:
    """Stage 1 on an encoder, its adapter and heads new; options are those of `Aligner`.

    Raises ValueError for an adapter without a text half.
    """
    adapter = _new_adapter(encoder, parts, dtype, rngs)
    heads = AlignmentHeads(parts.adapter.width, parts.embed_dim, dtype=dtype, rngs=rngs)
    return Aligner(encoder, adapter, heads, **options)


def make_speech_llm(
    encoder: nnx.Module,
    parts: Parts,
    llm: nnx.Module,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    compat: Compat = None,
) -> SpeechLLM:
    """Stage 2 on an encoder and an LLM, its adapter, its projection and LoRA new."""
    adapter = _new_adapter(encoder, parts.model_copy(update={"vocab_size": None}), dtype, rngs)
    projection = Projection(parts.adapter, llm.config.width, dtype=dtype, rngs=rngs)
    if parts.lora is not None:
        llm = lora.add(llm, parts.lora, rngs)
    return SpeechLLM(encoder, adapter, projection, llm, compat=compat)


def _new_adapter(encoder: nnx.Module, parts: Parts, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    part = adapters.KINDS[parts.adapter.kind]
    text = {} if parts.vocab_size is None else {"vocab_size": parts.vocab_size}
    return part.Adapter(parts.adapter, encoder.config.width, dtype=dtype, rngs=rngs, **text)


def from_aligner(
    aligner: Aligner, llm: nnx.Module, *, lora_config: LoraConfig | None = None, rngs: nnx.Rngs
) -> SpeechLLM:
    """Stage 2 from stage 1: the same encoder and adapter, without its text half; projection and LoRA new."""
    parts = Parts(adapter=aligner.adapter.config)
    dtype = aligner.adapter.dtype
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: _new_adapter(aligner.encoder, parts, dtype, nnx.Rngs(0)))
    )
    trained = dict(nnx.to_flat_state(nnx.state(aligner.adapter)))
    kept = [(path, trained[path]) for path, _ in nnx.to_flat_state(abstract)]
    adapter = nnx.merge(graph, nnx.from_flat_state(kept))
    projection = Projection(parts.adapter, llm.config.width, dtype=llm.dtype, rngs=rngs)
    if lora_config is not None:
        llm = lora.add(llm, lora_config, rngs)
    return SpeechLLM(aligner.encoder, adapter, projection, llm)


# --- Of a run -----------------------------------------------------------------------------------------------


def parts_of(config: Config, vocab_size: int | None = None) -> Parts:
    """The parts of a run: as its configuration says, or as the file does from which it starts.

    vocab_size: of the tokenizer of stage 1's texts, with the token that begins a text to generate.
    Raises ValueError, naming the fields, where the two disagree.
    """
    start = config.init_from
    embed_dim = None if config.stage1 is None else config.stage1.embed_dim
    wanted = None if config.stage2 is None else config.stage2.lora
    if start is None or start.is_dir():
        if start is not None:
            _, vocab_size = published.bert_config(start)
        return Parts(
            adapter=config.adapter or adapters.PAPERS,
            encoder=config.encoder.options,
            vocab_size=vocab_size,
            embed_dim=embed_dim,
            lora=wanted,
        )
    heads = getattr(config.adapter, "num_attention_heads", None)  # published files may not tell
    saved = read_parts(start, **({} if heads is None else {"num_attention_heads": heads}))
    if saved.lora is not None and wanted not in (None, saved.lora):
        raise ValueError(
            f"init_from={start} has LoRA of other sizes ({saved.lora!r}) than stage2.lora: leave that out "
            "(--set stage2.lora=null), or make it the same."
        )
    saved = saved.model_copy(update={"encoder": _agreed(config.encoder.options, saved.encoder, start)})
    if config.adapter is None:
        return saved
    ours, theirs = config.adapter.model_dump(), saved.adapter.model_dump()
    wrong = [
        f"{name}={value!r} (there: {theirs.get(name)!r})"
        for name, value in ours.items()
        if theirs.get(name) != value and "dropout" not in name
    ]
    if wrong:
        raise ValueError(
            f"the adapter in init_from={start} is another than the configuration's: {', '.join(wrong)}. "
            "Leave adapter out (--set adapter=null), or begin from nothing (--set init_from=null)."
        )
    return saved.model_copy(update={"adapter": config.adapter})


def _agreed(asked: EncoderOptions, there: EncoderOptions, start: Path) -> EncoderOptions:
    """The options of an encoder with which the file to start from was made, and those that it does not say.

    Raises ValueError where others are asked for.
    """
    defaults, chosen = EncoderOptions(), {}
    for name, given in asked:
        found = getattr(there, name)
        if given != getattr(defaults, name) and found not in (None, given):
            raise ValueError(
                f"encoder.{name}={given!r}, but init_from={start} was trained with {found!r}: leave it "
                "out, or begin from nothing (--set init_from=null)."
            )
        chosen[name] = given if found is None else found
    return EncoderOptions(**chosen)


def stage1_settings(config: Config) -> dict[str, Any]:
    """The options of `Aligner` that a run has chosen."""
    return dict(losses=config.stage1.losses, accumulate=config.stage1.accumulate)


def new_aligner(
    config: Config, encoder: nnx.Module, vocab_size: int, mesh: Mesh | None, rngs: nnx.Rngs
) -> Aligner:
    """The stage 1 of a run on its encoder, up to its first step."""
    dtype, start = jnp.dtype(config.dtype), config.init_from
    settings = stage1_settings(config)
    parts = parts_of(config, vocab_size)
    if start is not None and not start.is_dir():
        return load_aligner(start, encoder, parts=parts, dtype=dtype, mesh=mesh, **settings)
    aligner = make_aligner(encoder, parts, dtype=dtype, rngs=rngs, **settings)
    if start is not None:
        options: dict[str, Any] = dict(text=True, dtype=dtype, mesh=mesh, rngs=rngs)
        aligner.adapter = published.qformer_from_bert(start, parts.adapter, encoder.config.width, **options)
    return aligner


def new_speech_llm(
    config: Config, encoder: nnx.Module, llm: nnx.Module, mesh: Mesh | None, rngs: nnx.Rngs
) -> SpeechLLM:
    """The stage 2 of a run without a stage 1, up to its first step."""
    dtype, start = jnp.dtype(config.dtype), config.init_from
    parts = parts_of(config)
    if start is not None and not start.is_dir():
        model = load_speech_llm(start, encoder, llm, parts=parts, dtype=dtype, mesh=mesh, rngs=rngs)
        if config.stage2.lora is not None and model.llm.lora is None:
            model.llm = lora.add(model.llm, config.stage2.lora, rngs)
        return model
    model = make_speech_llm(encoder, parts, llm, dtype=dtype, rngs=rngs)
    if start is not None:
        options: dict[str, Any] = dict(text=False, dtype=dtype, mesh=mesh, rngs=rngs)
        model.adapter = published.qformer_from_bert(start, parts.adapter, encoder.config.width, **options)
    return model


def new_encoder(folder: Path, parts: Parts, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    """The encoder of a folder with random weights, of which its config.json alone is read."""
    part, config = pretrained.encoder_config(folder, **_encoder_fields(parts))
    encoder = part.Encoder(config, dtype=dtype, param_dtype=dtype, rngs=rngs)
    return LayerMix(encoder, rngs=rngs) if parts.encoder.layer_mix else encoder


def load_encoder(folder: Path, parts: Parts, *, compat: Compat = None, **options) -> nnx.Module:
    """The encoder in a folder, as a model of these parts hears; options as of `pretrained.load_encoder`.

    compat="published": as SparQLe's published code.
    """
    options |= _encoder_fields(parts)
    if compat == "published":
        options |= {"compat": "published", "normalize": "peak"}
    encoder = pretrained.load_encoder(folder, **options)
    return LayerMix(encoder, rngs=nnx.Rngs(0)) if parts.encoder.layer_mix else encoder


def _encoder_fields(parts: Parts) -> dict[str, Any]:
    """The fields of the encoder's Config that are chosen."""
    return parts.encoder.model_dump(exclude={"layer_mix"}, exclude_none=True)


# --- Saved and loaded ---------------------------------------------------------------------------------------


def save(model: SpeechLLM | Aligner, file: str | epath.Path) -> None:
    """Saves what trains, and the configurations of the parts, in a .safetensors file.

    Of several hosts, which call this together, the first writes.
    """
    _, trained, _ = partition(model)
    values = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(trained)}
    tensors = {name: hosts.all_gather(value) for name, value in values.items()}
    if hosts.is_first():
        metadata = {PARTS: parts_in(model).model_dump_json()}
        epath.Path(file).write_bytes(as_safetensors(tensors, metadata))


def parts_in(model: SpeechLLM | Aligner) -> Parts:
    """The configurations of a model's parts."""
    encoder = EncoderOptions(
        layer_mix=isinstance(model.encoder, LayerMix),
        pad_to_window=getattr(model.encoder.config, "pad_to_window", None),
    )
    both: dict[str, Any] = dict(adapter=model.adapter.config, encoder=encoder)
    if isinstance(model, SpeechLLM):
        return Parts(**both, lora=model.llm.lora)
    embed_dim = model.heads.speech_projection.out_features
    return Parts(**both, vocab_size=model.adapter.vocab_size, embed_dim=embed_dim)


def read_parts(file: str | Path, **values) -> Parts:
    """The configurations of the parts in a file that training saved, or in one with the published names.

    values: fields of the adapter's Config that a published file may not tell. Raises FileNotFoundError and
    ValueError for what is neither.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a file that training saved, or a BERT folder.")
    saved = read_metadata(file).get(PARTS)
    if saved is None:
        config, vocab_size = published.qformer_config(file, **values)
        return Parts(adapter=config, vocab_size=vocab_size, embed_dim=published.embed_dim(file))
    try:
        return Parts.model_validate_json(saved)
    except pydantic.ValidationError as error:
        raise ValueError(f"{file} has parts that are not known here: {error}") from error


def load_speech_llm(
    file: str | Path,
    encoder: nnx.Module,
    llm: nnx.Module,
    *,
    parts: Parts | None = None,
    compat: Compat = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    rngs: nnx.Rngs | None = None,
) -> SpeechLLM:
    """A model on its towers, from a file that `save` wrote, or one with the published names.

    parts: those of the file (None), or with other rates of dropout. rngs: to start stage 2 from a file of
    stage 1, which has no projection to the LLM: it is new then.
    Raises FileNotFoundError and ValueError, listing all that does not fit.
    """
    parts = parts or read_parts(file)
    if PARTS not in read_metadata(file):
        options: dict[str, Any] = dict(compat=compat, dtype=dtype, mesh=mesh, rngs=rngs)
        return published.load_speech_llm(file, encoder, llm, **options, **parts.adapter.model_dump())
    if parts.embed_dim is not None:
        if rngs is None:
            raise ValueError(f"{file} is of stage 1, and has no projection to an LLM: train stage 2 from it.")
        aligner = load_aligner(file, encoder, parts=parts, dtype=dtype, mesh=mesh)
        return from_aligner(aligner, llm, rngs=rngs)
    new = make_speech_llm(encoder, parts, llm, dtype=dtype, rngs=nnx.Rngs(0), compat=compat)
    return _restored(new, file, mesh)


def load_aligner(
    file: str | Path,
    encoder: nnx.Module,
    *,
    parts: Parts | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    **options,
) -> Aligner:
    """Stage 1 on its encoder, from a file of stage 1 that `save` wrote, or one with the published names.

    parts: as for `load_speech_llm`; options are those of `Aligner`.
    """
    parts = parts or read_parts(file)
    if parts.embed_dim is None or parts.vocab_size is None:
        raise ValueError(
            f"{file} is of stage 2, which has no text half: leave stage 1 out (--set stage1=null)."
        )
    if PARTS not in read_metadata(file):
        towers: dict[str, Any] = dict(dtype=dtype, mesh=mesh)
        aligner = published.load_aligner(file, encoder, **towers, **parts.adapter.model_dump())
        return Aligner(encoder, aligner.adapter, aligner.heads, **options)
    new = make_aligner(encoder, parts, dtype=dtype, rngs=nnx.Rngs(0), **options)
    return _restored(new, file, mesh)


def _restored(new: Any, file: str | Path, mesh: Mesh | None) -> Any:
    """The model with what trains from a file."""
    graph, trained, frozen = partition(new)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(trained)]
    table = Table(tuple(Rule(name, name) for name in names))
    trained = load_state(trained, table, open_checkpoint(file), name=str(file), mesh=mesh)
    return nnx.merge(graph, trained, frozen)
