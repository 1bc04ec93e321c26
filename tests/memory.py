"""How much host memory loading a decoder takes, measured in a process of its own.

`python -m tests.memory FOLDER DTYPE` prints the figures, in bytes, as JSON.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from sparqle_jax import pretrained
from sparqle_jax.tensors import open_checkpoint


def measure(folder: Path, dtype: str) -> dict[str, int]:
    """Runs this file on a model folder, and returns what it prints."""
    command = [sys.executable, "-m", "tests.memory", str(folder), dtype]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(result.stdout)


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main(folder: str, dtype: str) -> None:
    jnp.zeros(8).block_until_ready()
    tensors = open_checkpoint(folder)  # imports torch, if it is for torch to read
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    model = pretrained.load_llm(folder, dtype=jnp.dtype(dtype))
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    itemsize = jnp.dtype(dtype).itemsize
    shapes = [tensor.shape for tensor in tensors.values()]
    figures = dict(
        parameters=sum(leaf.nbytes for leaf in leaves),
        largest_tensor=itemsize * max(jnp.prod(jnp.array(shape)).item() for shape in shapes),
        peak=status("VmHWM") - before,
    )
    figures["bound"] = figures["parameters"] + 2 * figures["largest_tensor"]
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
