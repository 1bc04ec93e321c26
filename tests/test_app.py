"""The web demo without a browser: what it refuses, and what it shows. tests/browser drives the page."""

import asyncio
import re

import numpy as np
import pytest
import soundfile

from sparqle_jax import app, audio
from sparqle_jax.demo.speech import Voice, synthesise
from sparqle_jax.sparqle import Segment, SparQLe, Transcript

SENTENCE = "the train to vienna leaves at seven thirty five"
OTHER = "this house was built in nineteen sixty two"
SLIDERS = (1, 0, 1, 1, 0, 64)  # beams, temperature, top-p, repetition penalty, n-gram, tokens


@pytest.fixture(scope="module")
def sparqle() -> SparQLe:
    return SparQLe.from_pretrained()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Two sentences, alone and after another: files."""
    folder = tmp_path_factory.mktemp("spoken")
    waves = [synthesise(text, Voice("en-us", "m3", 200)) for text in (SENTENCE, OTHER)]
    parts = {"one": waves[:1], "two": [waves[0], np.zeros(16_000), waves[1]]}
    for name, part in parts.items():
        soundfile.write(folder / f"{name}.wav", np.concatenate(part), 16_000, subtype="PCM_16")
    return {name: str(folder / f"{name}.wav") for name in parts}


def respond(sparqle, file, task="Transcribe", language="", prompt="", sliders=SLIDERS, max_seconds=600):
    return list(app.respond(sparqle, max_seconds, file, task, language, prompt, *sliders))


def refusal(sparqle, *args, **kwargs) -> str:
    """The one line with which it is refused."""
    ((message, *rest),) = respond(sparqle, *args, **kwargs)
    assert rest == ["", "", ""]
    assert "\n" not in message
    return re.fullmatch(r'<p class="refused" role="alert">(.*)</p>', message)[1]


def test_a_recording_is_answered_as_it_is_heard(sparqle, spoken):
    views = respond(sparqle, spoken["one"])
    texts = [text for _, text, _, _ in views]
    assert texts[0] == ""
    assert texts[-1] == SENTENCE
    assert len(set(texts)) > 2
    assert all(text == SENTENCE[: len(text)] for text in texts)
    message, _, segments, picture = views[-1]
    assert re.search(r"2\.\d s of sound, answered in [\d.]+ s", message)
    assert segments == ""
    assert "Waveform, 2." in picture
    assert picture.count("mask-image") == 1
    assert "mask-image" not in views[0][3]  # the waveform at once, the rest when it is known


def test_it_translates_and_answers(sparqle, spoken):
    german = respond(sparqle, spoken["one"], "Translate", "German")[-1][1]
    assert german == "der zug nach wien fährt um sieben uhr fünfunddreißig"
    assert respond(sparqle, spoken["one"], "Translate", " de ")[-1][1] == german
    assert respond(sparqle, spoken["one"], "Ask", prompt="Translate to German.")[-1][1]


def test_a_long_recording_is_answered_in_pieces(sparqle, spoken):
    _, text, segments, picture = respond(sparqle, spoken["two"])[-1]
    assert text == f"{SENTENCE} {OTHER}"
    assert re.findall("<td>(.*?)</td>", segments) == [SENTENCE, OTHER]
    assert picture.count("mask-image") == 2
    assert text == sparqle.transcribe(spoken["two"]).text


def test_attention_is_not_drawn_for_hours(sparqle, spoken, monkeypatch):
    monkeypatch.setattr(app, "MAX_PICTURED", 3)
    picture = respond(sparqle, spoken["two"])[-1][3]
    assert "mask-image" not in picture
    assert "drawn for recordings of up to 3 s" in picture


def test_sampling_differs_from_time_to_time(sparqle, spoken):
    sliders = (1, 2, 1, 1, 0, 16)
    answers = {respond(sparqle, spoken["one"], sliders=sliders)[-1][1] for _ in range(10)}
    assert len(answers) > 1  # about half of the draws are the sentence itself


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_text("dear diary"), "a&lt;b.wav can&#x27;t be read as a recording"),
        (lambda file: file.write_bytes(b""), "a&lt;b.wav can&#x27;t be read as a recording"),
        (lambda file: None, "not kept any more"),
        (lambda file: soundfile.write(file, np.zeros(8000), 16_000), "a&lt;b.wav: it is silent"),
        (lambda file: soundfile.write(file, np.zeros(0), 16_000), "a&lt;b.wav: it has 0 samples"),
        (lambda file: soundfile.write(file, np.full(8000, np.nan), 16_000, "FLOAT"), "not finite"),
    ],
)
def test_what_is_no_recording_is_refused(sparqle, tmp_path, make, message):
    make(file := tmp_path / "a<b.wav")
    reason = refusal(sparqle, str(file))
    assert message in reason
    assert str(tmp_path) not in reason


def test_long_recordings_are_refused_also_if_their_header_lies(sparqle, spoken, monkeypatch):
    with pytest.raises(app.Refused, match=r"5\.2 s long, but can have at most 3 s"):
        app.check_file(spoken["two"], 3)
    app.check_file(spoken["two"], 6)
    monkeypatch.setattr(audio, "count_samples", lambda file: 0)
    assert "can have at most 3 s" in refusal(sparqle, spoken["two"], max_seconds=3)


def test_it_stops_reading_where_it_is_too_long(sparqle, monkeypatch):
    def endless(file):
        for _ in range(5):
            yield np.ones(16_000, np.float32)
        pytest.fail("it reads on")

    monkeypatch.setattr(audio, "read_blocks", endless)
    assert "at most 3 s" in refusal(sparqle, "endless.wav", max_seconds=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(file=None), "There is no recording yet"),
        (dict(task="Translate", language="klingonish"), "&#x27;klingonish&#x27; is not known as a language"),
        (dict(task="Translate", language=None), "is not known as a language"),
        (dict(task="Ask", prompt=" "), "There is no question yet"),
        (dict(task="Ask", prompt="?" * 501), "501 characters; it can have at most 500"),
        (dict(task="Ask", prompt="why " * 120), "too long for this model"),
        (dict(task="Ask", prompt="<SpeechHere> or <SpeechHere>?"), "&lt;SpeechHere&gt;"),
        (dict(sliders=(2, 0.5, 1, 1, 0, 64)), "Sampling has one beam"),
        (dict(sliders=(1, 0, 1, 1, 0, 0)), "max_new_tokens=0"),
    ],
)
def test_what_can_not_be_asked_is_refused(sparqle, spoken, options, message):
    assert message in refusal(sparqle, **{"file": spoken["one"], **options})


def test_of_what_goes_wrong_here_users_see_nothing(sparqle, spoken, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("the secret of /root")

    monkeypatch.setattr(SparQLe, "stream", fail)
    *_, (message, *_) = respond(sparqle, spoken["one"])
    assert "Something went wrong here" in message
    assert "secret" not in message
    assert "the secret of /root" in caplog.text


def test_texts_are_never_markup():
    segments = [Segment(0, 1.25, "<b>bold"), Segment(61, 62, "b")]
    shown = app.table(Transcript(tuple(segments)))
    assert "&lt;b&gt;bold" in shown
    assert "0:00.0 to 0:01.2" in shown
    assert "1:01.0 to 1:02.0" in shown


def test_examples_are_heard(sparqle, tmp_path):
    for file, sentence in app.make_examples(tmp_path):
        assert respond(sparqle, file)[-1][1] == sentence


def test_without_gradio_it_is_said_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(app, "gr", None)
    assert app.main([]) == 2
    assert "pip install 'sparqle_jax[app]'" in capsys.readouterr().err


@pytest.mark.skipif(app.gr is None, reason="the web demo needs gradio")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["/nowhere"], "is no model folder"), (["--max-seconds", "0"], "--max-seconds 0.0: more than 0")],
)
def test_mistakes_in_the_command_are_said(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        app.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(app.gr is None, reason="the web demo needs gradio")
def test_the_page_queues_and_opens_nothing_else(sparqle):
    page = app.make_app(sparqle, languages=("German",))
    config = page.get_config_file()
    assert page.analytics_enabled is False
    assert page._queue.default_concurrency_limit == 1
    assert page._queue.max_size == app.MAX_WAITING
    assert page.get_api_info()["named_endpoints"] == {}
    labels = [part["props"].get("label") for part in config["components"]]
    assert "Recording, up to 10 minutes and 50 MB" in labels
    recording = next(block for block in page.blocks.values() if isinstance(block, app.gr.Audio))
    with pytest.raises(app.gr.Error, match="not fetched"):
        asyncio.run(recording.async_move_resource_to_block_cache("http://127.0.0.1:1/a.wav"))
