"""Times this project: the encoder, a step of each stage, and decoding; prints a line of JSON for each."""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.sizes import SIZES, Size, prompts, recordings, stage1_batch, stage2_batch, time_of
from sparqle_jax import flops
from sparqle_jax.adapters import qformer
from sparqle_jax.aligner import Aligner, AlignmentHeads
from sparqle_jax.config import OptimConfig
from sparqle_jax.data.pipeline import SKIPPED
from sparqle_jax.encoders import hubert
from sparqle_jax.generate import GenerationConfig, generate, stream
from sparqle_jax.llms import decoder
from sparqle_jax.loop import control
from sparqle_jax.model import Projection, SpeechLLM, partition
from sparqle_jax.sharding import batch_sharding, make_mesh
from sparqle_jax.step import TrainState, make_optimizer, make_update, state_shardings

Result = dict[str, Any]


def make_encoder(size: Size) -> hubert.Encoder:
    dtype = jnp.dtype(size.dtype)
    return hubert.Encoder(hubert.Config(**size.hubert), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))


def make_llm(size: Size) -> decoder.LLM:
    dtype = jnp.dtype(size.dtype)
    return decoder.LLM(decoder.Config(**size.llm), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))


def make_aligner(size: Size) -> Aligner:
    kinds = dict(dtype=jnp.dtype(size.dtype), rngs=nnx.Rngs(0))
    config, encoder = qformer.Config(**size.qformer), make_encoder(size)
    adapter = qformer.Adapter(config, encoder.config.width, vocab_size=size.words, **kinds)
    return Aligner(encoder, adapter, AlignmentHeads(config.width, size.embed_dim, **kinds))


def make_speech_llm(size: Size) -> SpeechLLM:
    kinds = dict(dtype=jnp.dtype(size.dtype), rngs=nnx.Rngs(0))
    config, encoder, llm = qformer.Config(**size.qformer), make_encoder(size), make_llm(size)
    adapter = qformer.Adapter(config, encoder.config.width, **kinds)
    return SpeechLLM(encoder, adapter, Projection(config, llm.config.width, **kinds), llm)


def random_weights(abstract: nnx.State) -> nnx.State:
    """Weights of these shapes, normal(0, 0.02), norms and temperatures as they start."""

    def make(key: jax.Array) -> nnx.State:
        numbers = itertools.count()

        def value(path: tuple, variable: nnx.Variable) -> nnx.Variable:
            x = variable.get_value()
            start = {"scale": 1.0, "temperature": 0.07}.get(path[-1])
            if start is None:
                one = jax.random.fold_in(key, next(numbers))
                drawn = 0.02 * jax.random.normal(one, x.shape, x.dtype)
            else:
                drawn = jnp.full(x.shape, start, x.dtype)
            return variable.replace(drawn)

        return nnx.map_state(value, abstract)

    return jax.jit(make)(jax.random.key(0, impl="rbg"))


def bytes_of(compiled: Any) -> int:
    """The memory that a program needs: what it is given, what it returns and what it works with."""
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return total - memory.alias_size_in_bytes


def time_encoder(size: Size) -> Iterator[Result]:
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make_encoder(size)))
    batch = recordings(*size.encoder)
    state, inputs = random_weights(abstract), jax.device_put((batch["waveform"], batch["waveform_mask"]))
    encode = jax.jit(lambda state, waveform, mask: nnx.merge(graph, state)(waveform, mask)[0])
    began = time.perf_counter()
    compiled = encode.lower(state, *inputs).compile()
    compiling, last = time.perf_counter() - began, []

    def run() -> None:
        last[:] = [compiled(state, *inputs)]

    seconds = time_of(run, lambda: jax.block_until_ready(last), size.seconds)
    work = hubert.Config(**size.hubert).flops(*batch["waveform"].shape)
    yield result("encoder", "{} x {:g} s".format(*size.encoder), seconds, compiling, bytes_of(compiled), work)


def time_step(name: str, size: Size) -> Iterator[Result]:
    """A training step as `loop.train` compiles and runs it, on one device."""
    make, inputs = {"stage1": (make_aligner, stage1_batch), "stage2": (make_speech_llm, stage2_batch)}[name]
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    graph, trained, frozen = partition(nnx.eval_shape(lambda: make(size)))
    optimizer, _ = make_optimizer(OptimConfig(warmup_steps=10), 1000)
    shardings = state_shardings(trained, optimizer, mesh)
    update = make_update(graph, optimizer, shardings)
    trained, frozen = random_weights(trained), random_weights(frozen)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trained)
    state = TrainState(jax.device_put(jnp.int32(0), shardings.step), trained, moments)
    state = jax.device_put(state, shardings)
    batch = inputs(size)
    batch[SKIPPED] = np.zeros(len(batch["waveform"]), bool)
    batch = jax.device_put(batch, batch_sharding(mesh))
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = update.trace(state, frozen, batch, control(mesh, 0, 1, 0))
    compiled = traced.lower().compile()
    compiling, steps = time.perf_counter() - began, iter(range(1, 10**6))
    box = {"state": state}
    del state, trained, moments

    def run() -> None:
        box["state"], box["metrics"] = compiled(box["state"], frozen, batch, control(mesh, 0, next(steps), 0))

    seconds = time_of(run, lambda: jax.block_until_ready(box), size.seconds)
    assert bool(box["metrics"]["finite"])
    work = flops.count(traced.jaxpr).model
    shape = size.stage1 if name == "stage1" else size.stage2
    yield result(name, "{} x {:g} s".format(*shape), seconds, compiling, bytes_of(compiled), work)


def time_decoding(size: Size) -> Iterator[Result]:
    """Greedy answers of `written` tokens to prompts of text: encoder and adapter do not run."""
    small = {**SIZES["tiny"].__dict__, "llm": size.llm, "dtype": size.dtype}
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make_speech_llm(Size(**small))))
    model = nnx.merge(graph, random_weights(abstract))
    settings = GenerationConfig(size.written, eos_token_ids=(2,), min_new_tokens=size.written)
    for number in size.decoding:
        before, nothing = prompts(size, number), np.zeros((number, 0), np.int32)
        batch = dict(before=before, before_mask=np.ones_like(before, bool))
        batch |= dict(after=nothing, after_mask=nothing.astype(bool))
        began = time.perf_counter()
        generate(model, batch, settings)
        compiling, totals, prefills = time.perf_counter() - began, [], []
        for _ in range(5):
            began = time.perf_counter()
            pieces = stream(model, batch, settings)
            next(pieces)
            prefills.append(time.perf_counter() - began)
            for _ in pieces:
                pass
            totals.append(time.perf_counter() - began)
        seconds, prefill = statistics.median(totals), statistics.median(prefills)
        case = f"batch {number}, {size.read} + {size.written} tokens"
        row = result("decoding", case, seconds, compiling - seconds, None, None)
        yield row | {"prefill_seconds": prefill, "tokens_per_second": number * size.written / seconds}


def result(
    work: str, case: str, seconds: float, compiling: float, memory: int | None, operations: int | None
) -> Result:
    row = {"work": work, "case": case, "seconds": seconds, "compile_seconds": compiling}
    if memory is not None:
        row["bytes"] = memory
    if operations is not None:
        row |= {"flops": operations, "tflops_per_second": operations / seconds / 1e12}
    return row


WORKS: dict[str, Callable[[Size], Iterator[Result]]] = {
    "encoder": time_encoder,
    "stage1": lambda size: time_step("stage1", size),
    "stage2": lambda size: time_step("stage2", size),
    "decoding": time_decoding,
}


def main(size: str, *works: str) -> None:
    """size: a key of SIZES, or empty: as the device is."""
    device = jax.devices()[0]
    size = size or ("cpu" if device.platform == "cpu" else "accelerator")
    versions = f"jax {jax.__version__}, flax {flax.__version__}"
    print(json.dumps({"versions": versions, "device": device.device_kind, "size": size}))
    for work in works:
        for row in WORKS[work](SIZES[size]):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
