"""Full-size towers, as `make fullsize` runs them: takes minutes and about 10 GB of memory and 7 GB of disk.

A HuBERT-large with random weights against PyTorch on 10 s of audio, and the host memory that loading a
Llama of 1.24 billion parameters takes. Prints the figures; exits with 1 when one is out of bounds.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import HubertConfig, HubertModel, LlamaConfig, LlamaForCausalLM

from tests.memory import measure

HUBERT_LARGE = dict(  # facebook/hubert-large-ll60k
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    feat_extract_norm="layer",
    conv_bias=True,
    do_stable_layer_norm=True,
)
LLAMA_1B = dict(  # meta-llama/Llama-3.2-1B
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=500_000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)


def hubert_large(folder: Path) -> bool:
    """The largest difference of any frame value from PyTorch's, on 10 s of noise."""
    import jax

    from sparqle_jax import pretrained
    from tests.conftest import call

    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**HUBERT_LARGE)).eval()
    model.save_pretrained(folder)
    waveform = np.random.default_rng(0).normal(size=(1, 160_000)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(waveform)).last_hidden_state.numpy()
    hubert = pretrained.load_encoder(folder, normalize=None)
    frames = np.asarray(jax.block_until_ready(call(hubert.__call__, waveform)[0]))
    difference = np.abs(frames - expected).max()
    print(
        f"HuBERT-large, 10 s, {frames.shape[1]} frames: largest difference {difference:.1e} "
        f"of values up to {np.abs(expected).max():.1f} (bound 1e-3)"
    )
    return difference <= 1e-3


def llama_1b(folder: Path) -> bool:
    """Peak host memory of loading, for each precision, in a fresh process."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="1GB")
    count = sum(parameter.numel() for parameter in model.parameters())
    del model
    within = True
    for dtype in ("bfloat16", "float32"):
        start = time.perf_counter()
        figures = {name: value / 2**20 for name, value in measure(folder, dtype).items()}
        print(
            f"Llama, {count / 1e9:.2f}B parameters in {dtype}: peak {figures['peak']:.0f} MiB; bound "
            f"{figures['bound']:.0f} MiB = {figures['parameters']:.0f} that stay + 2 x "
            f"{figures['largest_tensor']:.0f}; {time.perf_counter() - start:.0f} s with start-up"
        )
        within &= figures["peak"] <= figures["bound"]
    return within


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        results = [hubert_large(Path(folder) / "hubert"), llama_1b(Path(folder) / "llama")]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
