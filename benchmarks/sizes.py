"""Sizes of what is timed, and its inputs: the same for this project and for PyTorch."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RATE = 16_000
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
LARGE |= dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
QFORMER = dict(num_queries=100, cross_attention_freq=2, max_position_embeddings=512) | BASE


def llm(
    vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int, head: int
) -> dict[str, Any]:
    """Fields of a Llama's configuration, its embeddings shared with the output."""
    return dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        max_position_embeddings=8192,
    )


@dataclasses.dataclass(frozen=True)
class Size:
    """hubert, qformer, llm: fields of their configurations, under transformers' names. words: the vocabulary
    of stage 1's texts. Stages have (recordings, seconds); texts, prompts and answers are in tokens."""

    hubert: dict[str, Any]
    qformer: dict[str, Any]
    llm: dict[str, Any]
    dtype: str
    words: int = 30_523
    embed_dim: int = 256
    encoder: tuple[int, float] = (16, 15.0)
    stage1: tuple[int, float] = (32, 10.0)
    text: int = 64
    stage2: tuple[int, float] = (16, 15.0)
    prompt: tuple[int, int] = (25, 15)
    answer: int = 40
    decoding: tuple[int, ...] = (1, 8, 32)
    read: int = 140
    written: int = 64
    seconds: float = 0.5  # to time each, five times


SIZES = {
    "tiny": Size(
        hubert=BASE
        | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        | dict(conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2),
        qformer=QFORMER
        | dict(num_queries=6, hidden_size=24, num_hidden_layers=4, num_attention_heads=2)
        | dict(intermediate_size=48, max_position_embeddings=32),
        llm=llm(103, 32, 64, 2, 4, 2, 8),
        dtype="float32",
        words=101,
        embed_dim=8,
        encoder=(2, 1.0),
        stage1=(3, 1.0),
        text=8,
        stage2=(2, 1.0),
        prompt=(5, 3),
        answer=6,
        decoding=(1, 2),
        read=12,
        written=8,
        seconds=0.01,
    ),
    "cpu": Size(
        hubert=BASE,
        qformer=QFORMER,
        llm=llm(151_936, 896, 4864, 24, 14, 2, 64),
        dtype="float32",
        encoder=(2, 10.0),
        stage1=(4, 5.0),
        text=32,
        stage2=(2, 5.0),
        answer=20,
        decoding=(1, 8),
        written=16,
    ),
    "accelerator": Size(
        hubert=LARGE, qformer=QFORMER, llm=llm(128_256, 2048, 8192, 16, 32, 8, 64), dtype="bfloat16"
    ),
    "accelerator-8b": Size(
        hubert=LARGE,
        qformer=QFORMER,
        llm=llm(128_256, 4096, 14_336, 32, 32, 8, 128) | dict(tie_word_embeddings=False),
        dtype="bfloat16",
        stage2=(8, 15.0),
    ),
}


def recordings(batch: int, seconds: float) -> dict[str, np.ndarray]:
    """Noise float32 [B, S] and its mask bool [B, S]: padded by up to 14%."""
    rng, samples = np.random.default_rng(0), round(seconds * RATE)
    lengths = rng.integers(round(0.86 * samples), samples + 1, batch)
    lengths[0] = samples
    mask = np.arange(samples) < lengths[:, None]
    noise = rng.standard_normal((batch, samples), np.float32)
    return {"waveform": np.where(mask, noise, 0), "waveform_mask": mask}


def stage1_batch(size: Size) -> dict[str, np.ndarray]:
    """A batch of stage 1 (see `Aligner`)."""
    rng, (batch, seconds) = np.random.default_rng(1), size.stage1
    return recordings(batch, seconds) | {
        "text": rng.integers(1, size.words - 2, (batch, size.text), dtype=np.int32),
        "text_mask": np.arange(size.text) < rng.integers(size.text // 2, size.text + 1, (batch, 1)),
        "recording_id": np.arange(batch, dtype=np.int32),
    }


def stage2_batch(size: Size) -> dict[str, np.ndarray]:
    """A batch of stage 2 (see `SpeechLLM`): prompts padded on the left, answers on the right."""
    rng, (number, seconds) = np.random.default_rng(2), size.stage2
    batch = recordings(number, seconds)
    for name, length in (("before", size.prompt[0]), ("after", size.prompt[1]), ("answer", size.answer)):
        batch[name] = rng.integers(1, size.llm["vocab_size"], (number, length), dtype=np.int32)
        real = np.arange(length) < rng.integers(max(1, length - 4), length + 1, (number, 1))
        batch[f"{name}_mask"] = real if name == "answer" else real[:, ::-1].copy()
    return batch


def prompts(size: Size, batch: int) -> np.ndarray:
    """Prompts int32 [B, L] of text alone, none of their tokens the end of an answer (2)."""
    rng = np.random.default_rng(3)
    return rng.integers(3, size.llm["vocab_size"], (batch, size.read), dtype=np.int32)


def time_of(run: Callable[[], Any], wait: Callable[[], Any], seconds: float) -> float:
    """Seconds of one run: the median of five groups of runs that follow one another without waiting."""
    run()
    wait()
    began = time.perf_counter()
    run()
    wait()
    number = max(1, min(20, round(seconds / (time.perf_counter() - began))))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(number):
            run()
        wait()
        times.append((time.perf_counter() - began) / number)
    return statistics.median(times)
