"""From the parts that a configuration names to one model: abstract, random, or loaded; and what trains, saved.

Training, planning and inference make their models here. A file of what trains has this project's own names,
and in its metadata the configurations of the parts (`Parts`).
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pydantic
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors.numpy import save as as_safetensors

from sparqle_jax import adapters, hosts
from sparqle_jax.aligner import STAGE_1_LOSSES, Aligner, AlignmentHeads
from sparqle_jax.compat import Compat
from sparqle_jax.config import Config, EncoderOptions
from sparqle_jax.model import Projection, SpeechLLM, partition
from sparqle_jax.published import sparqle as published
from sparqle_jax.tables import Rule, Table, load_state
from sparqle_jax.tensors import open_checkpoint, read_metadata

PARTS = "parts"  # the key of the metadata


class Parts(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The configurations of what is in a file, besides the towers' folders.

    vocab_size: of the adapter's text half, None without one; embed_dim: of stage 1's features.
    """

    adapter: adapters.Config
    encoder: EncoderOptions = EncoderOptions()
    vocab_size: int | None = None
    embed_dim: int | None = None


# --- Random -------------------------------------------------------------------------------------------------


def make_aligner(
    encoder: nnx.Module, parts: Parts, *, losses: tuple[str, ...], dtype: DTypeLike, rngs: nnx.Rngs
) -> Aligner:
    """Stage 1 on an encoder, its adapter and heads new. Raises ValueError for an adapter without a text half."""
    adapter = _new_adapter(encoder, parts, dtype, rngs)
    heads = AlignmentHeads(parts.adapter.width, parts.embed_dim, dtype=dtype, rngs=rngs)
    return Aligner(encoder, adapter, heads, losses=losses)


def make_speech_llm(
    encoder: nnx.Module,
    parts: Parts,
    llm: nnx.Module,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    compat: Compat = None,
) -> SpeechLLM:
    """Stage 2 on an encoder and an LLM, its adapter and projection new."""
    adapter = _new_adapter(encoder, parts.model_copy(update={"vocab_size": None}), dtype, rngs)
    projection = Projection(parts.adapter, llm.config.width, dtype=dtype, rngs=rngs)
    return SpeechLLM(encoder, adapter, projection, llm, compat=compat)


def _new_adapter(encoder: nnx.Module, parts: Parts, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    part = adapters.KINDS[parts.adapter.kind]
    text = {} if parts.vocab_size is None else {"vocab_size": parts.vocab_size}
    return part.Adapter(parts.adapter, encoder.config.width, dtype=dtype, rngs=rngs, **text)


def from_aligner(aligner: Aligner, llm: nnx.Module, *, rngs: nnx.Rngs) -> SpeechLLM:
    """Stage 2 from stage 1: the same encoder and adapter, without its text half; a new projection."""
    parts = Parts(adapter=aligner.adapter.config)
    dtype = aligner.adapter.dtype
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: _new_adapter(aligner.encoder, parts, dtype, nnx.Rngs(0)))
    )
    trained = dict(nnx.to_flat_state(nnx.state(aligner.adapter)))
    kept = [(path, trained[path]) for path, _ in nnx.to_flat_state(abstract)]
    adapter = nnx.merge(graph, nnx.from_flat_state(kept))
    projection = Projection(parts.adapter, llm.config.width, dtype=llm.dtype, rngs=rngs)
    return SpeechLLM(aligner.encoder, adapter, projection, llm)


# --- Of a run -----------------------------------------------------------------------------------------------


def parts_of(config: Config, vocab_size: int | None = None) -> Parts:
    """The parts of a run: as its configuration says, or as the file does from which it starts.

    vocab_size: of the tokenizer of stage 1's texts, with the token that begins a text to generate.
    Raises ValueError, naming the fields, where the two disagree.
    """
    start = config.init_from
    embed_dim = None if config.stage1 is None else config.stage1.embed_dim
    if start is None or start.is_dir():
        if start is not None:
            _, vocab_size = published.bert_config(start)
        return Parts(
            adapter=config.adapter, encoder=config.encoder.options, vocab_size=vocab_size, embed_dim=embed_dim
        )
    saved = read_parts(start)
    if config.adapter is not None and config.adapter != saved.adapter:
        ours, theirs = config.adapter.model_dump(), saved.adapter.model_dump()
        wrong = [f"{k}={v!r} (there: {theirs.get(k)!r})" for k, v in ours.items() if theirs.get(k) != v]
        raise ValueError(
            f"the adapter in init_from={start} is another than the configuration's: {', '.join(wrong)}. Leave "
            "adapter out (--set adapter=null), or begin from nothing (--set init_from=null)."
        )
    return saved


def new_aligner(
    config: Config, encoder: nnx.Module, vocab_size: int, mesh: Mesh | None, rngs: nnx.Rngs
) -> Aligner:
    """The stage 1 of a run on its encoder, up to its first step."""
    dtype, start, losses = jnp.dtype(config.dtype), config.init_from, config.stage1.losses
    parts = parts_of(config, vocab_size)
    if start is not None and not start.is_dir():
        return load_aligner(start, encoder, losses=losses, dtype=dtype, mesh=mesh)
    aligner = make_aligner(encoder, parts, losses=losses, dtype=dtype, rngs=rngs)
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
        return load_speech_llm(start, encoder, llm, dtype=dtype, mesh=mesh, rngs=rngs)
    model = make_speech_llm(encoder, parts, llm, dtype=dtype, rngs=rngs)
    if start is not None:
        options: dict[str, Any] = dict(text=False, dtype=dtype, mesh=mesh, rngs=rngs)
        model.adapter = published.qformer_from_bert(start, parts.adapter, encoder.config.width, **options)
    return model


# --- Saved and loaded ---------------------------------------------------------------------------------------


def save(model: SpeechLLM | Aligner, file: str | epath.Path) -> None:
    """Saves what trains, and the configurations of the parts, in a .safetensors file.

    Of several hosts, which call this together, the first writes.
    """
    _, trained, _ = partition(model)
    values = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(trained)}
    tensors = {name: hosts.whole(value) for name, value in values.items()}
    if hosts.is_first():
        metadata = {PARTS: parts_in(model).model_dump_json()}
        epath.Path(file).write_bytes(as_safetensors(tensors, metadata))


def parts_in(model: SpeechLLM | Aligner) -> Parts:
    """The configurations of a model's parts."""
    stage1 = {}
    if isinstance(model, Aligner):
        embed_dim = model.heads.speech_projection.out_features
        stage1 = dict(vocab_size=model.adapter.vocab_size, embed_dim=embed_dim)
    return Parts(adapter=model.adapter.config, **stage1)


def read_parts(file: str | Path) -> Parts:
    """The configurations of the parts in a file that training saved, or in one with the published names.

    Raises FileNotFoundError and ValueError for what is neither.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a file that training saved, or a BERT folder.")
    saved = read_metadata(file).get(PARTS)
    if saved is None:
        config, vocab_size = published.qformer_config(file)
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
    compat: Compat = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    rngs: nnx.Rngs | None = None,
) -> SpeechLLM:
    """A model on its towers, from a file that `save` wrote, or one with the published names.

    rngs: to start stage 2 from a file of stage 1, which has no projection to the LLM: it is new then.
    Raises FileNotFoundError and ValueError, listing all that does not fit.
    """
    parts = read_parts(file)
    if PARTS not in read_metadata(file):
        return published.load_speech_llm(file, encoder, llm, compat=compat, dtype=dtype, mesh=mesh, rngs=rngs)
    if parts.embed_dim is not None:
        if rngs is None:
            raise ValueError(f"{file} is of stage 1, and has no projection to an LLM: train stage 2 from it.")
        aligner = load_aligner(file, encoder, losses=STAGE_1_LOSSES, dtype=dtype, mesh=mesh)
        return from_aligner(aligner, llm, rngs=rngs)
    new = make_speech_llm(encoder, parts, llm, dtype=dtype, rngs=nnx.Rngs(0), compat=compat)
    return _restored(new, file, mesh)


def load_aligner(
    file: str | Path,
    encoder: nnx.Module,
    *,
    losses: tuple[str, ...],
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> Aligner:
    """Stage 1 on its encoder, from a file of stage 1 that `save` wrote, or one with the published names."""
    parts = read_parts(file)
    if parts.embed_dim is None or parts.vocab_size is None:
        raise ValueError(
            f"{file} is of stage 2, which has no text half: leave stage 1 out (--set stage1=null)."
        )
    if PARTS not in read_metadata(file):
        return published.load_aligner(file, encoder, losses=losses, dtype=dtype, mesh=mesh)
    new = make_aligner(encoder, parts, losses=losses, dtype=dtype, rngs=nnx.Rngs(0))
    return _restored(new, file, mesh)


def _restored(new: Any, file: str | Path, mesh: Mesh | None) -> Any:
    """The model with what trains from a file."""
    graph, trained, frozen = partition(new)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(trained)]
    table = Table(tuple(Rule(name, name) for name in names))
    trained = load_state(trained, table, open_checkpoint(file), name=str(file), mesh=mesh)
    return nnx.merge(graph, trained, frozen)
