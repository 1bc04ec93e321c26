"""Frames kept in a file: what the encoder gives, computed once, and again when anything in it differs."""

import dataclasses
import os

import numpy as np
import pytest

from sparqle_jax import audio, pretrained
from sparqle_jax.data import frames as module
from sparqle_jax.data.frames import keep_frames
from sparqle_jax.data.manifest import read_manifest
from sparqle_jax.data.pipeline import Waveforms
from sparqle_jax.demo.__main__ import MODELS
from tests.conftest import call


@pytest.fixture(scope="module")
def encoder():
    return pretrained.load_hubert(MODELS / "hubert")


@pytest.fixture
def waveforms(small_world, monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 3)  # so that the last batch is not full
    return Waveforms(read_manifest(small_world / "heard"), audio.FeatureExtractor(), 3.0)


def test_kept_frames_are_the_encoders(waveforms, encoder, tmp_path, monkeypatch):
    kept = keep_frames(tmp_path / "frames", waveforms, encoder)
    assert len(kept.rows) == len(waveforms)
    for index in (0, 7):
        row, speech = kept[index], waveforms[index]
        frames, mask = call(encoder.__call__, speech["waveform"][None], speech["waveform_mask"][None])
        np.testing.assert_array_equal(row["frames_mask"], mask[0])
        np.testing.assert_allclose(row["frames"], frames[0], rtol=1e-3, atol=1e-3)  # float16

    monkeypatch.setattr(module, "_compute", lambda *_: pytest.fail("computed again"))
    again = keep_frames(tmp_path / "frames", waveforms, encoder)
    np.testing.assert_array_equal(again.rows, kept.rows)


def test_another_encoder_or_other_recordings_have_another_file(waveforms, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_compute", lambda out, row, *_: out.write(bytes(row.itemsize)))

    def num_files(waveforms, encoder) -> int:
        keep_frames(tmp_path, waveforms, encoder)
        return len(list(tmp_path.iterdir()))

    assert num_files(waveforms, encoder) == 1
    assert num_files(Waveforms(waveforms.utterances[:7], waveforms.extractor, 3.0), encoder) == 2
    assert num_files(Waveforms(waveforms.utterances, waveforms.extractor, 2.99), encoder) == 3
    other = audio.FeatureExtractor(do_normalize=False)
    assert num_files(Waveforms(waveforms.utterances, other, 3.0), encoder) == 4
    scaled = pretrained.load_hubert(MODELS / "hubert")
    scaled.feature_norm.scale.set_value(2 * scaled.feature_norm.scale[...])
    assert num_files(waveforms, scaled) == 5
    os.utime(waveforms.utterances[0].audio, (0, 0))
    assert num_files(waveforms, encoder) == 6


def test_stopped_it_goes_on_where_it_was(waveforms, encoder, tmp_path):
    whole = keep_frames(tmp_path / "whole", waveforms, encoder)

    class Stopping(Waveforms):
        def __init__(self):
            self.__dict__.update(waveforms.__dict__)

        def __getitem__(self, index):
            if index == 5:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        keep_frames(tmp_path / "stopped", Stopping(), encoder)
    (partial,) = (tmp_path / "stopped").iterdir()
    assert partial.stat().st_size == 3 * whole.rows.itemsize
    with open(partial, "ab") as file:
        file.write(b"half a row")
    again = keep_frames(tmp_path / "stopped", waveforms, encoder)
    np.testing.assert_array_equal(again.rows, whole.rows)
    assert [file.suffix for file in (tmp_path / "stopped").iterdir()] == [".frames"]


def test_no_room_on_the_disk_is_said_at_once(waveforms, encoder, tmp_path, monkeypatch):
    free = dataclasses.make_dataclass("Usage", ["free"])(1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match=r"has 0\.0 GB left: make room, or --set data\.frames=null"):
        keep_frames(tmp_path, waveforms, encoder)
