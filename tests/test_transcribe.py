"""The miniature that comes with the package, through the commands: it hears, and says what it can't hear."""

import io
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
import soundfile
import soxr

from sparqle_jax import audio, scores, transcribe
from sparqle_jax.demo import say
from sparqle_jax.demo.speech import Voice, synthesise
from sparqle_jax.sparqle import Segment, Transcript

SENTENCE = "the train to vienna leaves at seven thirty five"


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
    assert scores.score("de", [right], [answer])["chrf"] > 60


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
    ],
)
def test_what_can_not_be_heard_is_said(waveform, message, tmp_path, capsys, spoken):
    file = tmp_path / "odd.wav"
    soundfile.write(file, waveform, 16_000)
    assert transcribe.main([str(file), str(spoken)]) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.out == f"{spoken}\t{SENTENCE}\n"  # the others are done all the same


def test_noise_gets_an_answer(tmp_path, capsys):
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 24_000), 16_000)
    assert transcribe.main([str(tmp_path / "noise.wav")]) == 0


def test_a_missing_recording_or_model_is_said(tmp_path, capsys, spoken):
    assert transcribe.main([str(tmp_path / "none.wav")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        transcribe.main([str(spoken), "--model", str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        transcribe.main([str(spoken), "--translate", "klingonish"])


def test_an_answer_that_is_cut_is_said_to_be(spoken, capsys):
    assert transcribe.main([str(spoken), "--max-new-tokens", "2", "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert f"{spoken}: an answer has no end within max_new_tokens=2 tokens" in captured.err
    answer = json.loads(captured.out)
    assert (answer["complete"], answer["segments"][0]["complete"]) == (False, False)
    assert transcribe.main([str(spoken), "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert "no end" not in captured.err
    answer = json.loads(captured.out)
    assert (answer["complete"], answer["segments"][0]["complete"]) == (True, True)


def test_equal_names_collide_nowhere(spoken, tmp_path, capsys):
    """Without --output there is nothing to collide; with it, endings tell them apart."""
    shutil.copy(spoken, tmp_path / "a.wav")
    waveform, rate = soundfile.read(spoken)
    soundfile.write(tmp_path / "a.flac", waveform, rate)
    (tmp_path / "other").mkdir()
    shutil.copy(spoken, tmp_path / "other" / "a.wav")
    files = [str(tmp_path / name) for name in ("a.wav", "a.flac", "other/a.wav", "a.wav")]
    assert transcribe.main(files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{file}\t{SENTENCE}" for file in files[:3]]  # given twice, it is heard once
    out = tmp_path / "out"
    for _ in range(2):
        assert transcribe.main([*files[:2], "--output", str(out)]) == 0
        assert sorted(file.name for file in out.iterdir()) == ["a.flac.txt", "a.wav.txt"]
    assert "2 are done already" in capsys.readouterr().err


def test_what_has_no_recordings_ends_nothing(spoken, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    names = [str(tmp_path / "empty"), str(spoken), str(tmp_path / "*.mp3"), str(tmp_path / "none.wav")]
    assert transcribe.main(names) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{spoken}\t{SENTENCE}\n"
    for name in (names[0], names[2]):
        assert f"{name} has no recordings: looked for" in captured.err
    assert "none.wav does not exist" in captured.err
    assert "3 of 4 could not be heard" in captured.err


def test_a_name_that_users_gave_is_tried_whatever_its_ending(spoken, tmp_path, capsys):
    shutil.copy(spoken, tmp_path / "a.recording")
    assert transcribe.main([str(tmp_path / "a.recording")]) == 0
    assert capsys.readouterr().out.strip() == SENTENCE


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Two sentences in a recording of 6.6 s; the miniature hears 3 s at once."""
    sentences = ("my sister has seventy six flowers", "the exam is on sunday the fourth of february")
    parts = [synthesise(sentence, Voice("en-us", "m3", 200)) for sentence in sentences]
    silence = np.zeros(round(1.2 * audio.SAMPLE_RATE), np.float32)
    waveform = np.concatenate([part for one in parts for part in (silence, one)])
    file = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(file, waveform, audio.SAMPLE_RATE, subtype="PCM_16")
    return file, sentences, [len(part) / audio.SAMPLE_RATE for part in parts]


def test_a_long_recording_becomes_subtitles(talk, tmp_path, capsys):
    file, sentences, lengths = talk
    starts = [1.2, 2.4 + lengths[0]]
    assert transcribe.main([str(file), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == " ".join(sentences)
    for segment, sentence, start, length in zip(found["segments"], sentences, starts, lengths, strict=True):
        assert segment["text"] == sentence
        assert segment["start"] == pytest.approx(start, abs=0.05)
        assert segment["end"] == pytest.approx(start + length, abs=0.1)
    for form in ("srt", "vtt", "tsv", "text"):
        assert transcribe.main([str(file), "--format", form, "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert re.fullmatch(
        r"1\n00:00:01,\d{3} --> 00:00:0\d,\d{3}\nmy sister .*\n\n2\n.* --> .*\nthe exam .*\n",
        (tmp_path / "out" / "talk.srt").read_text(),
    )
    assert re.match(
        r"WEBVTT\n\n00:00:01\.\d{3} --> 00:00:0\d\.\d{3}\nmy", (tmp_path / "out" / "talk.vtt").read_text()
    )
    assert (tmp_path / "out" / "talk.tsv").read_text().splitlines()[0] == "start\tend\ttext"
    assert (tmp_path / "out" / "talk.txt").read_text() == " ".join(sentences) + "\n"


def test_formats_of_what_is_hard_to_format():
    transcript = Transcript(
        (Segment(0, 3599.9996, "a <b> & c"), Segment(3600, 3601.5, ""), Segment(4000, 4001, "d\te"))
    )
    assert transcript.text == "a <b> & c d\te"
    assert transcribe.as_srt(transcript).startswith(
        "1\n00:00:00,000 --> 01:00:00,000\na <b> & c\n\n2\n01:06:40"
    )
    assert "a &lt;b&gt; &amp; c" in transcribe.as_vtt(transcript)
    assert transcribe.as_tsv(transcript).splitlines()[2] == '4000\t4001\t"d\te"'


def test_folders_and_globs_go_on_where_they_were_stopped(spoken, talk, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(spoken, folder / "a.wav")
    shutil.copy(talk[0], folder / "deep" / "a.wav")
    (folder / "notes.txt").write_text("not a recording")
    (folder / "broken.wav").write_text("not a recording either")
    assert transcribe.main([str(folder), "--output", str(out)]) == 1
    assert "broken.wav can't be read as a recording" in capsys.readouterr().err
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.*")) == ["a.txt", "deep/a.txt"]
    (out / "a.txt").write_text("mine\n")
    (out / "deep" / "a.txt").unlink()
    assert transcribe.main([str(folder), "--output", str(out)]) == 1
    assert "1 are done already, 2 are left" in capsys.readouterr().err
    assert (out / "a.txt").read_text() == "mine\n"
    assert (out / "deep" / "a.txt").read_text() == " ".join(talk[1]) + "\n"
    assert transcribe.main([str(folder / "*.wav"), "--output", str(out), "--overwrite"]) == 1
    assert (out / "a.txt").read_text() == SENTENCE + "\n"


def test_a_recording_comes_through_stdin(spoken, monkeypatch, capsys):
    with open(spoken, "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read())))
    assert transcribe.main(["-"]) == 0
    assert capsys.readouterr().out.strip() == SENTENCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], "has no recordings: looked for"),
        (["SPOKEN", "TALK", "--format", "srt"], "--format srt of several recordings needs --output"),
        (["SPOKEN", "OTHER/say.wav", "--output", "OUT"], "would both be called say.wav in --output"),
        (["SPOKEN", "--num-beams", "0"], "num_beams"),
        (["SPOKEN", "--num-beams", "2", "--temperature", "0.5"], "beams"),
        (["SPOKEN", "--translate", "klingonish"], "neither a language's name nor its code"),
        (["SPOKEN", "--prompt", "<SpeechHere> or <SpeechHere>?"], "2 places for the speech"),
        (["SPOKEN", "--batch-size", "0"], "at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(arguments, message, spoken, talk, tmp_path, capsys):
    places = {
        "EMPTY": tmp_path,
        "OUT": tmp_path / "out",
        "SPOKEN": spoken,
        "TALK": talk[0],
        "OTHER/say.wav": tmp_path / "say.wav",
    }
    with pytest.raises(SystemExit) as stopped:
        transcribe.main([str(places.get(argument, argument)) for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


KINDS = ["bytes", "cut", "header", "empty", "text", "nan", "channels", "rate", "shuffled", "tiny"]
KINDS += ["twice", "sizes", "quiet", "phase", "junk"]


def mutated(rng: np.random.Generator, recording: bytes, waveform: np.ndarray) -> tuple[str, bytes]:
    """A file that may be broken, and what is the matter with it."""
    kind = rng.choice(KINDS)
    made = io.BytesIO()
    if kind == "bytes":
        spoiled = bytearray(recording)
        for place in rng.integers(0, len(spoiled), rng.integers(1, 200)):
            spoiled[place] = rng.integers(256)
        return kind, bytes(spoiled)
    if kind == "cut":
        return kind, recording[: rng.integers(0, len(recording))]
    if kind == "header":
        return kind, rng.bytes(64) + recording[64:]
    if kind == "empty":
        return kind, b""
    if kind == "text":
        return kind, b"This is a text, not a recording.\n" * int(rng.integers(1, 100))
    if kind == "nan":
        spoiled = waveform.copy()
        spoiled[rng.integers(0, len(spoiled), 5)] = rng.choice([np.nan, np.inf])
        soundfile.write(made, spoiled, 16_000, format="WAV", subtype="FLOAT")
    if kind == "channels":
        soundfile.write(made, np.repeat(waveform[:, None], 8, 1), 16_000, format="WAV")
    if kind == "rate":
        rate = int(rng.choice([4_000, 11_025, 96_000, 192_000]))
        soundfile.write(made, soxr.resample(waveform, 16_000, rate), rate, format="FLAC")
    if kind == "shuffled":
        return kind, bytes(rng.permutation(np.frombuffer(recording, np.uint8)))
    if kind == "twice":
        return kind, recording * 2
    if kind == "sizes":  # 4 bytes of the headers
        place = int(rng.integers(4, 60))
        size = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", rng.bytes(4)])
        return kind, recording[:place] + bytes(size).ljust(4, b"\0") + recording[place + 4 :]
    if kind == "junk":
        return kind, recording + rng.bytes(int(rng.integers(1, 5000))) + recording
    if kind == "quiet":
        soundfile.write(made, waveform * 10 ** rng.uniform(-5, -2), 16_000, format="WAV", subtype="FLOAT")
    if kind == "phase":
        soundfile.write(made, np.stack([waveform, -waveform], 1), 16_000, format="WAV")
    if kind == "tiny":
        soundfile.write(made, waveform[: rng.integers(0, 500)], 16_000, format="WAV")
    return kind, made.getvalue()


@pytest.fixture(scope="module")
def containers(spoken, tmp_path_factory):
    """The sentence in every container, by its ending; those of ffmpeg where it is."""
    folder = tmp_path_factory.mktemp("containers")
    waveform, _ = soundfile.read(spoken, dtype="float32")
    soundfile.write(folder / "a.mp3", waveform, 16_000)
    soundfile.write(folder / "a.opus", waveform, 16_000, format="OGG", subtype="OPUS")
    for ending in ("wav", "flac", "ogg", "aiff", "au"):
        soundfile.write(folder / f"a.{ending}", waveform, 16_000)
    if shutil.which("ffmpeg"):
        for ending in ("m4a", "aac", "wma", "mkv", "mov", "avi"):
            codec = ["-c:a", "aac"] if ending == "mkv" else []
            command = ["ffmpeg", "-v", "error", "-i", str(spoken), *codec, str(folder / f"a.{ending}")]
            subprocess.run(command, check=True)
    return {file.suffix[1:]: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.slow
def test_no_file_crashes_it(spoken, containers, tmp_path, capsys):
    """1,000 mutated files, and the good ones among them: each is heard, or has a reason of one line."""
    rng = np.random.default_rng(0)
    waveform, _ = soundfile.read(spoken, dtype="float32")
    names = {}
    for i in range(1000):
        ending = str(rng.choice(list(containers)))
        kind, content = mutated(rng, containers[ending], waveform)
        names[f"{i:04}-{kind}"] = kind
        (tmp_path / f"{i:04}-{kind}.{ending}").write_bytes(content)
    for ending, content in containers.items():
        names[f"good-{ending}"] = "good"
        (tmp_path / f"good-{ending}.{ending}").write_bytes(content)
    out = tmp_path / "out"
    with warnings.catch_warnings(record=True):
        assert transcribe.main([str(tmp_path), "--output", str(out)]) == 1
    heard = {file.stem for file in out.iterdir()}
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    for name, kind in names.items():
        lines = [line for line in re.split(r"[\n\r]", errors) if name in line and "Warning: " not in line]
        assert len(lines) == (name not in heard), lines
        if kind in ("empty", "text", "nan"):
            assert name not in heard
        if kind in ("channels", "rate", "quiet", "phase"):
            assert (out / f"{name}.txt").read_text().strip()
        if kind == "good":
            assert "vienna" in (out / f"{name}.txt").read_text()
        # Nothing in aac tells two recordings apart, and words in an overlap count once.
        if kind == "twice" and name in heard and not (tmp_path / f"{name}.aac").exists():
            assert len((out / f"{name}.txt").read_text().split()) > 14


def test_recordings_that_users_reported(spoken, tmp_path, capsys):
    """Each has the whole sentence in it, or twice: what is heard has it as often."""
    waveform, rate = soundfile.read(spoken, dtype="float32")

    def write(name: str, samples=waveform, **options) -> bytes:
        soundfile.write(tmp_path / name, samples, rate, **options)
        return (tmp_path / name).read_bytes()

    once = write("a_mp3.mp3")
    opus = write("a_opus.opus", format="OGG", subtype="OPUS")
    (tmp_path / "b_twice_joined.mp3").write_bytes(once * 2)
    (tmp_path / "b_twice_chained.opus").write_bytes(opus * 2)
    vbr = write("a_vbr.mp3", bitrate_mode="VARIABLE", compression_level=0)
    (tmp_path / "a_vbr.mp3").write_bytes(vbr[vbr.index(b"\xff\xf3", 4) :])  # without the frame that counts
    write("a_very_quiet.wav", waveform * 1e-3, subtype="FLOAT")
    write("a_opposite_phase.wav", np.stack([waveform, -waveform], 1))
    write("a_one_channel_silent.wav", np.stack([0 * waveform, waveform], 1))
    wav = write("a_size_never_written.wav")
    at = wav.index(b"data") + 4
    wav = wav[:4] + bytes(4) + wav[8:at] + bytes(4) + wav[at + 4 :]
    (tmp_path / "a_size_never_written.wav").write_bytes(wav)
    files = sorted(map(str, tmp_path.iterdir()))
    with pytest.warns(audio.AudioWarning, match="a_opposite_phase.wav: its channels cancel each other"):
        assert transcribe.main(files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == files
    for line in lines:
        file, text = line.split("\t")
        words, right = text.split(), SENTENCE.split() * (2 if "/b_" in file else 1)
        assert words == right, line
    heard = {line.split("\t")[0].rpartition("/")[2]: line.split("\t")[1] for line in lines}
    for name in ("very_quiet", "opposite_phase", "one_channel_silent", "size_never_written"):
        assert heard[f"a_{name}.wav"] == SENTENCE
