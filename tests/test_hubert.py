import dataclasses

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_jax.encoders.hubert import Config as HubertConfig
from sparqle_jax.encoders.hubert import Encoder as Hubert
from sparqle_jax.encoders.wav2vec2 import normalise
from tests.conftest import call, with_compat

LARGE = HubertConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    feat_extract_norm="layer",
    conv_dim=(8,) * 7,
    conv_bias=True,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    do_stable_layer_norm=True,
)
BASE = dataclasses.replace(LARGE, feat_extract_norm="group", conv_bias=False, do_stable_layer_norm=False)


@pytest.fixture(scope="module", params=[BASE, LARGE], ids=["base", "large"])
def hubert(request):
    return Hubert(request.param, rngs=nnx.Rngs(0))


def test_twenty_milliseconds_per_frame():
    config = HubertConfig()
    assert [config.num_frames(n) for n in (399, 400, 719, 720, 16_000)] == [0, 1, 1, 2, 49]
    assert config.min_samples == 400


def test_config_of_transformers():
    config = HubertConfig.from_dict({"model_type": "hubert", "conv_dim": [4] * 7, "hidden_dropout": 0.1})
    assert config == HubertConfig(conv_dim=(4,) * 7)
    with pytest.raises(ValueError, match="conv_pos_batch_norm=True is not supported"):
        HubertConfig.from_dict({"conv_pos_batch_norm": True})
    with pytest.raises(ValueError, match="7, 7 and 6 entries"):
        HubertConfig.from_dict({"conv_kernel": [3] * 6})


@pytest.mark.parametrize("how", [None, "variance", "peak"])
def test_normalised_over_what_is_real(how):
    """By hand, each waveform for itself; silence stays silence, and padding zero."""
    rng = np.random.default_rng(0)
    waveforms = [rng.normal(0.2, 0.1, 900), rng.normal(0, 3, 500), np.zeros(400)]
    batch = np.zeros((3, 1000), np.float32)
    mask = np.zeros(batch.shape, bool)
    expected = batch.copy()
    for row, waveform in enumerate(waveforms):
        batch[row, : len(waveform)], mask[row, : len(waveform)] = waveform, True
        if how == "variance":
            waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        if how == "peak":
            waveform = waveform / (np.abs(waveform).max() or 1)
        expected[row, : len(waveform)] = waveform
    np.testing.assert_allclose(normalise(batch, mask, how), expected, atol=1e-5)
    np.testing.assert_allclose(normalise(batch[:1, :900], None, how), expected[:1, :900], atol=1e-5)


def test_normalised_as_the_folder_says():
    settings = {"model_type": "hubert"}
    assert HubertConfig.from_dict(settings, {}).normalize == "variance"
    assert HubertConfig.from_dict(settings, {"do_normalize": False}).normalize is None
    assert HubertConfig.from_dict(settings).normalize is None


# Lengths at and around frame borders, one size of the padded batch: one compiled program.
lengths = st.integers(400, 3000)


@settings(max_examples=15, deadline=None)
@given(lengths=st.tuples(lengths, lengths), seed=st.integers(0, 2**16))
def test_padding_changes_nothing(hubert, lengths, seed):
    """In a padded batch, whatever stands in the padding, each example has the frames that it has alone."""
    rng = np.random.default_rng(seed)
    batch = rng.normal(size=(2, 3200)).astype(np.float32)
    mask = np.arange(3200) < np.array(lengths)[:, None]
    frames, frames_mask = call(hubert.__call__, batch, mask)
    for row, length in enumerate(lengths):
        alone = np.where(mask[row], batch[row], 0)[None]
        # "Alone" is a batch of another padding; the exact length would compile anew for each example.
        padded = np.pad(alone[:, :length], ((0, 0), (0, 3200 + 320 - length)))
        alone_frames, alone_mask = call(hubert.__call__, padded, np.arange(3520)[None] < length)
        count = hubert.config.num_frames(length)
        assert np.asarray(frames_mask[row]).sum() == np.asarray(alone_mask).sum() == count
        np.testing.assert_allclose(frames[row, :count], alone_frames[0, :count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [400, 1999, 3200])
def test_without_padding(hubert, length):
    """The same, against a waveform that is not padded at all."""
    waveform = np.random.default_rng(0).normal(size=(1, length)).astype(np.float32)
    alone, _ = call(hubert.__call__, waveform)
    padded = np.pad(waveform, ((0, 0), (0, 3200 + 320 - length)))
    frames, _ = call(hubert.__call__, padded, np.arange(3520)[None] < length)
    np.testing.assert_allclose(frames[:, : alone.shape[1]], alone, atol=1e-5, rtol=1e-4)


def test_transformers_counts_padding_in_the_norm_over_time():
    hubert = Hubert(BASE, rngs=nnx.Rngs(0))
    waveform = np.random.default_rng(0).normal(size=(1, 3520)).astype(np.float32)
    mask = np.arange(3520)[None] < 2000
    exact, _ = call(hubert.__call__, waveform * mask, mask)
    theirs = with_compat(hubert, "transformers")
    as_transformers, _ = call(theirs.__call__, waveform * mask, mask)
    assert np.abs(exact - as_transformers)[:, :5].max() > 1e-3


@pytest.mark.parametrize(
    ("padding", "kept"), [(0, 10), (79, 10), (80, 11), (399, 11), (400, 1), (720, 2), (1040, 3)]
)
def test_published_mask_keeps_as_many_frames_as_there_is_padding(hubert, padding, kept):
    waveform = np.ones((1, 3760), np.float32)  # 11 frames
    mask = np.arange(3760)[None] < 3760 - padding
    _, frames_mask = call(with_compat(hubert, "published").__call__, waveform, mask)
    assert frames_mask.shape == (1, 11)
    assert np.asarray(frames_mask).sum() == kept


def test_layers():
    hubert = Hubert(LARGE, rngs=nnx.Rngs(0))
    waveform = np.random.default_rng(0).normal(size=(1, 1600)).astype(np.float32)
    states, _ = call(hubert.hidden_states, waveform)
    assert states.shape == (3, 1, 4, 16)
    for layer in range(3):
        frames, _ = call(hubert.__call__, waveform, layer=layer)
        np.testing.assert_allclose(frames, states[layer], atol=1e-5)
    last, _ = call(hubert.__call__, waveform)
    np.testing.assert_allclose(last, states[-1], atol=1e-5)
    with pytest.raises(ValueError, match="layer=3 does not exist: this encoder has layers 0 to 2"):
        hubert(waveform, layer=3)


def test_shorter_than_a_frame():
    with pytest.raises(ValueError, match="399 samples gives no frame; at least 400"):
        Hubert(LARGE, rngs=nnx.Rngs(0))(np.zeros((1, 399), np.float32))


def test_unknown_compat():
    with pytest.raises(ValueError, match=r"must be one of \[None, 'published', 'transformers'\], got 'x'"):
        dataclasses.replace(LARGE, compat="x")


def test_unknown_remat():
    with pytest.raises(ValueError, match=r"remat='all' is not .* one of \['dots', 'full'\]"):
        Hubert(LARGE, remat="all", rngs=nnx.Rngs(0))
