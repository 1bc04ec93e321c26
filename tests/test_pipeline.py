"""Batches: a function of seed and number alone, whatever the hosts, with the right words in them."""

import json
import shutil
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from sparqle_jax import audio, prompts
from sparqle_jax import tasks as tasks_module
from sparqle_jax.data import pipeline
from sparqle_jax.data.builder import Limits, prepare
from sparqle_jax.data.dataset import Corpus, CorruptRecord, DataSet
from sparqle_jax.data.plan import BatchPlan, choose_buckets
from sparqle_jax.data.sources import Manifest
from sparqle_jax.demo import grammar, language_model
from sparqle_jax.sharding import batch_sharding, make_mesh
from tests.bucket import Bucket

VOCAB_SIZE = language_model.VOCAB_SIZE
TASKS = {"transcribe": 1.0, "de": 1.0}


class Numbers:
    """Examples that are their own number, and a random one."""

    def rows(self, batch, places, seed):
        drawn = [np.random.default_rng([seed, batch.number, place]).integers(1 << 30) for place in places]
        return {"index": batch.indices[list(places)], "drawn": np.array(drawn)}


def numbers_plan(num: int = 100, **kwargs) -> BatchPlan:
    lengths = np.random.default_rng(0).integers(audio.SAMPLE_RATE, 4 * audio.SAMPLE_RATE, num)
    values = dict(buckets=choose_buckets(lengths, 3), batch_size=8, seed=0, multiple=8) | kwargs
    return BatchPlan(lengths, **values)


def take(plan: BatchPlan, stop: int, **kwargs) -> list[dict]:
    return list(pipeline.batches(Numbers(), plan, seed=3, stop=stop, **kwargs))


def assert_equal(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], name)


class HostSharding:
    """What host `host` of `num_hosts` knows of a batch split over two devices of each."""

    def __init__(self, host: int, num_hosts: int):
        self.parts, self.number = [2 * host, 2 * host + 1], 2 * num_hosts

    def addressable_devices_indices_map(self, shape):
        size = shape[0] // self.number
        return {part: (slice(part * size, (part + 1) * size),) for part in self.parts}


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_put_together_have_the_batches_of_one(num_hosts):
    for batch in (numbers_plan().batch(number) for number in range(30)):
        size = len(batch.indices)
        places = [pipeline.local_rows(HostSharding(host, num_hosts), size) for host in range(num_hosts)]
        hosts = [Numbers().rows(batch, some, 3) for some in places]
        together = {name: np.concatenate([rows[name] for rows in hosts]) for name in hosts[0]}
        assert_equal([together], [Numbers().rows(batch, range(size), 3)])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_batches_on_a_mesh_are_those_of_one_device(shape):
    sharding = batch_sharding(make_mesh(shape))
    on_mesh = take(numbers_plan(), 9, sharding=sharding)
    assert on_mesh[0]["index"].sharding == sharding
    assert_equal(on_mesh, take(numbers_plan(), 9))


def test_stopped_it_goes_on_with_the_same_examples():
    assert_equal(take(numbers_plan(), 30, start=11), take(numbers_plan(), 30)[11:])


def test_a_batch_that_the_devices_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="evenly divide"):
        take(numbers_plan(batch_size=9, multiple=1), 1, sharding=batch_sharding(make_mesh((8, 1, 1))))


@pytest.fixture(scope="module")
def tokenizer():
    return language_model.make_tokenizer(grammar.sentences(300, 0, test=False))


@pytest.fixture(scope="module")
def corpus(small_world) -> Corpus:
    return Corpus([DataSet(small_world / "train")])


def make_examples(corpus, tokenizer, tasks=TASKS, *, buckets: int = 2, **kwargs):
    plan = BatchPlan(
        corpus.num_samples, choose_buckets(corpus.num_samples, buckets), 2, seed=0, sizes=corpus.sizes
    )
    prompter = prompts.Prompter(tokenizer, VOCAB_SIZE)
    waveforms = pipeline.Waveforms(corpus, 3.0)
    tasks = [tasks] * len(corpus.sizes) if isinstance(tasks, dict) else tasks
    return plan, pipeline.InstructionExamples(corpus, waveforms, prompter, VOCAB_SIZE, tasks, plan, **kwargs)


def test_instruction_examples_ask_and_answer_in_one_language(corpus, tokenizer):
    plan, examples = make_examples(corpus, tokenizer)
    prompter, seen = examples.prompter, set()
    for number in range(2 * plan.batches_per_epoch):
        batch = plan.batch(number)
        arrays = examples.rows(batch, range(len(batch.indices)), seed=1)
        assert arrays["waveform"].shape == (len(batch.indices), batch.num_samples)
        for row, index in enumerate(batch.indices):
            asked = tokenizer.decode(arrays["after"][row][arrays["after_mask"][row]])
            answer = arrays["answer"][row][arrays["answer_mask"][row]]
            german = "German" in asked
            seen.add(german)
            utterance = corpus[index]
            assert prompter.decode(answer) == (utterance.translations["de"] if german else utterance.text)
            assert answer[-1] == prompter.end_id
            waveform = arrays["waveform"][row][arrays["waveform_mask"][row]]
            np.testing.assert_allclose(waveform, corpus.samples(index) / 32768, atol=1e-6)
    assert seen == {True, False}


def test_tasks_are_drawn_by_weight_and_by_data_set(small_world, tokenizer):
    corpus = Corpus([DataSet(small_world / "train"), DataSet(small_world / "seen")])
    plan, examples = make_examples(corpus, tokenizer, [{"transcribe": 3.0, "de": 1.0}, {"fr": 1.0}])
    asked = {True: [], False: []}
    for number in range(40):
        batch = plan.batch(number)
        arrays = examples.rows(batch, range(len(batch.indices)), seed=0)
        for row, index in enumerate(batch.indices):
            text = tokenizer.decode(arrays["after"][row][arrays["after_mask"][row]])
            language = next((name for name in ("German", "French") if name in text), "English")
            asked[index < 24].append(language)
    assert set(asked[False]) == {"French"}
    assert set(asked[True]) == {"English", "German"}
    assert asked[True].count("German") / len(asked[True]) == pytest.approx(0.25, abs=0.1)


def test_texts_of_a_bucket_are_padded_to_its_longest(corpus, tokenizer):
    plan, examples = make_examples(corpus, tokenizer)
    counts = [
        max(len(examples.prompter.answer(text)) for text in (u.text, u.translations["de"])) for u in corpus
    ]
    for bucket, length in zip(plan.buckets, examples.lengths, strict=True):
        assert length == max(
            c for c, u in zip(counts, corpus, strict=True) if u.num_samples <= bucket.num_samples
        )
    _, fixed = make_examples(corpus, tokenizer, max_tokens=33)
    assert fixed.lengths == [33, 33]


def test_equal_texts_of_a_batch_have_one_number(corpus):
    words = AutoTokenizer.from_pretrained("sparqle_jax/demo/models/words")
    twice = Corpus([*corpus.data_sets, *corpus.data_sets])
    plan = BatchPlan(twice.num_samples, choose_buckets(twice.num_samples, 1), 48, seed=0)
    waveforms = pipeline.Waveforms(twice, 3.0)
    examples = pipeline.AlignmentExamples(twice, waveforms, words, 1000, plan)
    batch = plan.batch(0)
    halves = [examples.rows(batch, range(24 * host, 24 * host + 24), 0)["recording_id"] for host in range(2)]
    ids = np.concatenate(halves)
    texts = np.array([twice[index].text for index in batch.indices])
    np.testing.assert_array_equal(ids[:, None] == ids, texts[:, None] == texts)
    assert len(set(ids)) == len(set(texts)) < 48


@pytest.mark.parametrize("device", [False, True])
def test_worker_processes_and_devices_give_the_same_batches(device, corpus, tokenizer):
    plan, examples = make_examples(corpus, tokenizer)
    one = list(pipeline.batches(examples, plan, seed=0, stop=6))
    there = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    options = dict(sharding=there) if device else dict(workers=2)
    other = list(pipeline.batches(examples, plan, seed=0, stop=6, **options))
    assert_equal(one, other)
    if device:
        assert other[0]["waveform"].devices() == {jax.devices()[1]}


def test_the_plan_is_grains_source():
    plan = numbers_plan()
    dataset = grain.MapDataset.source(pipeline.HostBatches(plan, 7))
    assert len(dataset) == 7
    np.testing.assert_array_equal(dataset[5].indices, plan.batch(5).indices)


def test_recordings_that_can_not_be_used_are_named_at_the_start(corpus):
    lengths = corpus.num_samples / audio.SAMPLE_RATE
    with pytest.raises(ValueError, match=r"1 recordings are shorter .* or longer than") as error:
        pipeline.Waveforms(corpus, np.sort(lengths)[-2])
    assert corpus[int(lengths.argmax())].id in str(error.value)
    with pytest.raises(ValueError, match=r"24 recordings are shorter than 3 s"):
        pipeline.Waveforms(corpus, 9.0, min_samples=48_000)


@pytest.fixture
def corrupt(small_world, tmp_path) -> Corpus:
    """A data set of 24 of whose records some are overwritten."""
    shutil.copytree(small_world / "train", tmp_path / "train")
    (shard,) = (tmp_path / "train").glob("speech-train*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1000] = bytes(1000)
    shard.write_bytes(content)
    return Corpus([DataSet(tmp_path / "train")])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_record_stops_with_its_name_and_shard(corrupt, tokenizer, workers):
    plan, examples = make_examples(corrupt, tokenizer)
    with pytest.raises(Exception, match=r"can't be read, record \d+ of .*, in speech-train") as error:
        list(pipeline.batches(examples, plan, seed=0, stop=plan.batches_per_epoch, workers=workers))
    assert "data.skip_corrupt=true" in str(error.value)


def test_a_corrupt_record_is_skipped_and_counted_when_told_to(corrupt, corpus, tokenizer, capfd):
    bad = set()
    for i in range(24):
        try:
            corrupt.samples(i)
        except ValueError:
            bad.add(i)
    assert 0 < len(bad) < 6
    plan, examples = make_examples(corrupt, tokenizer, skip_corrupt=True)
    _, whole = make_examples(corpus, tokenizer)
    skipped = 0
    for number in range(plan.batches_per_epoch):
        batch = plan.batch(number)
        arrays = examples.rows(batch, range(len(batch.indices)), 0)
        expected = whole.rows(batch, range(len(batch.indices)), 0)
        here = [place for place, index in enumerate(batch.indices) if index in bad]
        assert arrays["skipped"].sum() == len(here)
        skipped += len(here)
        assert arrays["waveform"].shape == expected["waveform"].shape
        if not here:
            np.testing.assert_array_equal(arrays["waveform"], expected["waveform"])
        rows = {row.tobytes() for row in expected["waveform"]}
        assert all(row.tobytes() in rows for row in arrays["waveform"])
    assert skipped == len(set(np.concatenate([rows.ravel() for rows in plan.epoch(0)])) & bad)
    assert capfd.readouterr().err.count("skipped: ") == skipped


def sparse_data(small_world, folder: Path, keep) -> DataSet:
    """The training set, prepared anew with the translations that `keep` leaves of each utterance's."""
    data, lines = DataSet(small_world / "train"), []
    folder.mkdir()
    for i, utterance in enumerate(data):
        soundfile.write(folder / f"{i}.wav", data.samples(i), audio.SAMPLE_RATE, subtype="PCM_16")
        text, translations = keep(i, utterance)
        lines.append({"audio": f"{i}.wav", "text": text, "translations": translations})
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    limits = Limits(allow_empty=True)
    prepare(folder / "data", Manifest(str(folder / "m.jsonl")), limits, "runner=DirectRunner")
    return DataSet(folder / "data")


@pytest.fixture(scope="module")
def sparse(small_world, tmp_path_factory) -> DataSet:
    """Of its utterances every fourth has a German translation, every eighth a Spanish one; in 5 and 13 nobody
    speaks."""

    def keep(i, utterance):
        if i in (5, 13):
            return "", {}
        codes = ["de"] * (i % 4 == 0) + ["es"] * (i % 8 == 0)
        return utterance.text, {code: utterance.translations[code] for code in codes}

    return sparse_data(small_world, tmp_path_factory.mktemp("sparse") / "sparse", keep)


def test_a_data_set_knows_which_translations_its_utterances_have(sparse, corpus):
    assert sparse.languages == ("de", "es")
    assert sparse[0].translations == {code: corpus[0].translations[code] for code in ("de", "es")}
    assert sparse[4].translations == {"de": corpus[4].translations["de"]}
    assert sparse[1].translations == {}
    for task, every in (("de", 4), ("es", 8)):
        np.testing.assert_array_equal(np.flatnonzero(sparse.has(task)), np.arange(0, 24, every))
        assert list(sparse.texts(task)) == [corpus[i].translations[task] for i in range(0, 24, every)]
    assert sparse.has("transcribe").all()
    assert not sparse.has("it").any()
    assert np.flatnonzero(~sparse.has_speech).tolist() == [5, 13]


def test_an_utterance_draws_a_task_that_it_has(sparse, tokenizer):
    """Transcripts and German by their weights where both are there; nothing is asked that has no answer."""
    corpus = Corpus([sparse])
    tasks = {"transcribe": 1.0, "de": 3.0}
    assert tasks_module.have_any(sparse, tasks).all()
    plan, examples = make_examples(corpus, tokenizer, tasks)
    drawn: dict[bool, list[bool]] = {True: [], False: []}
    for number in range(20 * plan.batches_per_epoch):
        batch = plan.batch(number)
        arrays = examples.rows(batch, range(len(batch.indices)), seed=0)
        for row, index in enumerate(batch.indices):
            german = "German" in tokenizer.decode(arrays["after"][row][arrays["after_mask"][row]])
            drawn["de" in sparse[index].translations].append(german)
            answer = arrays["answer"][row][arrays["answer_mask"][row]]
            expected = sparse[index].translations["de"] if german else sparse[index].text
            assert examples.prompter.decode(answer) == expected
            if not sparse[index].text:  # to hear nothing is to end at once
                assert answer.tolist() == [examples.prompter.end_id]
    assert not any(drawn[False])
    assert np.mean(drawn[True]) == pytest.approx(0.75, abs=0.12)


def test_an_utterance_without_any_of_the_tasks_is_not_used(sparse, tokenizer):
    corpus, tasks = Corpus([sparse]), {"es": 1.0, "de": 1.0}
    used = tasks_module.have_any(sparse, tasks)
    assert np.flatnonzero(used).tolist() == [0, 4, 8, 12, 16, 20]
    lengths = corpus.num_samples
    plan = BatchPlan(lengths, choose_buckets(lengths[used], 1), 2, seed=0, used=used)
    assert plan.batches_per_epoch == 3
    prompter = prompts.Prompter(tokenizer, VOCAB_SIZE)
    waveforms = pipeline.Waveforms(corpus, 3.0)
    examples = pipeline.InstructionExamples(corpus, waveforms, prompter, VOCAB_SIZE, [tasks], plan)
    for batch in map(plan.batch, range(9)):
        examples.rows(batch, range(2), seed=0)
        assert used[batch.indices].all()
    longest = max(len(prompter.answer(text)) for task in tasks for text in sparse.texts(task))
    assert examples.lengths == [longest]


def test_a_data_set_of_an_earlier_version_is_read(small_world, tmp_path):
    """Its index had a translation of all into each language, and its records the same fields."""
    data = DataSet(small_world / "train")
    assert data.languages == ("de", "es", "fr")
    for task in ("transcribe", "de", "es", "fr"):
        assert data.has(task).all()
        texts = [u.text if task == "transcribe" else u.translations[task] for u in data]
        assert list(data.texts(task)) == texts
    assert data.has_speech.all()


class Holed(Corpus):
    """A corpus of which some records can't be read."""

    bad = frozenset({0, 3, 4, 5, 11, 12, 17, 20, 21})

    def samples(self, index):
        if index in self.bad:
            raise CorruptRecord(f"{index} can't be read")
        return super().samples(index)


@pytest.mark.parametrize("num_hosts", [2, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_corrupt_records_are_replaced_alike_on_any_number_of_hosts(num_hosts, stage, small_world, tokenizer):
    corpus = Holed([DataSet(small_world / "train")])
    plan = BatchPlan(corpus.num_samples, choose_buckets(corpus.num_samples, 1), 8, seed=0)
    waveforms = pipeline.Waveforms(corpus, 3.0)
    if stage == 1:
        tokenizer = AutoTokenizer.from_pretrained("sparqle_jax/demo/models/words")
        examples = pipeline.AlignmentExamples(corpus, waveforms, tokenizer, 1000, plan, skip_corrupt=True)
    else:
        prompter = prompts.Prompter(tokenizer, VOCAB_SIZE)
        examples = pipeline.InstructionExamples(
            corpus, waveforms, prompter, VOCAB_SIZE, [TASKS], plan, skip_corrupt=True
        )
    skipped = 0
    for batch in map(plan.batch, range(2 * plan.batches_per_epoch)):
        one = examples.rows(batch, range(8), seed=3)
        places = [pipeline.local_rows(HostSharding(host, num_hosts), 8) for host in range(num_hosts)]
        parts = [examples.rows(batch, some, seed=3) for some in places]
        assert_equal([{name: np.concatenate([part[name] for part in parts]) for name in one}], [one])
        assert one["skipped"].tolist() == [index in Holed.bad for index in batch.indices]
        skipped += int(one["skipped"].sum())
    assert skipped == 2 * len(Holed.bad)


def test_a_batch_of_corrupt_records_alone_is_an_error(small_world, tokenizer, monkeypatch):
    monkeypatch.setattr(Holed, "bad", frozenset(range(24)))
    corpus = Holed([DataSet(small_world / "train")])
    plan, examples = make_examples(corpus, tokenizer, skip_corrupt=True)
    with pytest.raises(CorruptRecord, match="no record of batch 0 can be read"):
        examples.rows(plan.batch(0), [0], seed=0)


def test_a_data_set_on_gs_gives_the_batches_of_a_local_one(small_world, corpus, tokenizer, monkeypatch):
    bucket = Bucket(small_world)
    bucket.use(monkeypatch)
    with pytest.raises(FileNotFoundError, match="gs://bucket/nowhere is no data set"):
        DataSet("gs://bucket/nowhere")
    remote = Corpus([DataSet("gs://bucket/train")])
    assert list(remote) == list(corpus)
    plan, here = make_examples(corpus, tokenizer)
    _, there = make_examples(remote, tokenizer)
    stop = plan.batches_per_epoch
    assert_equal(*(list(pipeline.batches(examples, plan, seed=0, stop=stop)) for examples in (here, there)))
    assert any("array_record" in name for name in bucket.requests)


def test_a_task_without_answers_is_named(corpus, tokenizer):
    with pytest.raises(ValueError, match=r"has no translations into 'it'; it has \['de', 'es', 'fr'\]"):
        make_examples(corpus, tokenizer, {"it": 1.0})


def test_languages_go_by_name_or_code():
    assert tasks_module.language_name("de") == tasks_module.language_name("german") == "German"
    assert tasks_module.language_name("ga") == "Irish"
    assert "Portuguese" in tasks_module.language_name("pt-BR")
    assert "into German" in tasks_module.instructions("de")[0]
    with pytest.raises(ValueError, match="neither a language's name nor its code"):
        tasks_module.language_name("klingonish")


def test_what_test_data_share_with_training_data(small_world, tmp_path):
    """Counted by hand: the miniature's sets have sentences, voices and recordings of their own, and some of
    the same ids, which are numbers. Copies of training recordings share what was not changed."""
    train, seen = DataSet(small_world / "train"), DataSet(small_world / "seen")
    assert seen[0].id == train[0].id
    nothing = dict(utterances=0, recordings=0, speakers=0, texts=0)
    assert seen.overlap([train]) == nothing
    assert seen.overlap([]) == nothing
    assert set(train.overlap([seen, train]).values()) == {len(train)}

    rows = []
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", train.samples(i), 16_000, subtype="PCM_16")
        rows.append({"audio": f"{i}.wav", "id": train[i].id, "text": train[i].text})
    rows[0] |= {"text": "something else", "speaker": train[7].speaker}
    rows[1] |= {"id": "another", "speaker": "another"}
    rows[2] |= {"text": ""}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = Limits(allow_empty=True)
    prepare(tmp_path / "data", Manifest(str(tmp_path / "m.jsonl")), limits, "runner=DirectRunner")
    copies = DataSet(tmp_path / "data").overlap([seen, train])
    assert copies == dict(utterances=1, recordings=4, speakers=1, texts=2)
