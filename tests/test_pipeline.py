"""Batches: a function of seed and number alone, each example once an epoch, the right words in them."""

import itertools

import numpy as np
import pytest
import soundfile

from sparqle_jax import audio, prompts
from sparqle_jax.data import pipeline
from sparqle_jax.data.manifest import read_manifest
from sparqle_jax.demo import grammar, language_model

VOCAB_SIZE = language_model.VOCAB_SIZE


class Numbers:
    """Examples that are their own number, and a random one."""

    def __init__(self, num: int):
        self.num = num

    def __len__(self) -> int:
        return self.num

    def example(self, index, rng):
        return {"index": np.int32(index), "drawn": rng.integers(1 << 30)}


def take(num: int, size: int, **kwargs) -> list[dict]:
    return list(itertools.islice(pipeline.batches(Numbers(num), size, **kwargs), 12))


def test_every_example_comes_once_an_epoch_in_an_order_of_its_own():
    epochs = np.concatenate([b["index"] for b in take(12, 4, seed=0)]).reshape(-1, 12)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    other = np.concatenate([b["index"] for b in take(12, 4, seed=1)]).reshape(-1, 12)
    assert not (other == epochs).all()


@pytest.mark.parametrize("start", [1, 2, 5, 11])
def test_a_batch_depends_on_its_number_alone(start):
    whole = take(10, 4, seed=3)
    again = take(10, 4, seed=3, start=start)
    for a, b in zip(whole[start:], again, strict=False):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_fewer_examples_than_a_batch_are_an_error():
    with pytest.raises(ValueError, match="3 examples, fewer than a batch of 4"):
        pipeline.batches(Numbers(3), 4, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return language_model.make_tokenizer(grammar.sentences(300, 0, test=False))


@pytest.fixture(scope="module")
def utterances(small_world):
    return read_manifest(small_world / "train")


def test_instruction_examples_ask_and_answer_in_one_language(utterances, tokenizer):
    prompter = prompts.Prompter(tokenizer, VOCAB_SIZE)
    waveforms = pipeline.Waveforms(utterances, audio.FeatureExtractor(), 3.0)
    tasks = {"transcribe": 1.0, "de": 1.0}
    examples = pipeline.InstructionExamples(utterances, waveforms, prompter, VOCAB_SIZE, tasks)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(20):
        row = examples.example(5, rng)
        asked = tokenizer.decode(row["after"][row["after_mask"]])
        answer = prompter.decode(row["answer"][row["answer_mask"]])
        german = "German" in asked
        seen.add(german)
        assert answer == (utterances[5].translations["de"] if german else utterances[5].text)
        assert row["answer"][row["answer_mask"]][-1] == prompter.end_id
    assert seen == {True, False}
    waveform = row["waveform"][row["waveform_mask"]]
    np.testing.assert_allclose(waveform, audio.FeatureExtractor()(audio.read(utterances[5].audio)), atol=1e-6)


def test_recordings_that_can_not_be_used_are_named_at_the_start(utterances, tmp_path):
    def replaced(name: str, waveform: np.ndarray, rate: int = 16_000):
        soundfile.write(tmp_path / name, waveform, rate)
        return utterances[0].model_copy(update={"id": name, "audio": tmp_path / name})

    (tmp_path / "text.wav").write_bytes(b"no sound")
    text = utterances[0].model_copy(update={"id": "text", "audio": tmp_path / "text.wav"})
    given = [
        utterances[0],
        text,
        replaced("empty.wav", np.zeros(0)),
        replaced("short.wav", np.zeros(1000), 44_100),  # 363 samples at 16 kHz
        replaced("long.wav", np.zeros(24_001), 8_000),  # 3.0001 s, whatever the manifest says
    ]
    with pytest.raises(ValueError, match="can't be used") as error:
        pipeline.Waveforms(given, audio.FeatureExtractor(), 3.0)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["text", "empty.wav", "short.wav", "long.wav"]
    assert "363 samples, fewer than a frame's 400" in lines[2]
    assert "3.00 s, longer than data.max_seconds=3.0" in lines[3]


def test_a_recording_that_breaks_later_is_named(utterances, tmp_path):
    soundfile.write(tmp_path / "broken.wav", np.zeros(1000), 16_000)
    broken = utterances[0].model_copy(update={"audio": tmp_path / "broken.wav"})
    waveforms = pipeline.Waveforms([broken], audio.FeatureExtractor(), 3.0)
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=f"utterance {broken.id} .*broken.wav"):
        waveforms[0]


def test_a_missing_translation_is_named(utterances, tokenizer):
    one = utterances[0].model_copy(update={"translations": {"fr": "bonjour"}})
    waveforms = pipeline.Waveforms([one], audio.FeatureExtractor(), 3.0)
    with pytest.raises(ValueError, match=rf"{one.id} has no translation into 'de'; it has \['fr'\]"):
        pipeline.InstructionExamples(
            [one], waveforms, prompts.Prompter(tokenizer, VOCAB_SIZE), VOCAB_SIZE, {"de": 1.0}
        )


def test_languages_go_by_name_or_code():
    assert pipeline.language_name("de") == pipeline.language_name("german") == "German"
    assert pipeline.language_name("ga") == "Irish"
    assert "Portuguese" in pipeline.language_name("pt-BR")
    assert "into German" in pipeline.instructions("de")[0]
    with pytest.raises(ValueError, match="neither a language's name nor its code"):
        pipeline.language_name("klingonish")
