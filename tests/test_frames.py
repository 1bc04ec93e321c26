"""Frames kept in a file: what the encoder gives, computed once, and again when anything in it differs."""

import dataclasses
import pickle

import numpy as np
import pytest

from sparqle_jax import pretrained
from sparqle_jax.data import frames as module
from sparqle_jax.data.dataset import Corpus, DataSet
from sparqle_jax.data.frames import keep_frames
from sparqle_jax.data.pipeline import Waveforms
from sparqle_jax.demo.__main__ import MODELS
from tests.conftest import call


@pytest.fixture(scope="module")
def encoder():
    return pretrained.load_encoder(MODELS / "hubert")


@pytest.fixture
def corpus(small_world) -> Corpus:
    return Corpus([DataSet(small_world / "seen")])


@pytest.fixture
def waveforms(corpus, monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 3)  # so that the last batch is not full
    return Waveforms(corpus, 3.0)


def test_kept_frames_are_the_encoders(waveforms, encoder, tmp_path, monkeypatch):
    kept = keep_frames(tmp_path / "frames", waveforms, encoder)
    for length in (48_000, 52_345):
        speech, rows = waveforms.rows([0, 7], length), kept.rows([0, 7], length)
        frames, mask = call(encoder.__call__, speech["waveform"], speech["waveform_mask"])
        np.testing.assert_array_equal(rows["frames_mask"], mask)
        assert rows["frames"].shape == frames.shape
        real = np.asarray(mask)
        np.testing.assert_allclose(rows["frames"][real], frames[real], rtol=1e-3, atol=1e-3)  # float16

    travelled = pickle.dumps(kept)
    assert len(travelled) < 10_000  # not with its frames
    np.testing.assert_array_equal(pickle.loads(travelled).frames, kept.frames)

    monkeypatch.setattr(module, "_compute", lambda *_: pytest.fail("computed again"))
    again = keep_frames(tmp_path / "frames", waveforms, encoder)
    np.testing.assert_array_equal(again.frames, kept.frames)


def test_another_encoder_or_other_recordings_have_another_file(
    waveforms, encoder, small_world, tmp_path, monkeypatch
):
    def write(out, ends, waveforms, encoder) -> None:
        out.write(bytes(2 * encoder.config.width * int(ends[-1])))

    monkeypatch.setattr(module, "_compute", write)

    def num_files(waveforms, encoder) -> int:
        keep_frames(tmp_path, waveforms, encoder)
        return len(list(tmp_path.iterdir()))

    assert num_files(waveforms, encoder) == 1
    other = Corpus([DataSet(small_world / "unseen")])
    assert num_files(Waveforms(other, 3.0), encoder) == 2
    assert num_files(waveforms, pretrained.load_encoder(MODELS / "hubert", normalize=None)) == 3
    scaled = pretrained.load_encoder(MODELS / "hubert")
    scaled.features.norm.scale.set_value(2 * scaled.features.norm.scale[...])
    assert num_files(waveforms, scaled) == 4
    assert num_files(waveforms, encoder) == 4


def test_stopped_it_goes_on_where_it_was(waveforms, encoder, tmp_path):
    whole = keep_frames(tmp_path / "whole", waveforms, encoder)

    class Stopping(Waveforms):
        def __init__(self):
            self.__dict__.update(waveforms.__dict__)

        def rows(self, indices, num_samples):
            if 5 in indices:
                raise KeyboardInterrupt
            return super().rows(indices, num_samples)

    with pytest.raises(KeyboardInterrupt):
        keep_frames(tmp_path / "stopped", Stopping(), encoder)
    (partial,) = (tmp_path / "stopped").iterdir()
    assert partial.stat().st_size == whole.ends[3] * whole.frames.shape[1] * 2
    with open(partial, "ab") as file:
        file.write(b"half a row")
    again = keep_frames(tmp_path / "stopped", waveforms, encoder)
    np.testing.assert_array_equal(again.frames, whole.frames)
    assert [file.suffix for file in (tmp_path / "stopped").iterdir()] == [".frames"]


def test_no_room_on_the_disk_is_said_at_once(waveforms, encoder, tmp_path, monkeypatch):
    free = dataclasses.make_dataclass("Usage", ["free"])(1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match=r"has 0\.0 GB left: make room, or --set data\.frames=null"):
        keep_frames(tmp_path, waveforms, encoder)
