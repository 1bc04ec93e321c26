"""Checkpoint files as tensors that are read when needed: safetensors, and PyTorch's with weights_only."""

import argparse
import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

READ_BYTES = 16 << 20  # how much of a file is read at a time


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


def read_metadata(file: str | Path) -> dict[str, str]:
    """The metadata that this project wrote beside the tensors; nothing in other files."""
    file = Path(file)
    if not file.is_file():
        return {}
    if file.suffix == ".safetensors":
        with _safe_open(file) as checkpoint:
            return checkpoint.metadata() or {}
    return _load_torch(file).get("metadata", {})


def hash_of(path: str | Path) -> str:
    """Hash of the weights in a transformers folder or a checkpoint file, byte by byte."""
    path, digest = Path(path), hashlib.sha256()
    for file in _weight_files(path) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            while block := opened.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]
