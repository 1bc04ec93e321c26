"""Synthesised speech, and the data sets made of it."""

import numpy as np
import pytest

from sparqle_jax import audio
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.demo import datasets, grammar, say, speech


def test_speech_has_the_length_and_level_of_speech():
    waveform = speech.synthesise("we meet at the station at seven fifteen", speech.Voice())
    assert 1.0 < len(waveform) / audio.SAMPLE_RATE < 4.0
    assert waveform.dtype == np.float32
    assert 0.05 < np.abs(waveform).max() <= 1.05  # resampling may overshoot a little


def test_a_faster_voice_is_shorter():
    text = "the train to paris leaves at seven fifteen"
    slow, fast = (len(speech.synthesise(text, speech.Voice(rate=rate))) for rate in (160, 240))
    assert fast < 0.8 * slow


def test_every_voice_that_the_miniature_uses_is_there():
    assert set(speech.SEEN).isdisjoint(speech.UNSEEN)
    for variant in (*speech.SEEN, *speech.UNSEEN):
        speech.synthesise("ten", speech.Voice(variant=variant))
    for accent in speech.ACCENTS:
        speech.synthesise("ten", speech.Voice(accent=accent))


@pytest.mark.parametrize(
    ("text", "voice", "message"),
    [
        ("ten", speech.Voice(variant="nobody"), "no voice variant 'nobody'"),
        ("ten", speech.Voice(accent="en-mars"), "no accent 'en-mars'"),
        ("  ", speech.Voice(), "nothing to say"),
    ],
)
def test_what_can_not_be_spoken_is_an_error(text, voice, message):
    with pytest.raises(ValueError, match=message):
        speech.synthesise(text, voice)


def test_world_has_other_sentences_and_voices_for_evaluation(small_world):
    train, seen, unseen = (DataSet(small_world / name) for name in ("train", "seen", "unseen"))
    assert [len(train), len(seen), len(unseen)] == [24, 8, 8]
    assert {u.text for u in train}.isdisjoint(u.text for u in (*seen, *unseen))
    assert {u.speaker.split("+")[1] for u in unseen} <= set(speech.UNSEEN)
    assert {u.speaker.split("+")[1] for u in (*train, *seen)} <= set(speech.SEEN)
    for i, utterance in enumerate(train):
        assert len(train.waveform(i)) == utterance.num_samples
        assert utterance.duration <= datasets.MAX_SECONDS
        assert set(utterance.translations) == set(grammar.LANGUAGES) - {"en"}


def test_a_whole_data_set_stays_a_partial_one_is_made_again_another_is_an_error(tmp_path):
    folder = tmp_path / "some"
    partial = tmp_path / "some.partial"
    partial.mkdir()
    (partial / "000000-0.wav").write_text("cut off")
    datasets.make_data_set(folder, 2, seed=0, voices=("m1",))
    assert not partial.exists()
    first = (folder / "index.arrow").stat().st_mtime_ns
    datasets.make_data_set(folder, 2, seed=0, voices=("m1",))
    assert (folder / "index.arrow").stat().st_mtime_ns == first
    for other in (dict(num=3, seed=0), dict(num=2, seed=1)):
        with pytest.raises(ValueError, match="is there already, and is not the data set"):
            datasets.make_data_set(folder, **other, voices=("m1",))
    assert len(DataSet(folder)) == 2
    assert not list(tmp_path.glob("some.*"))


def test_say_writes_a_recording(tmp_path, capsys):
    say.main(["ten degrees", "--output", str(tmp_path / "a.wav"), "--voice", "f2"])
    assert len(audio.read(tmp_path / "a.wav")) > 5000
    with pytest.raises(SystemExit):
        say.main(["ten", "--voice", "nobody"])
    assert "no voice variant" in capsys.readouterr().err
