"""Weights: transformers folders and the published SparQLe checkpoint <-> this project's parameters.

One table per tower says which checkpoint tensor is which parameter; it is read in both directions. Tensors
are read one at a time, only the part that this host's devices hold, cast, and placed on the mesh: on the
host there is never more than one tensor in passing.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from sparqle_jax import hosts
from sparqle_jax.adapters.qformer import QFormer, QFormerConfig
from sparqle_jax.compat import Compat
from sparqle_jax.encoders.hubert import Hubert, HubertConfig
from sparqle_jax.llms.decoder import FAMILIES, Decoder, DecoderConfig
from sparqle_jax.model import STAGE_1_LOSSES, Aligner, AlignmentHeads, SpeechLLM, make_projection
from sparqle_jax.sharding import state_sharding

MakeModule = Callable[[nnx.Rngs], nnx.Module]

READ_BYTES = 16 << 20  # how much of a tensor is cast at a time


# --- Tables -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """A parameter and the tensor that it comes from.

    target: path of the parameter. source: name of the tensor; further spellings follow in `others`.
    `{i}` is a layer's number: in both, where layers are a list; in the source alone, where the parameter
    holds all layers, stacked, or `every` so many-th from the first on. axes: the tensor's dimensions in the
    parameter's order, None for the same.
    """

    target: str
    source: str
    axes: tuple[int, ...] | None = None
    others: tuple[str, ...] = ()
    every: int = 1

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.source, *self.others)


@dataclasses.dataclass(frozen=True)
class Table:
    """All rules of a tower.

    ignored: patterns of tensors that are known and not needed. copies: tensors that are tied to another
    one, copy -> original: written for the programs that expect them; read where the original is missing.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def within(self, part: str) -> "Table":
        """The same table for a module that is this `part` ("adapter.") of a larger one."""
        rules = tuple(dataclasses.replace(rule, target=part + rule.target) for rule in self.rules)
        return dataclasses.replace(self, rules=rules)

    def __add__(self, other: "Table") -> "Table":
        return Table(self.rules + other.rules, self.ignored + other.ignored, {**self.copies, **other.copies})


def _linear(target: str, source: str) -> tuple[Rule, Rule]:
    return Rule(f"{target}.kernel", f"{source}.weight", (1, 0)), Rule(f"{target}.bias", f"{source}.bias")


def _norm(target: str, source: str) -> tuple[Rule, Rule]:
    # bert-base-uncased still has TensorFlow's names, gamma and beta.
    return (
        Rule(f"{target}.scale", f"{source}.weight", others=(f"{source}.gamma",)),
        Rule(f"{target}.bias", f"{source}.bias", others=(f"{source}.beta",)),
    )


HUBERT = Table(
    rules=(
        Rule("conv_layers.{i}.conv.kernel", "feature_extractor.conv_layers.{i}.conv.weight", (2, 1, 0)),
        Rule("conv_layers.{i}.conv.bias", "feature_extractor.conv_layers.{i}.conv.bias"),
        *_norm("conv_layers.{i}.norm", "feature_extractor.conv_layers.{i}.layer_norm"),
        *_norm("feature_norm", "feature_projection.layer_norm"),
        *_linear("feature_projection", "feature_projection.projection"),
        Rule(
            "positional_conv.scale",
            "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
            (2, 1, 0),
            others=("encoder.pos_conv_embed.conv.weight_g",),
        ),
        Rule(
            "positional_conv.direction",
            "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
            (2, 1, 0),
            others=("encoder.pos_conv_embed.conv.weight_v",),
        ),
        Rule("positional_conv.bias", "encoder.pos_conv_embed.conv.bias"),
        *_norm("norm", "encoder.layer_norm"),
        *_linear("layers.attention.query", "encoder.layers.{i}.attention.q_proj"),
        *_linear("layers.attention.key", "encoder.layers.{i}.attention.k_proj"),
        *_linear("layers.attention.value", "encoder.layers.{i}.attention.v_proj"),
        *_linear("layers.attention.out", "encoder.layers.{i}.attention.out_proj"),
        *_norm("layers.attention_norm", "encoder.layers.{i}.layer_norm"),
        *_linear("layers.up", "encoder.layers.{i}.feed_forward.intermediate_dense"),
        *_linear("layers.down", "encoder.layers.{i}.feed_forward.output_dense"),
        *_norm("layers.mlp_norm", "encoder.layers.{i}.final_layer_norm"),
    ),
    # The mask embedding is for pre-training; heads belong to fine-tuned models.
    ignored=(r"masked_spec_embed", r"lm_head\..*", r"projector\..*", r"classifier\..*", r"layer_weights"),
)

DECODER = Table(
    rules=(
        Rule("embeddings.embedding", "model.embed_tokens.weight"),
        *_linear("layers.query", "model.layers.{i}.self_attn.q_proj"),
        *_linear("layers.key", "model.layers.{i}.self_attn.k_proj"),
        *_linear("layers.value", "model.layers.{i}.self_attn.v_proj"),
        *_linear("layers.out", "model.layers.{i}.self_attn.o_proj"),
        Rule("layers.query_norm.scale", "model.layers.{i}.self_attn.q_norm.weight"),
        Rule("layers.key_norm.scale", "model.layers.{i}.self_attn.k_norm.weight"),
        Rule("layers.attention_norm.scale", "model.layers.{i}.input_layernorm.weight"),
        Rule("layers.mlp_norm.scale", "model.layers.{i}.post_attention_layernorm.weight"),
        *_linear("layers.gate", "model.layers.{i}.mlp.gate_proj"),
        *_linear("layers.up", "model.layers.{i}.mlp.up_proj"),
        *_linear("layers.down", "model.layers.{i}.mlp.down_proj"),
        Rule("norm.scale", "model.norm.weight"),
        Rule("lm_head.kernel", "lm_head.weight", (1, 0)),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
TIED_DECODER = dataclasses.replace(DECODER, copies={"lm_head.weight": "model.embed_tokens.weight"})


def bert_table(config: QFormerConfig, bert: str = "") -> Table:
    """The Q-Former's BERT part; `bert` is what stands before `bert.` and `cls.` in the names."""
    layer = f"{bert}bert.encoder.layer.{{i}}"
    head = f"{bert}cls.predictions"
    cross_attentions = (
        *_linear("cross_attentions.attention.query", f"{layer}.crossattention.self.query"),
        *_linear("cross_attentions.attention.key", f"{layer}.crossattention.self.key"),
        *_linear("cross_attentions.attention.value", f"{layer}.crossattention.self.value"),
        *_linear("cross_attentions.attention.out", f"{layer}.crossattention.output.dense"),
        *_norm("cross_attentions.norm", f"{layer}.crossattention.output.LayerNorm"),
    )
    return Table(
        rules=(
            Rule("word_embeddings.embedding", f"{bert}bert.embeddings.word_embeddings.weight"),
            Rule("position_embeddings.embedding", f"{bert}bert.embeddings.position_embeddings.weight"),
            *_norm("embeddings_norm", f"{bert}bert.embeddings.LayerNorm"),
            *_linear("layers.self_attention.attention.query", f"{layer}.attention.self.query"),
            *_linear("layers.self_attention.attention.key", f"{layer}.attention.self.key"),
            *_linear("layers.self_attention.attention.value", f"{layer}.attention.self.value"),
            *_linear("layers.self_attention.attention.out", f"{layer}.attention.output.dense"),
            *_norm("layers.self_attention.norm", f"{layer}.attention.output.LayerNorm"),
            *(dataclasses.replace(rule, every=config.cross_attention_freq) for rule in cross_attentions),
            *_linear("layers.text_mlp.up", f"{layer}.intermediate.dense"),
            *_linear("layers.text_mlp.down", f"{layer}.output.dense"),
            *_norm("layers.text_mlp.norm", f"{layer}.output.LayerNorm"),
            *_linear("layers.query_mlp.up", f"{layer}.intermediate_query.dense"),
            *_linear("layers.query_mlp.down", f"{layer}.output_query.dense"),
            *_norm("layers.query_mlp.norm", f"{layer}.output_query.LayerNorm"),
            *_linear("lm_transform", f"{head}.transform.dense"),
            *_norm("lm_norm", f"{head}.transform.LayerNorm"),
            Rule("lm_bias", f"{head}.bias"),
        ),
        ignored=(re.escape(f"{bert}bert.embeddings.position_ids"),),
        copies={
            f"{head}.decoder.weight": f"{bert}bert.embeddings.word_embeddings.weight",
            f"{head}.decoder.bias": f"{head}.bias",
        },
    )


def qformer_table(config: QFormerConfig) -> Table:
    """The Q-Former in the published checkpoint."""
    return Table((*_norm("frames_norm", "ln_speech"), Rule("query_tokens", "query_tokens"))) + bert_table(
        config, "Qformer."
    )


def aligner_table(config: QFormerConfig) -> Table:
    """What the published checkpoint calls the trained parts of an Aligner."""
    return qformer_table(config).within("adapter.") + Table(
        (
            *_linear("heads.speech_projection", "speech_proj"),
            *_linear("heads.text_projection", "text_proj"),
            *_linear("heads.matching", "itm_head"),
            Rule("heads.temperature", "temp"),
        )
    )


def sparqle_table(config: QFormerConfig) -> Table:
    """What the published checkpoint calls the trained parts of a SpeechLLM."""
    return qformer_table(config).within("adapter.") + Table(
        (
            Rule("projection.kernel", "llama_proj.weight", (1, 0), others=("llm_proj.weight",)),
            Rule("projection.bias", "llama_proj.bias", others=("llm_proj.bias",)),
        )
    )


# Parts of the published files that belong to the other stage, or to the frozen towers.
TOWERS = (r"speech_encoder\..*", r"(llama|llm)_model\..*")
STAGE_1_ONLY = (
    r"Qformer\.cls\..*",
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    r"(speech_proj|text_proj|itm_head)\..*",
    r"temp",
)


# --- Checkpoint files -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `read(index)` gives that part of it; until then nothing is read."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]


def open_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a transformers folder, a .safetensors, or a PyTorch .bin or .pt file, by name.

    Of a fairseq checkpoint, its `model`; the prefix `module.` goes. PyTorch files need `torch` and are read
    with weights_only: code in them is not run. Raises FileNotFoundError and ValueError saying what to change.
    """
    path = Path(path)
    if path.is_dir():
        files = _weight_files(path)
    elif path.exists():
        files = [path]
    else:
        raise FileNotFoundError(f"{path} does not exist: give a model folder, or a checkpoint file.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(f"{file} holds tensors that another file of {path} holds too: {twice}.")
        tensors.update(part)
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a transformers folder: one, or those that its index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            files = sorted({folder / f for f in json.loads(index.read_text())["weight_map"].values()})
            if absent := [file.name for file in files if not file.exists()]:
                raise FileNotFoundError(f"{index} names files that are not there: {absent}.")
            return files
    raise FileNotFoundError(
        f"{folder} holds no weights: looked for model.safetensors and pytorch_model.bin, "
        "each also in several files with an index."
    )


def _open_safetensors(file: Path) -> dict[str, Tensor]:
    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        # Opened anew each time: the pages of a file that stays mapped would count as this program's memory.
        with _safe_open(file) as checkpoint:
            return checkpoint.get_slice(name)[index] if index else checkpoint.get_tensor(name)

    with _safe_open(file) as checkpoint:
        shapes = {name: tuple(checkpoint.get_slice(name).get_shape()) for name in checkpoint.keys()}  # noqa: SIM118
    return {name: Tensor(shape, functools.partial(read, name)) for name, shape in shapes.items()}


def _safe_open(file: Path) -> safe_open:
    try:
        return safe_open(file, "np")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}): was it cut off, or is it a git-lfs pointer "
            "(then run `git lfs pull`)?"
        ) from error


def _open_torch(file: Path) -> dict[str, Tensor]:
    def state_dict() -> Mapping[str, Any]:
        checkpoint = _load_torch(file)
        for key in ("model", "state_dict"):
            if isinstance(checkpoint.get(key), Mapping):
                return checkpoint[key]
        return checkpoint

    if not zipfile.is_zipfile(file):  # from before torch 1.6: can't be mapped, so it is read once, as a whole
        state_dict = functools.cache(state_dict)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        import torch

        # Opened anew each time, as safetensors files are. torch can't turn bfloat16 into a NumPy array.
        part = state_dict()[name].detach()[index].contiguous()
        if part.dtype == torch.bfloat16:
            return part.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()

    return {
        name: Tensor(tuple(tensor.shape), functools.partial(read, name))
        for name, tensor in state_dict().items()
        if hasattr(tensor, "shape")
    }


def _load_torch(file: Path) -> Mapping[str, Any]:
    """A PyTorch file's dictionary, its tensors left on disk until they are read."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{file} is a PyTorch file: install torch to read it (pip install -e '.[parity]')."
        ) from error
    # What fairseq keeps beside the model: its command line, and numbers of NumPy's.
    scalar = np._core.multiarray.scalar
    harmless = [argparse.Namespace, np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]
    harmless += [type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")]
    try:
        with torch.serialization.safe_globals(harmless):
            mmap = zipfile.is_zipfile(file)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise ValueError(
            f"{file} could not be read as tensors alone, and running code from a checkpoint is refused: "
            f"{error}\nIf you trust where it comes from, load it yourself and save its state dict."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{file} holds a {type(checkpoint).__name__}, not a dictionary of tensors.")
    return checkpoint


def _read_metadata(file: str | Path) -> dict[str, str]:
    """What `save_published` wrote beside the tensors; nothing in other files."""
    file = Path(file)
    if not file.is_file():
        return {}
    if file.suffix == ".safetensors":
        with _safe_open(file) as checkpoint:
            return checkpoint.metadata() or {}
    return _load_torch(file).get("metadata", {})


def read_config(folder: str | Path, supported: tuple[str, ...]) -> dict[str, Any]:
    """A transformers folder's `config.json`, if it is of a `supported` model_type.

    Raises FileNotFoundError and ValueError saying what was found and what would do.
    """
    file = Path(folder) / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} has no config.json: give the folder of a model that transformers saved "
            f"(model_type one of {list(supported)})."
        )
    config = json.loads(file.read_text())
    if config.get("model_type") not in supported:
        raise ValueError(
            f"{file} has model_type={config.get('model_type')!r}; supported here: {list(supported)}."
        )
    return config


def hash_of(path: str | Path) -> str:
    """Of the weights in a transformers folder or a checkpoint file, byte by byte."""
    path, digest = Path(path), hashlib.sha256()
    for file in _weight_files(path) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            while block := opened.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]


def hub_name(folder: str | Path) -> str | None:
    """The name on the Hugging Face hub ("facebook/hubert-large-ll60k") of the model in a folder, if its
    config.json or the hub's cache around it says so."""
    folder = Path(folder)
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    name = json.loads((folder / "config.json").read_text()).get("_name_or_path") or ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def hub_revision(folder: str | Path) -> str | None:
    """The commit of a folder that came from the Hugging Face hub: it is kept in its cache's path, or by `hf
    download --local-dir` beside the files."""
    folder = Path(folder)
    if folder.parent.name == "snapshots":
        return folder.name
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    return note.read_text().split("\n")[0] if note.is_file() else None


# --- Loading --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor and its place: parameter path, the layer's number if stacked, spellings, order of axes."""

    path: tuple
    layer: int | None
    spellings: tuple[str, ...]
    axes: tuple[int, ...] | None


def _expand(table: Table, shapes: Mapping[tuple, tuple[int, ...]]) -> Iterator[Entry]:
    """The table's rules for the parameters that a model has, one entry per tensor."""
    names = {".".join(map(str, path)): path for path in shapes}
    for rule in table.rules:
        numbered, stacked = "{i}" in rule.target, "{i}" in rule.source
        pattern = re.escape(rule.target).replace(r"\{i\}", r"(\d+)")
        for name, path in names.items():
            match = re.fullmatch(pattern, name)
            if not match:
                continue
            if stacked and not numbered:
                layers = [(i, i * rule.every) for i in range(shapes[path][0])]
            else:
                layers = [(None, match[1] if numbered else None)]
            for layer, i in layers:
                spellings = tuple(s.replace("{i}", str(i)) for s in rule.spellings)
                yield Entry(path, layer, spellings, rule.axes)


def load(
    make: MakeModule,
    table: Table,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    mesh: Mesh | None = None,
    ignored: Iterable[str] = (),
    fresh: Iterable[str] = (),
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """Makes a module and fills it from checkpoint tensors, each cast to its parameter's dtype.

    make: builds the module from `rngs`; it is only traced, never run, but for the parameters that match a
    pattern of `fresh`, which keep their random values. mesh: over which the parameters are split, by
    `sharding.state_sharding`; without one they go to the first device. name: what to call the checkpoint in
    errors. ignored: patterns of tensors that may be there besides the table's.

    Raises ValueError listing every problem at once: tensors that are missing, unexpected or of the wrong
    shape, and parameters that no rule or several rules set.
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    variables = dict(nnx.to_flat_state(abstract))
    shapes = {path: variable.get_value().shape for path, variable in variables.items()}
    kept = {path for path in shapes if any(re.fullmatch(p, ".".join(map(str, path))) for p in fresh)}
    entries = [entry for entry in _expand(table, shapes) if entry.path not in kept]
    tensors = dict(tensors)
    for copy, original in table.copies.items():
        if copy in tensors and original not in tensors:
            tensors[original] = tensors.pop(copy)
    sources = _match(table, tensors, entries, shapes, kept, tuple(ignored), name)

    if mesh is None:
        shardings = dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        flat = nnx.to_flat_state(state_sharding(abstract, mesh))
        shardings = {path: variable.get_value() for path, variable in flat}
    values = _fresh_values(make, rngs, kept, shardings) if kept else {}
    for entry, source in zip(entries, sources, strict=True):
        shape, dtype = shapes[entry.path], variables[entry.path].get_value().dtype
        where = shardings[entry.path]
        if entry.layer is None:
            values[entry.path] = _read(tensors[source], entry.axes, shape, dtype, where)
            continue
        if entry.layer == 0:
            values[entry.path] = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=where)(shape, dtype)
        one = _read(tensors[source], entry.axes, shape[1:], dtype, _without_first(where))
        stacked = _put_layer(values[entry.path], one, entry.layer, where)
        # Reading would run ahead of writing, and hold many tensors at once.
        values[entry.path] = jax.block_until_ready(stacked)
    state = nnx.from_flat_state([(path, v.replace(values[path])) for path, v in variables.items()])
    return nnx.merge(graphdef, state)


def _match(
    table: Table,
    tensors: Mapping[str, Tensor],
    entries: list[Entry],
    shapes: Mapping[tuple, tuple[int, ...]],
    kept: set[tuple],
    ignored: tuple[str, ...],
    name: str,
) -> list[str]:
    """The tensor of every entry; ValueError with all that does not fit."""
    problems, sources = [], []
    for entry in entries:
        found = [spelling for spelling in entry.spellings if spelling in tensors]
        parameter = ".".join(map(str, entry.path))
        if len(found) != 1:
            what = "is given twice, as " + " and ".join(found) if found else "is missing"
            problems.append(f"  {entry.spellings[0]} {what} (for {parameter})")
        sources.append(found[0] if found else "")
        if found:
            shape = shapes[entry.path] if entry.layer is None else shapes[entry.path][1:]
            if entry.axes is not None:
                shape = tuple(shape[entry.axes.index(k)] for k in range(len(shape)))
            if shape != tensors[found[0]].shape:
                problems.append(f"  {found[0]} has shape {tensors[found[0]].shape}, needed is {shape}")
    times_set = Counter((entry.path, entry.layer) for entry in entries)
    problems += [
        f"  {'.'.join(map(str, path))} is set by {count} rules"
        for (path, _), count in times_set.items()
        if count > 1
    ]
    unset = shapes.keys() - kept - {path for path, _ in times_set}
    problems += [f"  no tensor sets {'.'.join(map(str, path))}" for path in sorted(unset, key=str)]
    problems += [
        f"  {copy} differs from {original}, though the configuration ties them (tie_word_embeddings)"
        for copy, original in table.copies.items()
        if copy in tensors and original in sources and not _equal(tensors[copy], tensors[original])
    ]
    known = (*table.ignored, *map(re.escape, table.copies), *ignored)
    used = set(sources)
    problems += [
        f"  {key} is unexpected"
        for key in tensors
        if key not in used and not any(re.fullmatch(pattern, key) for pattern in known)
    ]
    if problems:
        raise ValueError(
            f"{name} does not fit the model ({len(problems)} problems): is it of the same sizes and family "
            "as the configuration?\n" + "\n".join(problems)
        )
    return sources


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, some rows at a time."""
    if a.shape != b.shape:
        return False
    rows = max(1, READ_BYTES // (4 * int(np.prod(a.shape[1:]))))
    others = (slice(None),) * (len(a.shape) - 1)
    count = a.shape[0]
    parts = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    return all(np.array_equal(a.read((part, *others)), b.read((part, *others))) for part in parts)


def _read(
    tensor: Tensor, axes: tuple[int, ...] | None, shape: tuple[int, ...], dtype: DTypeLike, where
) -> jax.Array:
    """The tensor as an array: each host reads what its devices hold, casting a few MiB at a time."""
    order = tuple(range(len(shape))) if axes is None else axes

    @functools.cache  # devices that hold the same part ask for it one by one
    def read_part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        index = tuple(slice(*b) for b in bounds)
        out = np.empty([s.stop - s.start for s in index], dtype)
        if not out.ndim:
            out[...] = tensor.read(())
            return out
        in_file = out.transpose(np.argsort(order))  # a view of `out`, dimensions as in the file
        ranges = [index[order.index(k)] for k in range(len(order))]
        rows = max(1, READ_BYTES // max(1, in_file[:1].nbytes))
        for start in range(0, len(in_file), rows):
            stop = min(start + rows, len(in_file))
            offset = ranges[0].start
            in_file[start:stop] = tensor.read((slice(offset + start, offset + stop), *ranges[1:]))
        return out

    def read(index: tuple[slice, ...]) -> np.ndarray:
        return read_part(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, where, read)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put_layer(stacked: jax.Array, one: jax.Array, layer: jax.Array, where) -> jax.Array:
    """Writes one layer's parameter into the stack, in place."""
    stacked = jax.lax.dynamic_update_index_in_dim(stacked, one, layer, 0)
    return jax.lax.with_sharding_constraint(stacked, where)


def _without_first(sharding):
    """The sharding of one layer of a stacked parameter."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding


def _fresh_values(make: MakeModule, rngs: nnx.Rngs, kept: set[tuple], shardings) -> dict[tuple, jax.Array]:
    """The random values of the parameters in `kept`; the others are never made."""
    graphdef, state = nnx.split(rngs)

    def make_kept(state):
        module = make(nnx.merge(graphdef, state))
        return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(module)) if path in kept}

    return jax.jit(make_kept, out_shardings={path: shardings[path] for path in kept})(state)


def load_hubert(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    remat: str | None = None,
) -> Hubert:
    """A HuBERT from a transformers folder, of any class; parameters in `dtype`.

    Raises FileNotFoundError and ValueError for what is no such folder, as `read_config` and `load` do.
    """
    config = HubertConfig.from_dict(read_config(folder, ("hubert",)))
    tensors = {k.removeprefix("hubert."): tensor for k, tensor in open_checkpoint(folder).items()}
    return _hubert(config, tensors, str(folder), dtype, mesh, remat)


def load_decoder(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    remat: str | None = None,
) -> Decoder:
    """A language model from a transformers folder; parameters in `dtype`. Raises as `load_hubert` does."""
    config = DecoderConfig.from_dict(read_config(folder, tuple(FAMILIES)))
    return _decoder(config, open_checkpoint(folder), str(folder), dtype, mesh, remat)


def _hubert(config: HubertConfig, tensors, name, dtype, mesh, remat=None) -> Hubert:
    def make(rngs: nnx.Rngs) -> Hubert:
        return Hubert(config, dtype=dtype, param_dtype=dtype, remat=remat, rngs=rngs)

    return load(make, HUBERT, tensors, name=name, mesh=mesh)


def _decoder(config: DecoderConfig, tensors, name, dtype, mesh, remat=None) -> Decoder:
    def make(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config, dtype=dtype, param_dtype=dtype, remat=remat, rngs=rngs)

    table = TIED_DECODER if config.tie_word_embeddings else DECODER
    return load(make, table, tensors, name=name, mesh=mesh)


def qformer_from_bert(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    rngs: nnx.Rngs,
    **sizes,
) -> QFormer:
    """A new Q-Former that starts from a BERT folder, as the paper's does; parameters in float32.

    The query feed-forward starts as a copy of the text one; queries, cross-attention, the norm of the frames
    and the embedding of [DEC] start at random from `rngs`, and so does the LM head of a BERT without one.
    sizes: fields of QFormerConfig that BERT's configuration does not set (encoder_width, num_queries...).
    Raises as `load_hubert` does.
    """
    config = QFormerConfig.from_bert(read_config(folder, ("bert",)), **sizes)
    tensors = open_checkpoint(folder)
    if not any(key.startswith("bert.") for key in tensors):
        tensors = {f"bert.{key}": tensor for key, tensor in tensors.items()}
    for key in list(tensors):
        if match := re.fullmatch(r"(bert\.encoder\.layer\.\d+\.)(intermediate|output)(\..*)", key):
            tensors[f"{match[1]}{match[2]}_query{match[3]}"] = tensors[key]
    fresh = [r"query_tokens", r"frames_norm\..*", r"cross_attentions\..*"]
    # The reference's Q-Former has no segments, so their embeddings go, as do BERT's other heads.
    ignored = [
        r"bert\.embeddings\.token_type_embeddings\.weight",
        r"bert\.pooler\..*",
        r"cls\.seq_relationship\..*",
    ]
    if not config.text:
        ignored += [pattern.replace(r"Qformer\.", "") for pattern in STAGE_1_ONLY]
    elif "cls.predictions.bias" not in tensors:
        fresh += [r"lm_.*"]
    new_row = 0.02 * np.asarray(jax.random.normal(rngs.params(), (1, config.hidden_size)))
    for name, row in (
        ("bert.embeddings.word_embeddings.weight", new_row),
        ("cls.predictions.decoder.weight", new_row),
        ("cls.predictions.bias", np.zeros(1, np.float32)),
        ("cls.predictions.decoder.bias", np.zeros(1, np.float32)),
    ):
        if name in tensors:
            tensors[name] = _with_row(tensors[name], row)

    def make(rngs: nnx.Rngs) -> QFormer:
        return QFormer(config, dtype=dtype, rngs=rngs)

    table = bert_table(config)
    return load(make, table, tensors, name=str(folder), mesh=mesh, ignored=ignored, fresh=fresh, rngs=rngs)


def _with_row(tensor: Tensor, row: np.ndarray) -> Tensor:
    whole = np.concatenate([tensor.read((slice(None),) * len(tensor.shape)).astype(np.float32), row])
    return Tensor(whole.shape, lambda index: whole[index])


def qformer_config(checkpoint: str | Path, **values) -> QFormerConfig:
    """The configuration of the Q-Former in a checkpoint under the published names.

    What this project saved says it all. Of other files the tensors tell the sizes; what they don't is
    taken to be BERT's (heads of 64, dropout 0.1) where the width is. `values` overrule.
    Raises ValueError for a file that is no SparQLe checkpoint, and for one of another width without
    num_attention_heads among `values`.
    """
    if saved := _read_metadata(checkpoint).get("qformer"):
        return QFormerConfig(**{**json.loads(saved), **values})
    tensors = open_checkpoint(checkpoint)
    layer = "Qformer.bert.encoder.layer"
    needed = [
        "query_tokens",
        f"{layer}.0.crossattention.self.key.weight",
        f"{layer}.0.intermediate_query.dense.weight",
    ]
    if absent := [name for name in needed if name not in tensors]:
        raise ValueError(f"{checkpoint} is no SparQLe checkpoint: it has no {', '.join(absent)}.")
    _, num_queries, width = tensors["query_tokens"].shape
    if "num_attention_heads" not in values and width not in (768, 1024):
        raise ValueError(
            f"{checkpoint} does not say how many attention heads its Q-Former of width {width} has: "
            "pass num_attention_heads=."
        )

    def numbers(part: str) -> list[int]:
        """The layers that have this part."""
        pattern = re.compile(rf"{re.escape(layer)}\.(\d+)\.{re.escape(part)}")
        return sorted(int(match[1]) for name in tensors if (match := pattern.fullmatch(name)))

    with_cross = numbers("crossattention.self.key.weight")
    num_layers = len(numbers("attention.self.key.weight"))
    words = tensors.get("Qformer.bert.embeddings.word_embeddings.weight")
    positions = tensors.get("Qformer.bert.embeddings.position_ids")
    found = dict(
        encoder_width=tensors[needed[1]].shape[1],
        num_queries=num_queries,
        cross_attention_freq=with_cross[1] if len(with_cross) > 1 else num_layers,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        intermediate_size=tensors[needed[2]].shape[0],
        text=words is not None,
    )
    if words is not None:
        found.update(vocab_size=words.shape[0], bos_token_id=words.shape[0] - 1)
    if positions is not None:
        found.update(max_position_embeddings=positions.shape[1])
    return QFormerConfig(**{**found, **values})


def load_sparqle(
    checkpoint: str | Path,
    encoder: Hubert | HubertConfig,
    llm: Decoder | DecoderConfig,
    *,
    compat: Compat = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    rngs: nnx.Rngs | None = None,
    **values,
) -> SpeechLLM:
    """A stage-2 model from a checkpoint in the published names, such as SparQLe_best.pt.

    encoder, llm: the loaded towers; or their configurations, when the checkpoint holds the towers too.
    compat="published" for the published weights. rngs: to start stage 2 from a stage-1 checkpoint, which
    has no projection to the LLM: it is new then. values: see `qformer_config`. Text halves and towers in the
    checkpoint that are not asked for are left aside. Raises ValueError as `load` does.
    """
    config = dataclasses.replace(qformer_config(checkpoint, **values), text=False)
    tensors = open_checkpoint(checkpoint)
    encoder = _encoder_of(checkpoint, tensors, encoder, dtype, mesh)
    if isinstance(llm, DecoderConfig):
        part = _part(tensors, "llama_model.") or _part(tensors, "llm_model.")
        llm = _decoder(llm, part, f"the LLM in {checkpoint}", dtype, mesh)

    def make(rngs: nnx.Rngs) -> nnx.Dict:
        return nnx.Dict(
            adapter=QFormer(config, dtype=dtype, rngs=rngs),
            projection=make_projection(config.hidden_size, llm.config.hidden_size, dtype=dtype, rngs=rngs),
        )

    has_projection = any(name.endswith("_proj.weight") and name.startswith("ll") for name in tensors)
    trained = load(
        make,
        sparqle_table(config),
        tensors,
        name=str(checkpoint),
        mesh=mesh,
        ignored=(*TOWERS, *STAGE_1_ONLY),
        fresh=[] if rngs is None or has_projection else [r"projection\..*"],
        rngs=rngs,
    )
    return SpeechLLM(encoder, trained.adapter, trained.projection, llm, compat=compat)


def load_aligner(
    checkpoint: str | Path,
    encoder: Hubert | HubertConfig,
    *,
    losses: Sequence[str] = STAGE_1_LOSSES,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    **values,
) -> Aligner:
    """A stage-1 model from a checkpoint in the published names; arguments as for `load_sparqle`.

    losses: see `Aligner`.
    """
    config = qformer_config(checkpoint, **values)
    tensors = open_checkpoint(checkpoint)
    encoder = _encoder_of(checkpoint, tensors, encoder, dtype, mesh)
    features = tensors["speech_proj.weight"].shape[0] if "speech_proj.weight" in tensors else 256

    def make(rngs: nnx.Rngs) -> nnx.Dict:
        return nnx.Dict(
            adapter=QFormer(config, dtype=dtype, rngs=rngs),
            heads=AlignmentHeads(config.hidden_size, features, dtype=dtype, rngs=rngs),
        )

    trained = load(make, aligner_table(config), tensors, name=str(checkpoint), mesh=mesh, ignored=TOWERS)
    return Aligner(encoder, trained.adapter, trained.heads, losses=losses)


def _encoder_of(checkpoint, tensors, encoder: Hubert | HubertConfig, dtype, mesh) -> Hubert:
    """The encoder as given, or from the checkpoint where its configuration is given."""
    if isinstance(encoder, Hubert):
        return encoder
    part = _part(tensors, "speech_encoder.")
    return _hubert(encoder, part, f"the encoder in {checkpoint}", dtype, mesh)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}


# --- Saving ---------------------------------------------------------------------------------------------


def export(state: nnx.State, table: Table) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under the checkpoint's names and in its shapes: the table backwards.

    Parameters outside the table are left out; copies that the checkpoint keeps are written too. All hosts
    call this together, and get all.
    """
    values = {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
    tensors = {}
    whole = functools.lru_cache(maxsize=1)(lambda path: hosts.whole(values[path]))  # for all layers in it
    for entry in _expand(table, {path: value.shape for path, value in values.items()}):
        value = whole(entry.path) if entry.layer is None else whole(entry.path)[entry.layer]
        if entry.axes is not None:
            value = value.transpose(np.argsort(entry.axes))
        tensors[entry.spellings[0]] = value.copy(order="C")  # savers write memory as it lies
    copies = {copy: tensors[of] for copy, of in table.copies.items() if of in tensors}
    return tensors | copies


def save_published(model: SpeechLLM | Aligner, file: str | epath.Path) -> None:
    """Saves what trains under the published names: `.safetensors`, or `.pt` as the PyTorch code loads it.

    The Q-Former's configuration goes with it. Of several hosts, which call this together, the first writes.
    Raises ValueError for another ending.
    """
    file, config = epath.Path(file), model.adapter.config
    table = aligner_table(config) if isinstance(model, Aligner) else sparqle_table(config)
    tensors = export(nnx.state(model), table)
    # A buffer that PyTorch looks for.
    tensors["Qformer.bert.embeddings.position_ids"] = np.arange(config.max_position_embeddings)[None]
    metadata = {"qformer": json.dumps(dataclasses.asdict(config))}
    if not hosts.is_first():
        return
    if file.suffix == ".safetensors":
        file.write_bytes(save(tensors, metadata))
    elif file.suffix == ".pt":
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
        torch.save({"model": tensors, "metadata": metadata}, file)
    else:
        raise ValueError(f"{file}: give a name that ends in .safetensors or .pt.")


def save_folder(tower: Hubert | Decoder, folder: str | Path, config: Any, *, dtype: DTypeLike) -> None:
    """Saves a tower as a transformers folder: config.json and model.safetensors, in `dtype`.

    config: the transformers configuration that the tower's was read from.
    """
    folder = Path(folder)
    config.dtype = str(np.dtype(dtype))
    config.save_pretrained(folder)
    table = HUBERT if isinstance(tower, Hubert) else DECODER
    tensors = {name: value.astype(dtype) for name, value in export(nnx.state(tower), table).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
