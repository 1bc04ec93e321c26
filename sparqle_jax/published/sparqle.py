"""The published SparQLe checkpoint's names, in and out; and BERT's, from which its Q-Former starts.

Model folders of this project before it had names of its own are in these names as well.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import numpy as safetensors_numpy

from sparqle_jax import hosts
from sparqle_jax.adapters import qformer
from sparqle_jax.adapters.bert import attention_rules
from sparqle_jax.aligner import STAGE_1_LOSSES, Aligner, AlignmentHeads
from sparqle_jax.compat import Compat
from sparqle_jax.encoders import hubert
from sparqle_jax.llms import decoder
from sparqle_jax.model import Projection, SpeechLLM
from sparqle_jax.pretrained import make_tower, read_config
from sparqle_jax.tables import Rule, Table, export, linear, load, norm
from sparqle_jax.tensors import Tensor, open_checkpoint, read_metadata


def bert_table(config: qformer.Config, bert: str = "") -> Table:
    """The Q-Former's BERT part; `bert` is what stands before `bert.` and `cls.` in the names."""
    layer = f"{bert}bert.encoder.layer.{{i}}"
    head = f"{bert}cls.predictions"
    cross_attentions = attention_rules("cross_attentions", f"{layer}.crossattention")
    return Table(
        rules=(
            Rule("word_embeddings.embedding", f"{bert}bert.embeddings.word_embeddings.weight"),
            Rule("position_embeddings.embedding", f"{bert}bert.embeddings.position_embeddings.weight"),
            *norm("embeddings_norm", f"{bert}bert.embeddings.LayerNorm"),
            *attention_rules("layers.self_attention", f"{layer}.attention"),
            *(dataclasses.replace(rule, every=config.cross_attention_freq) for rule in cross_attentions),
            *linear("layers.text_mlp.up", f"{layer}.intermediate.dense"),
            *linear("layers.text_mlp.down", f"{layer}.output.dense"),
            *norm("layers.text_mlp.norm", f"{layer}.output.LayerNorm"),
            *linear("layers.query_mlp.up", f"{layer}.intermediate_query.dense"),
            *linear("layers.query_mlp.down", f"{layer}.output_query.dense"),
            *norm("layers.query_mlp.norm", f"{layer}.output_query.LayerNorm"),
            *linear("lm_transform", f"{head}.transform.dense"),
            *norm("lm_norm", f"{head}.transform.LayerNorm"),
            Rule("lm_bias", f"{head}.bias"),
        ),
        ignored=(re.escape(f"{bert}bert.embeddings.position_ids"),),
        copies={
            f"{head}.decoder.weight": f"{bert}bert.embeddings.word_embeddings.weight",
            f"{head}.decoder.bias": f"{head}.bias",
        },
    )


def qformer_table(config: qformer.Config) -> Table:
    """The Q-Former in the published checkpoint."""
    return Table((*norm("frames_norm", "ln_speech"), Rule("query_tokens", "query_tokens"))) + bert_table(
        config, "Qformer."
    )


def aligner_table(config: qformer.Config) -> Table:
    """The trained parts of an Aligner, as the published checkpoint names them."""
    return qformer_table(config).within("adapter.") + Table(
        (
            *linear("heads.speech_projection", "speech_proj"),
            *linear("heads.text_projection", "text_proj"),
            *linear("heads.matching", "itm_head"),
            Rule("heads.temperature", "temp"),
        )
    )


def sparqle_table(config: qformer.Config) -> Table:
    """The trained parts of a SpeechLLM, as the published checkpoint names them."""
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


def bert_config(folder: str | Path) -> tuple[dict[str, Any], int]:
    """The fields of the Q-Former's Config that a BERT folder sets, and the size of the vocabulary with [DEC].

    Raises ValueError for a BERT whose positions are not absolute embeddings, and as `read_config` does.
    """
    config = read_config(folder, ("bert",))
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"position_embedding_type={config['position_embedding_type']!r} is not supported; "
            "the Q-Former starts from a BERT with 'absolute' position embeddings."
        )
    values = {name: config[name] for name in qformer.Config.model_fields if name in config}
    return values, config.get("vocab_size", 30522) + 1


def qformer_from_bert(
    folder: str | Path,
    config: qformer.Config,
    frames_width: int,
    *,
    text: bool,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    rngs: nnx.Rngs,
) -> qformer.Adapter:
    """A new Q-Former that starts from a BERT folder, as the paper's does; parameters in float32.

    The query feed-forward starts as a copy of the text one; queries, cross-attention, the norm of the frames
    and the embedding of [DEC] start at random from `rngs`, and so does the LM head of a BERT without one.
    text: with the text half. Raises FileNotFoundError and ValueError for what is no such folder, and for one
    of other sizes than `config`.
    """
    values, vocab_size = bert_config(folder)
    if wrong := [
        f"{k}={getattr(config, k)} (there: {v})" for k, v in values.items() if getattr(config, k) != v
    ]:
        raise ValueError(
            f"the adapter has other sizes than the BERT in {folder}, from which it is to start: "
            f"{', '.join(wrong)}. Set adapter's fields to those of the BERT."
        )
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
    if not text:
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

    def make(rngs: nnx.Rngs) -> qformer.Adapter:
        words = vocab_size if text else None
        return qformer.Adapter(config, frames_width, vocab_size=words, dtype=dtype, rngs=rngs)

    table = bert_table(config)
    return load(make, table, tensors, name=str(folder), mesh=mesh, ignored=ignored, fresh=fresh, rngs=rngs)


def _with_row(tensor: Tensor, row: np.ndarray) -> Tensor:
    whole = np.concatenate([tensor.read((slice(None),) * len(tensor.shape)).astype(np.float32), row])
    return Tensor(whole.shape, lambda index: whole[index])


def qformer_config(checkpoint: str | Path, **values) -> tuple[qformer.Config, int | None]:
    """The Config of the Q-Former in a checkpoint under the published names, and the size of its vocabulary.

    Without a text half that is None.
    A file that this project saved says it all. In other files the tensors tell the sizes; what they don't is
    taken to be BERT's (heads of 64, dropout 0.1) where the width is. `values` overrule.
    Raises ValueError for a file that is no SparQLe checkpoint, and for one of another width without
    num_attention_heads among `values`.
    """
    if saved := read_metadata(checkpoint).get("qformer"):
        found = json.loads(saved)
        words = found["vocab_size"] if found.get("text", True) else None
        found = {name: found[name] for name in qformer.Config.model_fields if name in found}
        return qformer.Config(**{**found, **values}), words
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
        num_queries=num_queries,
        cross_attention_freq=with_cross[1] if len(with_cross) > 1 else num_layers,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        intermediate_size=tensors[needed[2]].shape[0],
    )
    if positions is not None:
        found.update(max_position_embeddings=positions.shape[1])
    return qformer.Config(**{**found, **values}), None if words is None else words.shape[0]


def embed_dim(checkpoint: str | Path) -> int | None:
    """The width of the contrastive features in a stage-1 checkpoint; None for one without them."""
    weight = open_checkpoint(checkpoint).get("speech_proj.weight")
    return None if weight is None else weight.shape[0]


def load_speech_llm(
    checkpoint: str | Path,
    encoder: nnx.Module | hubert.Config,
    llm: nnx.Module | decoder.Config,
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
    config, _ = qformer_config(checkpoint, **values)
    tensors = open_checkpoint(checkpoint)
    if isinstance(encoder, hubert.Config):
        encoder = dataclasses.replace(encoder, compat=compat)
    encoder = _encoder_of(checkpoint, tensors, encoder, dtype, mesh)
    if isinstance(llm, decoder.Config):
        part = _part(tensors, "llama_model.") or _part(tensors, "llm_model.")
        llm = make_tower(decoder, llm, part, f"the LLM in {checkpoint}", dtype, mesh)

    def make(rngs: nnx.Rngs) -> nnx.Dict:
        return nnx.Dict(
            adapter=qformer.Adapter(config, encoder.config.width, dtype=dtype, rngs=rngs),
            projection=Projection(config, llm.config.width, dtype=dtype, rngs=rngs),
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
    encoder: nnx.Module | hubert.Config,
    *,
    losses: Sequence[str] = STAGE_1_LOSSES,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    **values,
) -> Aligner:
    """A stage-1 model from a checkpoint in the published names; arguments as for `load_speech_llm`.

    losses: see `Aligner`.
    """
    config, vocab_size = qformer_config(checkpoint, **values)
    tensors = open_checkpoint(checkpoint)
    encoder = _encoder_of(checkpoint, tensors, encoder, dtype, mesh)

    def make(rngs: nnx.Rngs) -> nnx.Dict:
        return nnx.Dict(
            adapter=qformer.Adapter(
                config, encoder.config.width, vocab_size=vocab_size, dtype=dtype, rngs=rngs
            ),
            heads=AlignmentHeads(config.width, embed_dim(checkpoint) or 256, dtype=dtype, rngs=rngs),
        )

    trained = load(make, aligner_table(config), tensors, name=str(checkpoint), mesh=mesh, ignored=TOWERS)
    return Aligner(encoder, trained.adapter, trained.heads, losses=losses)


def _encoder_of(
    checkpoint: str | Path,
    tensors: Mapping[str, Tensor],
    encoder: nnx.Module | hubert.Config,
    dtype: DTypeLike,
    mesh: Mesh | None,
) -> nnx.Module:
    """The encoder as given, or from the checkpoint where its configuration is given."""
    if not isinstance(encoder, hubert.Config):
        return encoder
    part = _part(tensors, "speech_encoder.")
    return make_tower(hubert, encoder, part, f"the encoder in {checkpoint}", dtype, mesh)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}


def save(model: SpeechLLM | Aligner, file: str | epath.Path) -> None:
    """Saves what trains under the published names: `.safetensors`, or `.pt` as the PyTorch code loads it.

    The Q-Former's configuration goes with it. Of several hosts, which call this together, the first writes.
    Raises ValueError for another ending, and for a model with LoRA.
    """
    file, config = epath.Path(file), model.adapter.config
    if isinstance(model, SpeechLLM) and model.llm.lora is not None:
        raise ValueError("the published format has no place for LoRA: export a model folder, or fold it in.")
    table = aligner_table(config) if isinstance(model, Aligner) else sparqle_table(config)
    tensors = export(nnx.state(model), table)
    # A buffer that PyTorch looks for.
    tensors["Qformer.bert.embeddings.position_ids"] = np.arange(config.max_position_embeddings)[None]
    metadata = {"qformer": json.dumps(config.model_dump() | _text_half(model.adapter))}
    if not hosts.is_first():
        return
    if file.suffix == ".safetensors":
        file.write_bytes(safetensors_numpy.save(tensors, metadata))
    elif file.suffix == ".pt":
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
        torch.save({"model": tensors, "metadata": metadata}, file)
    else:
        raise ValueError(f"{file}: give a name that ends in .safetensors or .pt.")


def _text_half(adapter: qformer.Adapter) -> dict[str, Any]:
    if adapter.vocab_size is None:
        return {"text": False}
    return {"text": True, "vocab_size": adapter.vocab_size}
