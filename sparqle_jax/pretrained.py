"""Frozen towers in transformers folders: loaded, saved, and known by their names on the Hugging Face hub."""

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from sparqle_jax import encoders, llms
from sparqle_jax.tables import export, load
from sparqle_jax.tensors import Tensor, open_checkpoint

SAMPLE_RATE = 16_000


def load_encoder(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    remat: str | None = None,
    **options,
) -> nnx.Module:
    """An encoder of encoders.FAMILIES from a transformers folder, of any class; parameters in `dtype`.

    options: fields of its Config that the folder does not set. Raises FileNotFoundError and ValueError for
    what is no such folder, as `read_config` and `tables.load` do.
    """
    part, config = encoder_config(folder, **options)
    return make_tower(part, config, open_checkpoint(folder), str(folder), dtype, mesh, remat)


def load_llm(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    remat: str | None = None,
) -> nnx.Module:
    """A language model of llms.FAMILIES from a transformers folder; parameters in `dtype`. Raises as
    `load_encoder` does."""
    part, config = llm_config(folder)
    return make_tower(part, config, open_checkpoint(folder), str(folder), dtype, mesh, remat)


def encoder_config(folder: str | Path, **options) -> tuple[ModuleType, Any]:
    """The part that a folder is of, and its Config, with `options` in place of some fields.

    Raises FileNotFoundError and ValueError saying what was found and what would do; also for options that the
    encoder does not have, and for another sample rate.
    """
    values = read_config(folder, tuple(encoders.FAMILIES))
    preprocessor = read_preprocessor(folder)
    rate = preprocessor.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise ValueError(
            f"the encoder in {folder} asks for {rate} Hz; this project works at {SAMPLE_RATE} Hz."
        )
    part = encoders.FAMILIES[values["model_type"]]
    config = part.Config.from_dict(values, preprocessor)
    names = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(options.keys() - names):
        raise ValueError(
            f"the encoder in {folder} ({values['model_type']}) has no {', '.join(unknown)}; it has "
            f"{', '.join(sorted(names))}."
        )
    return part, dataclasses.replace(config, **options)


def llm_config(folder: str | Path) -> tuple[ModuleType, Any]:
    """The part that a folder is of, and its Config. Raises as `encoder_config` does."""
    values = read_config(folder, tuple(llms.FAMILIES))
    part = llms.FAMILIES[values["model_type"]]
    return part, part.Config.from_dict(values)


def make_tower(
    part: ModuleType,
    config: Any,
    tensors: dict[str, Tensor],
    name: str,
    dtype: DTypeLike,
    mesh: Mesh | None,
    remat: str | None = None,
) -> nnx.Module:
    """An encoder or LLM filled with a checkpoint's tensors. name: what to call that in errors."""
    kind = part.Encoder if hasattr(part, "Encoder") else part.LLM

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return kind(config, dtype=dtype, param_dtype=dtype, remat=remat, rngs=rngs)

    return load(make, part.table(config), _without_prefix(tensors, part.PREFIXES), name=name, mesh=mesh)


def _without_prefix(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors under their names without the first of the prefixes that they have."""
    return {
        name.removeprefix(next((prefix for prefix in prefixes if name.startswith(prefix)), "")): tensor
        for name, tensor in tensors.items()
    }


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


def read_preprocessor(folder: str | Path) -> dict[str, Any]:
    """A transformers folder's `preprocessor_config.json`; {} without one: transformers' defaults."""
    file = Path(folder) / "preprocessor_config.json"
    if file.exists():
        return json.loads(file.read_text())
    file = Path(folder) / "processor_config.json"  # as transformers 5 saves a processor
    return json.loads(file.read_text()).get("feature_extractor", {}) if file.exists() else {}


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


def save_folder(tower: nnx.Module, folder: str | Path, config: Any, *, dtype: DTypeLike) -> None:
    """Saves a tower as a transformers folder: config.json and model.safetensors, in `dtype`.

    config: the transformers configuration that the tower's was read from.
    """
    folder = Path(folder)
    config.dtype = str(np.dtype(dtype))
    config.save_pretrained(folder)
    _save_weights(tower, folder, config.model_type, dtype)


def replace_weights(tower: nnx.Module, folder: str | Path) -> None:
    """Puts a tower's weights, in its dtype, in place of those in a transformers folder of its family."""
    folder = Path(folder)
    for old in (*folder.glob("*.safetensors*"), *folder.glob("*.bin*")):
        old.unlink()
    family = json.loads((folder / "config.json").read_text())["model_type"]
    _save_weights(tower, folder, family, tower.dtype)


def _save_weights(tower: nnx.Module, folder: Path, family: str, dtype: DTypeLike) -> None:
    table = {**encoders.FAMILIES, **llms.FAMILIES}[family].table(tower.config)
    tensors = {name: value.astype(dtype) for name, value in export(nnx.state(tower), table).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
