"""Everything that the published PyTorch code computes on a tiny model: tensors, losses, gradients.

Further folders of the same format can be given in SPARQLE_GOLDEN, separated by colons.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sparqle_jax import losses, tables
from sparqle_jax.generate import GenerationConfig, generate
from sparqle_jax.model import partition
from sparqle_jax.published import sparqle as published
from tests.conftest import GOLDEN, Golden, call, with_compat

GIVEN = map(Path, filter(None, os.environ.get("SPARQLE_GOLDEN", "").split(":")))
# Folders of adapters are compared by test_golden_adapters.py.
FOLDERS = [GOLDEN, *(folder for folder in GIVEN if (folder / "stage1_numbers.safetensors").exists())]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def aligner(golden):
    return golden.aligner()


@pytest.fixture(scope="module")
def sparqle(golden):
    return golden.sparqle()


def assert_close(actual, expected, tolerance=1e-4):
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_gradients_close(gradients: dict, numbers: dict):
    expected = {k.removeprefix("grad."): v for k, v in numbers.items() if k.startswith("grad.")}
    assert expected, "the folder has no gradients"
    total = np.sqrt(sum(np.square(v).sum() for v in expected.values()))
    for name, value in expected.items():
        # A key's bias adds the same to all scores of a query, which softmax ignores: its gradient is zero,
        # and both sides hold rounding errors. They have to be small beside the whole gradient.
        floor = 1e-5 * total if name.endswith("key.bias") else 0.0
        error = np.linalg.norm(gradients[name] - value)
        assert error <= 1e-3 * np.linalg.norm(value) + floor, name


def stage1_batch(golden) -> dict:
    numbers = golden.numbers[1]
    return dict(
        waveform=numbers["wav"],
        text=numbers["text_ids"].astype(np.int32),
        text_mask=numbers["text_mask"].astype(bool),
        recording_id=numbers["speech_id"].astype(np.int32),
    )


def stage2_batch(golden) -> dict:
    numbers, bos = golden.numbers[2], golden.config["stage2"]["bos_token_id"]
    size = len(numbers["wav"])
    before = np.broadcast_to(numbers["before_ids"], (size, numbers["before_ids"].shape[1]))
    before = np.concatenate([np.full((size, 1), bos), before], 1)
    after = np.broadcast_to(numbers["after_ids"], (size, numbers["after_ids"].shape[1]))
    return dict(
        waveform=numbers["wav"],
        before=before.astype(np.int32),
        before_mask=np.ones(before.shape, bool),
        after=after.astype(np.int32),
        after_mask=np.ones(after.shape, bool),
        answer=numbers["target_ids"].astype(np.int32),
        answer_mask=numbers["target_mask"].astype(bool),
    )


class TestEncoder:
    def test_frames_of_every_layer(self, golden, aligner):
        numbers = golden.numbers[1]
        frames, mask = call(aligner.encoder.__call__, numbers["wav"])
        assert_close(frames, numbers["frames"])
        assert np.asarray(mask).all()
        states, _ = call(aligner.encoder.hidden_states, numbers["wav"])
        assert len(states) == len(numbers["hidden_states_all"])
        for layer, expected in enumerate(numbers["hidden_states_all"]):
            assert_close(states[layer], expected)
        frames, _ = call(aligner.encoder.__call__, numbers["wav"], layer=1)
        assert_close(frames, numbers["hidden_states_all"][1])

    def test_masked_frames(self, golden, aligner):
        numbers = golden.numbers[1]
        mask = numbers["wav_mask"].astype(bool)
        # PyTorch's base models count padding in their norm over time; large ones have no such norm.
        frames, frames_mask = call(
            with_compat(aligner.encoder, "transformers").__call__, numbers["wav"] * mask, mask
        )
        assert_close(frames, numbers["frames_masked"])
        lengths = aligner.encoder.config.num_frames(mask.sum(1))
        np.testing.assert_array_equal(np.asarray(frames_mask).sum(1), lengths)

    def test_published_masks(self, golden, aligner):
        numbers = golden.numbers[1]
        mask = numbers["wav_mask"].astype(bool)
        encoder = with_compat(aligner.encoder, "published")
        unpadded, _ = call(encoder.__call__, numbers["wav"])
        assert_close(unpadded, numbers["frames_published_unpadded"])
        padded, _ = call(encoder.__call__, numbers["wav"] * mask, mask)
        assert_close(padded, numbers["frames_published_padded"])


class TestStage1:
    def test_tensors(self, golden, aligner):
        numbers, batch = golden.numbers[1], stage1_batch(golden)
        frames, heads, ids = jnp.asarray(numbers["frames"]), aligner.heads, batch["recording_id"]
        queries, cache = call(aligner.adapter.encode_queries, frames)
        assert_close(queries, numbers["query_output"])
        text = call(aligner.adapter.encode_text, batch["text"], batch["text_mask"])
        real = batch["text_mask"]
        assert_close(text[real], numbers["text_output"][real])
        speech_features, text_features = heads.speech_features(queries), heads.text_features(text)
        assert_close(speech_features, numbers["speech_feats"])
        assert_close(text_features, numbers["text_feats"])

        similarities = losses.similarity(speech_features, text_features, heads.temperature[...])
        assert_close(similarities, numbers["sim_s2t"])
        assert_close(similarities.T, numbers["sim_t2s"])
        for name, matrix in (("s2t", similarities), ("t2s", similarities.T)):
            weights = jax.nn.softmax(losses.negative_logits(matrix, ids))
            assert_close(weights, numbers[f"neg_weights_{name}"])
            drawn = numbers["neg_text_idx" if name == "s2t" else "neg_speech_idx"]
            np.testing.assert_array_equal(weights.argmax(1), drawn)

        negatives = numbers["neg_speech_idx"], numbers["neg_text_idx"]
        logits = call(aligner.matching_logits, frames, None, batch["text"], batch["text_mask"], negatives)
        assert_close(logits, numbers["stm_logits"])

        decoder_text = batch["text"].copy()
        decoder_text[:, 0] = golden.config["qformer"]["bos_token_id"]
        hidden = call(aligner.adapter.encode_text_causally, decoder_text, batch["text_mask"], cache)
        assert_close(aligner.adapter.lm_logits(hidden)[real], numbers["stg_logits"][real])

    def test_losses_and_gradients(self, golden, aligner):
        numbers, batch = golden.numbers[1], stage1_batch(golden)
        graph, trained, frozen = partition(aligner)
        negatives = numbers["neg_speech_idx"], numbers["neg_text_idx"]

        @jax.jit
        def loss(trained, frozen):
            model = nnx.merge(graph, trained, frozen)
            return model.loss(batch, jax.random.key(0), train=False, negatives=negatives)

        (total, parts), gradients = jax.value_and_grad(loss, has_aux=True)(trained, frozen)
        assert_close(total, numbers["loss"])
        for name in ("stc", "stm", "stg"):
            assert_close(parts[name], numbers[f"loss_{name}"])
        assert_gradients_close(
            tables.export(gradients, published.aligner_table(aligner.adapter.config)), numbers
        )


class TestStage2:
    def test_tensors(self, golden, sparqle):
        numbers, batch = golden.numbers[2], stage2_batch(golden)
        frames, _ = call(sparqle.encoder.__call__, numbers["wav"])
        queries, _ = call(sparqle.adapter.__call__, frames)
        assert_close(queries, numbers["query_output"])
        assert_close(sparqle.projection(queries), numbers["speech_prompt"])
        prompt, prompt_mask = call(sparqle.embed_prompt, batch)
        embeddings = jnp.concatenate([prompt, sparqle.llm.embed(batch["answer"])], 1)
        mask = np.concatenate([prompt_mask, batch["answer_mask"]], 1)
        hidden, _ = call(sparqle.llm.__call__, embeddings, mask)
        assert_close(sparqle.llm.logits(hidden)[mask], numbers["logits"][mask])

    def test_loss_and_gradients(self, golden, sparqle):
        numbers, batch = golden.numbers[2], stage2_batch(golden)
        graph, trained, frozen = partition(sparqle)

        @jax.jit
        def loss(trained, frozen):
            return nnx.merge(graph, trained, frozen).loss(batch, jax.random.key(0), train=False)[0]

        value, gradients = jax.value_and_grad(loss)(trained, frozen)
        assert_close(value, numbers["loss"])
        assert_gradients_close(
            tables.export(gradients, published.sparqle_table(sparqle.adapter.config)), numbers
        )


# What transformers' `generate` was asked for: the names say the rest.
GENERATIONS = {
    "greedy": dict(),
    "beam5": dict(num_beams=5, early_stopping=True),
    "beam5_ngram2": dict(num_beams=5, early_stopping=True, no_repeat_ngram_size=2),
    "beam5_rep1.3_len0.6": dict(num_beams=5, early_stopping=True, repetition_penalty=1.3, length_penalty=0.6),
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generated_tokens(golden, sparqle, name):
    config, batch = golden.config["stage2"], stage2_batch(golden)
    end = config["eos_token_id"]
    settings = GenerationConfig(
        config["max_new_tokens"], eos_token_ids=(end,), pad_token_id=end, **GENERATIONS[name]
    )
    tokens = np.asarray(generate(sparqle, batch, settings))
    expected = golden.numbers[2][name]
    np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
    assert (tokens[:, expected.shape[1] :] == end).all()  # transformers cuts off what all have as padding


@pytest.mark.parametrize("stage", [1, 2])
def test_saved_under_the_published_names(golden, aligner, sparqle, stage, tmp_path):
    """What we save holds each trained tensor of the published file, bit for bit, and nothing else."""
    model = aligner if stage == 1 else sparqle
    published.save(model, tmp_path / "adapter.safetensors")
    saved = load_file(tmp_path / "adapter.safetensors")
    expected = load_file(golden.folder / f"stage{stage}_state_dict.safetensors")
    expected = {k: v for k, v in expected.items() if not k.startswith(("speech_encoder.", "llama_model."))}
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(saved[name], value, name)
