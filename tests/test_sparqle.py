"""The miniature through Python: recordings of all kinds, batches, model folders."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from sparqle_jax import SparQLe, audio, export, import_published, pretrained
from sparqle_jax.__main__ import COMMANDS
from sparqle_jax.__main__ import main as command
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.demo.__main__ import MODELS
from sparqle_jax.demo.speech import Voice, synthesise
from sparqle_jax.sharding import make_mesh
from sparqle_jax.sparqle import MINIATURE, Segment, Transcript, merge_overlap, with_speech
from sparqle_jax.tasks import TRANSCRIBE, instructions

RATE = audio.SAMPLE_RATE
SILENCE = np.zeros(round(0.4 * RATE), np.int16)
INSTRUCTION = instructions(TRANSCRIBE)[0]


@pytest.fixture(scope="module")
def sparqle() -> SparQLe:
    return SparQLe.from_pretrained()


@pytest.fixture(scope="module")
def waveforms(small_world) -> list[np.ndarray]:
    data = DataSet(small_world / "seen")
    return [data.waveform(i) for i in range(len(data))]


@pytest.fixture(scope="module")
def alone(sparqle, waveforms) -> list[str]:
    return [sparqle.transcribe((waveform, RATE)).text for waveform in waveforms]


def test_every_kind_of_recording(sparqle, waveforms, alone, tmp_path):
    soundfile.write(tmp_path / "a.wav", waveforms[0], RATE, subtype="PCM_16")
    stereo = np.repeat(waveforms[0][:, None], 2, 1)
    given = [
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
        (stereo, RATE),
        ((waveforms[0] * 32768).astype(np.int16), RATE),
        {"array": waveforms[0].astype(np.float64), "sampling_rate": RATE},
    ]
    assert [transcript.text for transcript in sparqle.transcribe(given)] == alone[:1] * 5
    assert str(sparqle.transcribe(given[0])) == alone[0]


def test_a_prompt_of_ones_own_is_the_same_as_the_command_it_repeats(sparqle, waveforms):
    recording = (waveforms[0], RATE)
    prompt = instructions("French")[0]
    assert sparqle.generate(recording, prompt) == sparqle.translate(recording, "fr")
    assert with_speech("How many?") == "<Speech><SpeechHere></Speech> How many?"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*answers have no end")
def test_batches_give_what_single_recordings_give(sparqle, waveforms):
    """32 recordings of 1 to 30 s, which is more than the miniature has learned: what it says is compared."""
    long = SparQLe.of(sparqle.model, sparqle.config.model_copy(update={"max_seconds": 30.0}))
    speech = np.tile(np.concatenate(waveforms), 4)
    recordings = [
        speech[500 * i :][: round(length * RATE)] for i, length in enumerate(np.linspace(1, 30, 32))
    ]
    searches = [long.generation_config(max_new_tokens=12, num_beams=beams) for beams in (1, 3)]

    def answers(order: np.ndarray, batch_size: int) -> dict[int, list[str]]:
        """By recording, what greedy and beam search say."""
        found = {}
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            frames = long.encode([recordings[i] for i in some])
            texts = [long.answer(frames, len(some), INSTRUCTION, search) for search in searches]
            found |= {i: list(pair) for i, *pair in zip(some, *texts, strict=True)}
        return found

    alone = answers(np.arange(32), 1)
    assert len({greedy for greedy, _ in alone.values()}) > 8
    rng = np.random.default_rng(0)
    assert answers(rng.permutation(32), 5) == alone
    assert answers(rng.permutation(32), 32) == alone


@pytest.mark.slow
def test_a_mesh_of_eight_devices_gives_the_same(sparqle, waveforms, alone):
    one_device = sparqle
    mesh = make_mesh((2, 2, 2), jax.devices())
    sparqle = SparQLe.from_pretrained(mesh=mesh)
    recordings = [(waveform, RATE) for waveform in waveforms]
    assert [transcript.text for transcript in sparqle.transcribe(recordings)] == alone
    assert [transcript.text for transcript in sparqle.transcribe(recordings[:3], num_beams=2)] == [
        one_device.transcribe(recording, num_beams=2).text for recording in recordings[:3]
    ]


def test_text_comes_as_it_grows(sparqle, waveforms, alone):
    texts = [transcript.text for transcript in sparqle.stream((waveforms[0], RATE), INSTRUCTION)]
    assert texts[-1] == alone[0]
    assert len(texts) > 2
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


def test_recordings_are_answered_as_they_come(sparqle, waveforms, alone):
    """What can't be heard stands in its place, and later recordings are not waited for."""
    read = []

    def recordings():
        for i, waveform in enumerate(waveforms):
            read.append(i)
            yield (waveform, RATE) if i != 1 else (np.zeros(RATE, np.float32), RATE)

    results = sparqle.run(recordings(), INSTRUCTION, batch_size=2)
    assert next(results).text == alone[0]
    assert read == [0, 1, 2]
    rest = list(results)
    assert isinstance(rest[0], audio.UnusableAudio)
    assert [transcript.text for transcript in rest[1:]] == alone[2:]


def test_a_long_recording_is_its_utterances(sparqle, waveforms, tmp_path):
    """Word by word what each utterance is alone, between silence."""
    samples = [
        np.concatenate([SILENCE, np.round(32768 * one).astype(np.int16), SILENCE]) for one in waveforms
    ]
    alone = sparqle.transcribe([(one, RATE) for one in samples])
    order = [i % len(samples) for i in range(48)]
    soundfile.write(tmp_path / "long.wav", np.concatenate([samples[i] for i in order]), RATE)
    segments = sparqle.transcribe(tmp_path / "long.wav").segments
    assert [segment.text for segment in segments] == [alone[i].text for i in order]
    starts = np.cumsum([0, *(len(samples[i]) for i in order)])[:-1] + len(SILENCE)
    np.testing.assert_allclose([segment.start for segment in segments], starts / RATE, atol=0.002)


def test_bad_recordings_and_settings(sparqle, waveforms, tmp_path):
    good = (waveforms[0], RATE)
    for bad, message in (
        ([good, (np.zeros(RATE), RATE)], "recording 1: it is silent"),
        (waveforms[0], "a ndarray is no recording: give a file, or"),
        ((waveforms[0][None, :], RATE), r"a waveform of shape \(1, \d+\) at 16000 Hz: give"),
        ((waveforms[0] * np.nan, RATE), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            sparqle.transcribe(bad)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sparqle.transcribe(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="beams: no settings of generation; there are"):
        sparqle.transcribe(good, beams=3)
    with pytest.raises(ValueError, match="neither a language's name"):
        sparqle.translate(good, "klingonish")


def test_what_overlaps_is_said_once():
    assert merge_overlap("we went to the old harb", "to the old harbour at night") == (
        "we went to the old",
        "harbour at night",
    )
    assert merge_overlap("one two three", "four five") == ("one two three", "four five")
    assert merge_overlap("It was late.", "late, and dark") == ("It was late.", "and dark")
    assert merge_overlap("", "four") == ("", "four")
    assert Transcript((Segment(0, 1, "a"), Segment(1, 2, ""), Segment(2, 3, "b"))).text == "a b"


def test_a_folder_with_its_towers_needs_nothing_else(tmp_path, sparqle, waveforms, alone):
    export.main([str(MINIATURE), str(tmp_path / "whole"), "--towers"])
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "whole", moved)
    config = json.loads((moved / "config.json").read_text())
    assert (config["encoder"]["folder"], config["llm"]["folder"]) == ("encoder", "llm")
    assert config["speech_pad"] == sparqle.config.speech_pad
    assert SparQLe.from_pretrained(moved).transcribe((waveforms[0], RATE)).text == alone[0]
    shutil.rmtree(moved / "llm")
    with pytest.raises(FileNotFoundError, match=r"the llm of .* give its folder, with --llm FOLDER"):
        SparQLe.from_pretrained(moved)
    again = SparQLe.from_pretrained(moved, llm=MODELS / "llm")
    assert again.transcribe((waveforms[0], RATE)).text == alone[0]
    with pytest.raises(SystemExit):
        export.main([str(MINIATURE), str(moved)])


def test_names_and_revisions_of_towers_are_kept(tmp_path):
    snapshot = tmp_path / "models--org--hubert" / "snapshots" / "0123abc"
    shutil.copytree(MODELS / "hubert", snapshot)
    assert pretrained.hub_name(snapshot) == "org/hubert"
    assert pretrained.hub_revision(snapshot) == "0123abc"
    local = tmp_path / "hubert"
    shutil.copytree(MODELS / "hubert", local)
    assert (pretrained.hub_name(local), pretrained.hub_revision(local)) == (None, None)
    config = json.loads((local / "config.json").read_text())
    (local / "config.json").write_text(json.dumps(config | {"_name_or_path": "facebook/hubert"}))
    note = local / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("89abcdef\netag\n1700000000.0\n")
    assert (pretrained.hub_name(local), pretrained.hub_revision(local)) == ("facebook/hubert", "89abcdef")


def test_towers_come_from_the_hub_by_name_and_revision(tmp_path, waveforms, alone, monkeypatch):
    asked = []

    def download(name, revision):
        asked.append((name, revision))
        return str(MODELS / "llm")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    export.main([str(MINIATURE), str(tmp_path / "model"), "--towers"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["llm"] = {"folder": "elsewhere", "name": "org/llm", "revision": "abc"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert SparQLe.from_pretrained(tmp_path / "model").transcribe((waveforms[0], RATE)).text == alone[0]
    assert asked == [("org/llm", "abc")]


def test_a_checkpoint_in_the_published_names_becomes_a_folder(tmp_path, waveforms, alone, capsys):
    export.main([str(MINIATURE), str(tmp_path / "adapter.safetensors")])
    towers = ["--encoder", str(MODELS / "hubert"), "--llm", str(MODELS / "llm")]
    arguments = [str(tmp_path / "adapter.safetensors"), str(tmp_path / "model"), *towers]
    more = ["--max-seconds", "3", "--dtype", "float32", "--max-new-tokens", "64"]
    assert import_published.main([*arguments, *more]) == 0
    assert SparQLe.from_pretrained(tmp_path / "model").transcribe((waveforms[0], RATE)).text == alone[0]
    with pytest.raises(SystemExit):
        import_published.main([*arguments, *more])
    assert "is there already" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*answers have no end")
def test_published_weights_hear_one_recording_at_a_time(tmp_path, waveforms):
    """Whose mask is inverted: with others in a batch, each would get another answer."""
    export.main([str(MINIATURE), str(tmp_path / "adapter.safetensors")])
    towers = ["--encoder", str(MODELS / "hubert"), "--llm", str(MODELS / "llm"), "--dtype", "float32"]
    arguments = [str(tmp_path / "adapter.safetensors"), str(tmp_path / "model"), *towers, "--published"]
    assert command(["import", *arguments, "--max-new-tokens", "8"]) == 0
    sparqle = SparQLe.from_pretrained(tmp_path / "model")
    assert sparqle.generation_config().num_beams == 5
    recordings = [(waveform, RATE) for waveform in waveforms[:2]]
    assert sparqle.transcribe(recordings) == [sparqle.transcribe(recording) for recording in recordings]


def test_a_model_is_loaded_in_the_precision_that_it_was_trained_in(tmp_path):
    config = json.loads((MINIATURE / "config.json").read_text())
    for tower in ("encoder", "llm"):
        config[tower]["folder"] = str((MINIATURE / config[tower]["folder"]).resolve())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    shutil.copy(MINIATURE / "adapter.safetensors", tmp_path)
    model = SparQLe.from_pretrained(tmp_path).model
    for part in (model.encoder, model.adapter, model.llm):
        assert part.dtype == jnp.bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_second": 3}))
    with pytest.raises(ValueError, match=r"config.json is not a model's: (.|\n)*max_second"):
        SparQLe.from_pretrained(tmp_path)


def test_which_frames_the_queries_attend_to(sparqle, waveforms):
    weights = sparqle.attention((waveforms[0], RATE))
    assert weights.shape == (32, sparqle.model.encoder.config.num_frames(len(waveforms[0])))
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="only 3 s can be shown at once"):
        sparqle.attention((np.tile(waveforms[0], 4), RATE))


def test_every_command_is_there(capsys):
    assert command(["--help"]) == 0
    assert "transcribe" in capsys.readouterr().out
    assert command(["transcripe"]) == 2
    for name in COMMANDS:
        if name != "app":  # needs its extra
            with pytest.raises(SystemExit) as stopped:
                command([name, "--help"])
            assert stopped.value.code == 0


def utterance() -> np.ndarray:
    return synthesise("my sister has seventy six flowers", Voice("en-us", "m3", 200))


class TestWhatIsABatch:
    """Any sequence of recordings; (waveform, rate) alone is one recording."""

    def test_sequences(self, sparqle, tmp_path):
        waveform = utterance()
        file = tmp_path / "a.wav"
        soundfile.write(file, waveform, RATE)
        one = sparqle.transcribe((waveform, RATE))
        text = one.text
        assert text
        assert sparqle.transcribe(str(file)).text == text
        assert sparqle.transcribe({"array": waveform, "sampling_rate": RATE}).text == text
        assert sparqle.transcribe((waveform.tolist(), float(RATE))).text == text
        for batch in (
            (str(file), file),
            [file, (waveform, RATE)],
            ((waveform, RATE), (waveform, RATE)),
            np.array([str(file), str(file)]),
            (path for path in (file, file)),
            [{"array": waveform, "sampling_rate": RATE}, file],
        ):
            assert [answer.text for answer in sparqle.transcribe(batch)] == [text, text]
        assert len(sparqle.translate((file,), "German")) == 1
        assert sparqle.transcribe([]) == []

    def test_what_is_no_recording(self, sparqle):
        for wrong in (np.zeros(16_000, np.float32), 7, None):
            with pytest.raises(ValueError, match=r"is no recording: give a file, or \(waveform, sample rate"):
                sparqle.transcribe(wrong)


def test_one_recordings_fault_is_its_own(sparqle, tmp_path, monkeypatch):
    """Whatever goes wrong with it, when it is read, encoded or answered: the others get their answers."""
    waveform = utterance()
    good = (waveform, RATE)
    expected = sparqle.transcribe(good).text
    marked = waveform.copy()
    marked[0] = 0.123
    encode, read = sparqle.encode, audio.read_blocks

    def encode_or_fail(waveforms):
        if any(len(one) and one[0] == np.float32(0.123) for one in waveforms):
            raise RuntimeError("no memory for it")
        return encode(waveforms)

    def read_or_fail(file):
        if "cursed" in str(file):
            raise OSError("the disk is gone")
        return read(file)

    monkeypatch.setattr(sparqle, "encode", encode_or_fail)
    monkeypatch.setattr(audio, "read_blocks", read_or_fail)
    recordings = [good, (marked, RATE), "cursed.wav", good, tmp_path, (np.zeros((3, 3, 3)), RATE), good]
    results = list(sparqle.run(recordings, instructions(TRANSCRIBE)[0]))
    answered = [not isinstance(result, Exception) for result in results]
    assert answered == [True, False, False, True, False, False, True]
    reasons = [str(result) for result in results if isinstance(result, Exception)]
    assert reasons[:2] == ["no memory for it", "the disk is gone"]
    monkeypatch.setattr(sparqle, "encode", lambda waveforms: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(sparqle.run([good], instructions(TRANSCRIBE)[0]))
    assert expected


def test_answers_that_are_cut_are_marked(sparqle):
    good = (utterance(), RATE)
    assert sparqle.transcribe(good).complete
    with pytest.warns(UserWarning, match="1 of 1 answers have no end within max_new_tokens=1 tokens"):
        cut = sparqle.transcribe(good, max_new_tokens=1)
    assert not cut.complete
    *_, last = sparqle.stream(good, instructions(TRANSCRIBE)[0], max_new_tokens=1)
    assert not last.complete


def test_old_names_are_refused_with_the_new_ones(sparqle):
    for name, new in (("listen", "run"), ("listening", "attention")):
        with pytest.raises(AttributeError, match=f"SparQLe.{name} is now SparQLe.{new}"):
            getattr(sparqle, name)
    with pytest.raises(AttributeError, match=r"Transcript.pieces is now Transcript.segments"):
        _ = Transcript(()).pieces
    assert not hasattr(sparqle, "another")
    assert sparqle.config.speech_pad == 0.0  # in its file, "margin"


def test_a_model_folder_of_version_0_1_still_loads(tmp_path):
    """Written by the version before the parts, with its numbers: published names, and `margin`."""
    folder = Path(__file__).parent / "golden" / "model_folder_0.1"
    old = SparQLe.from_pretrained(folder, encoder=MODELS / "hubert", llm=MODELS / "llm")
    numbers = load_file(folder / "expected.safetensors")
    speech, mask = old.model.embed_speech(old.encode([numbers["waveform"]]))
    np.testing.assert_allclose(speech, numbers["speech"], atol=1e-4)
    assert np.asarray(mask).all()
    assert old.config.speech_pad == 0.0
    old.save_pretrained(tmp_path / "new")  # in the names of today
    assert "speech_pad" in (tmp_path / "new" / "config.json").read_text()
    new = SparQLe.from_pretrained(tmp_path / "new")
    np.testing.assert_array_equal(new.model.embed_speech(new.encode([numbers["waveform"]]))[0], speech)
