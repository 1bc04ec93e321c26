"""The miniature that comes with the package, through the commands: it hears, and says what it can't hear."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr

from sparqle_jax import audio, evaluate, transcribe
from sparqle_jax.data import prepare
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.demo import say
from sparqle_jax.transcribe import MINIATURE, Listener

SENTENCE = "the train to vienna leaves at seven thirty five"


@pytest.fixture(scope="module")
def listener() -> Listener:
    return Listener.from_folder(MINIATURE)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A sentence as a user has it synthesised."""
    file = tmp_path_factory.mktemp("say") / "say.wav"
    say.main([SENTENCE, "--output", str(file)])
    return file


def test_a_typed_sentence_is_heard(spoken, capsys):
    assert transcribe.main([str(spoken)]) == 0
    assert capsys.readouterr().out.strip() == SENTENCE


def test_it_translates_what_it_was_never_taught_to_translate(spoken, capsys):
    assert transcribe.main([str(spoken), "--translate", "German"]) == 0
    answer = capsys.readouterr().out.strip()
    right = "der zug nach wien fährt um sieben uhr fünfunddreißig"
    assert evaluate.score("de", [right], [answer])["chrf"] > 60


def test_any_rate_and_channels_are_heard_the_same(spoken, tmp_path, capsys):
    waveform, rate = soundfile.read(spoken)
    stereo = np.repeat(soxr.resample(waveform, rate, 44_100)[:, None], 2, 1)
    soundfile.write(tmp_path / "stereo.flac", stereo, 44_100)
    assert transcribe.main([str(tmp_path / "stereo.flac")]) == 0
    assert capsys.readouterr().out.strip() == SENTENCE


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros(16_000), "it is silent"),
        (np.zeros(0), "it has 0 samples at 16 kHz; at least 400 are needed"),
        (np.random.default_rng(0).normal(0, 0.1, 80_000), "5.0 s long, but .* at most 3 s: cut it"),
    ],
)
def test_what_can_not_be_heard_is_said(waveform, message, tmp_path, capsys, spoken):
    file = tmp_path / "odd.wav"
    soundfile.write(file, waveform, 16_000)
    assert transcribe.main([str(file), str(spoken)]) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.out.strip() == SENTENCE  # the others are done all the same


def test_noise_gets_an_answer(tmp_path, capsys):
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 24_000), 16_000)
    assert transcribe.main([str(tmp_path / "noise.wav")]) == 0


def test_a_missing_recording_or_model_is_said(tmp_path, capsys, spoken):
    assert transcribe.main([str(tmp_path / "none.wav")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        transcribe.main([str(spoken), "--model", str(tmp_path)])
    assert "has no model.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        transcribe.main([str(spoken), "--translate", "klingonish"])


def test_an_answer_that_is_cut_is_said_to_be(spoken):
    with pytest.warns(UserWarning, match="1 of 1 answers have no end within max_new_tokens=2 tokens"):
        transcribe.main([str(spoken), "--max-new-tokens", "2"])


def test_a_model_is_loaded_in_the_precision_that_it_was_trained_in(tmp_path):
    settings = json.loads((MINIATURE / "model.json").read_text())
    towers = {name: str((MINIATURE / settings[name]).resolve()) for name in ("encoder", "llm")}
    (tmp_path / "model.json").write_text(json.dumps(settings | towers | {"dtype": "bfloat16"}))
    shutil.copy(MINIATURE / "adapter.safetensors", tmp_path)
    model = Listener.from_folder(tmp_path).model
    for part in (model.encoder, model.adapter, model.llm):
        assert part.dtype == jnp.bfloat16


def test_a_batch_gives_what_single_recordings_give(listener, small_world):
    data = DataSet(small_world / "heard")
    waveforms = [data.waveform(i) for i in range(len(data))]
    together = listener.answer(waveforms, batch_size=8)
    assert together == [listener.answer([waveform], batch_size=1)[0] for waveform in waveforms]
    assert together[::-1] == listener.answer(waveforms[::-1], batch_size=8)


def test_a_waveform_that_can_not_be_heard_is_named_by_its_number_among_all(listener, spoken):
    heard = audio.read(spoken)
    with pytest.raises(ValueError, match="waveform 2: it is silent"):
        listener.answer([heard, heard, np.zeros(16_000, np.float32)], batch_size=1)


def test_evaluation_through_its_command(small_world, tmp_path, capsys):
    output = tmp_path / "scores.json"
    arguments = [str(small_world / "heard"), "--translate", "fr", "de", "es", "--output", str(output)]
    evaluate.main(arguments)
    heard = json.loads(output.read_text())
    assert heard["scores"]["transcribe"]["wer"] < 0.15
    assert len(heard["answers"]) == 8
    evaluate.main([*arguments, "--from-text"])
    written = json.loads(output.read_text())["scores"]
    assert written["transcribe"]["wer"] < 0.05
    for code in ("fr", "de", "es"):
        assert written[code]["bleu"] > 80
        assert heard["scores"][code]["bleu"] > 40
    assert "WER" in capsys.readouterr().out


def test_evaluation_names_the_recording_that_is_too_long(tmp_path, capsys):
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 80_000), 16_000)
    (tmp_path / "m.jsonl").write_text('{"id": "u7", "audio": "long.wav", "text": "noise"}\n')
    arguments = ["manifest", str(tmp_path / "data"), "--manifest", str(tmp_path / "m.jsonl")]
    assert prepare.main([*arguments, "--beam", "runner=DirectRunner"]) == 0
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "data")])
    assert "utterance u7 of" in (message := capsys.readouterr().err)
    assert "it is 5.0 s long, but can have at most 3 s" in message


def test_evaluation_says_which_folder_is_missing(small_world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([str(small_world / "heard"), "--output", str(tmp_path / "nowhere" / "scores.json")])
    assert "nowhere is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path)])
    assert "is no data set: it has no index.arrow" in capsys.readouterr().err
