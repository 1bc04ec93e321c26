"""How fast an encoder hears, beside transformers in PyTorch: the same sizes, random weights, one run.

    make bench                                   # on whatever is there: a GPU, or a CPU
    python -m benchmarks.encoder --size tiny     # a smoke test

HuBERT-large on 16 recordings of 15 s in bfloat16 on a GPU; HuBERT-base on 2 of 10 s in float32 on a CPU.
Recordings are padded by up to 14%. PyTorch has sdpa attention, and runs eagerly. Times are medians.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparqle_jax.encoders import hubert

RATE = 16_000
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
LARGE |= dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
TINY = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7
)
TINY |= dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
# By size: the configuration, recordings, seconds, dtype, repetitions.
SIZES: dict[str, tuple[dict[str, Any], int, float, str, int]] = {
    "tiny": (TINY, 2, 1.0, "float32", 3),
    "cpu": ({}, 2, 10.0, "float32", 5),
    "accelerator": (LARGE, 16, 15.0, "bfloat16", 20),
}


def inputs(size: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Noise float32 [B, S], and its mask bool [B, S]."""
    rng, samples = np.random.default_rng(0), round(seconds * RATE)
    lengths = rng.integers(round(0.86 * samples), samples + 1, size)
    mask = np.arange(samples) < np.maximum(lengths, [samples] + [0] * (size - 1))[:, None]
    return np.where(mask, rng.standard_normal((size, samples), np.float32), 0), mask


def median(run: Callable[[], Any], repetitions: int) -> float:
    """Seconds of a run, after one to warm up."""
    run()
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ours(config: hubert.Config, waveform: np.ndarray, mask: np.ndarray, dtype: str, repetitions: int) -> dict:
    graph, state = nnx.split(
        hubert.Encoder(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    )
    encode = jax.jit(lambda state, waveform, mask: nnx.merge(graph, state)(waveform, mask)[0])
    on_device = jax.device_put((waveform, mask))
    began = time.perf_counter()
    compiled = encode.lower(state, *on_device).compile()
    compiling = time.perf_counter() - began
    seconds = median(lambda: jax.block_until_ready(compiled(state, *on_device)), repetitions)
    memory = compiled.memory_analysis()
    return {"seconds": seconds, "compile_seconds": compiling, "bytes": memory.temp_size_in_bytes}


def torchs(
    config: hubert.Config, waveform: np.ndarray, mask: np.ndarray, dtype: str, repetitions: int
) -> dict:
    import torch
    from transformers import HubertConfig, HubertModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {name: getattr(config, name) for name in vars(config) if name not in ("normalize", "compat")}
    fields["conv_dim"] = list(fields["conv_dim"])
    model = HubertModel(HubertConfig(**fields, attn_implementation="sdpa")).eval()
    model = model.to(device, getattr(torch, dtype))
    waves = torch.from_numpy(waveform).to(device, getattr(torch, dtype))
    real = torch.from_numpy(mask).to(device).long()

    @torch.inference_mode()
    def run() -> None:
        model(waves, real)
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    return {"seconds": median(run, repetitions), "version": torch.__version__}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.encoder", description=__doc__.split("\n")[0])
    default = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    parser.add_argument("--size", choices=SIZES, default=default)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/encoder.json"))
    args = parser.parse_args(argv)
    fields, size, seconds, dtype, repetitions = SIZES[args.size]
    config = hubert.Config(**fields)
    waveform, mask = inputs(size, seconds)
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": dtype}
    results["ours"] = ours(config, waveform, mask, dtype, repetitions)
    try:
        results["torch"] = torchs(config, waveform, mask, dtype, repetitions)
    except ImportError:
        print("PyTorch is not there: nothing to compare with.", file=sys.stderr)
    flops = config.flops(*waveform.shape)
    print(f"HuBERT, {size} x {seconds:g} s, {dtype}, {results['device']}, jax {jax.__version__}")
    for name in ("ours", "torch"):
        if name in results:
            took = results[name]["seconds"]
            print(f"{name:<6}{1000 * took:9.2f} ms {flops / took / 1e12:8.3f} TFLOP/s", end="")
            print(f"  PyTorch {results[name]['version']}, sdpa, eager" if name == "torch" else "")
    if "torch" in results:
        print(f"{results['torch']['seconds'] / results['ours']['seconds']:.2f} times PyTorch's speed")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
