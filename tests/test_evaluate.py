"""Scores of hand-made answers; and the command with the miniature: its files, going on, meshes."""

import base64
import json
import re

import numpy as np
import pytest
import soundfile

from sparqle_jax import encoders, evaluate, evaluation_page, scores
from sparqle_jax.data import prepare
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.demo.__main__ import MODELS
from sparqle_jax.evaluation_page import differences, histogram
from sparqle_jax.scores import basic, length_name, score, score_one, table
from sparqle_jax.sparqle import SparQLe
from tests.bucket import Bucket


def test_error_rates_count_substitutions_deletions_and_insertions():
    scores = score("transcribe", ["a b c d", "e f"], ["a x c", "e f g"])
    # Characters: b -> x, " d" is missing, " g" is extra; of 7 + 3.
    assert scores == {"wer": pytest.approx(3 / 6), "cer": pytest.approx(5 / 10), "exact": 0.0}


def test_the_normaliser_decides_what_is_an_error():
    reference, answer = ["Don't stop, Twenty-Five!"], ["don\u2019t stop twenty five"]
    assert score("transcribe", reference, answer)["wer"] == pytest.approx(4 / 3)
    assert score("transcribe", reference, answer, normalizer="basic") == {"wer": 0, "cer": 0, "exact": 0}


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  Ça va ?  ", "ça va"),
        ("«\uff37\uff49de» \u2014 3.5 €", "wide 3 5 €"),
        ("你好\uff0c世界。", "你好 世界"),
        ("...", ""),
    ],
)
def test_the_basic_normaliser(text, plain):
    assert basic(text) == plain


def test_without_words_in_reference_or_answer():
    assert score("transcribe", ["a b"], [""])["wer"] == 1
    assert score("transcribe", ["...", "a b"], ["x", "a b"], normalizer="basic")["wer"] == pytest.approx(
        1 / 2
    )
    assert score("transcribe", ["..."], ["!"], normalizer="basic") == {"wer": 0, "cer": 0, "exact": 0}
    assert score("transcribe", ["..."], ["x y"], normalizer="basic")["wer"] == 2
    assert score_one("fr", "", "")["chrf"] == 0


def test_bleu_of_the_reference_is_100_and_of_other_words_0():
    references = ["il fait dix degrés à paris", "le train part"]
    assert score("fr", references, references) == {
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
        "exact": 1.0,
    }
    scores = score("fr", references, ["x y z w u v", "x y z"])
    assert scores["bleu"] < 1
    assert scores["exact"] == 0.0


def test_signatures_name_the_tokenizer():
    assert "tok:13a" in scores.signatures("fr")["bleu"]
    assert "tok:zh" in scores.signatures("zh_TW")["bleu"]
    assert re.search("tok:(char|ja-mecab)", scores.signatures("ja")["bleu"])
    assert "tok:char" in scores.signatures("th")["bleu"]
    assert "nc:6" in scores.signatures("fr")["chrf"]
    assert score("zh", ["今天天气很好"], ["今天天气不好"])["bleu"] > 20


def test_table_has_a_row_for_each_evaluation():
    scores = {
        "transcribe": {"wer": 0.021, "cer": 0.01, "exact": 0.9},
        "fr": {"bleu": 81.25, "chrf": 90, "exact": 0.5},
    }
    lines = table({"yours": scores, "shipped one": scores}).splitlines()
    assert lines[0].split() == ["WER", "CER", "BLEU", "fr", "chrF", "fr"]
    assert lines[2].split() == ["shipped", "one", "2.1%", "1.0%", "81.2", "90.0"]


def test_lengths_and_error_rates_in_buckets():
    assert [length_name(s) for s in (0.1, 2.0, 2.1, 30, 31)] == [
        "0-2 s",
        "0-2 s",
        "2-5 s",
        "20-30 s",
        "over 30 s",
    ]
    counts = dict(histogram([0, 0, 0.1, 0.11, 1, 7]))
    assert counts["0"] == 2
    assert (counts["≤10"], counts["≤20"], counts["≤100"], counts[">100"]) == (1, 1, 1, 1)


def test_differences_are_those_that_the_wer_counts():
    reference, answer = differences("The cat, sat down.", "the hat sat down now", "basic")
    assert reference == [("same", "The"), ("sub", "cat,"), ("same", "sat down.")]
    assert answer == [("same", "the"), ("sub", "hat"), ("same", "sat down"), ("ins", "now")]
    assert differences("a b", "b") == ([("del", "a"), ("same", "b")], [("same", "b")])
    assert differences("", "a") == ([], [("ins", "a")])
    assert differences("twenty-five", "twenty six", "basic")[0] == [("sub", "twenty-five")]
    assert differences("很好", "不好", by_character=True)[1] == [("sub", "不"), ("same", "好")]


def run(data, output, *more: str) -> dict:
    arguments = ["miniature", str(data), "--output", str(output), "--translate", "fr", *more]
    assert evaluate.main(arguments) == 0
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def done(small_world, tmp_path_factory):
    """The folder of an evaluation of 8 utterances in batches of 3."""
    output = tmp_path_factory.mktemp("evaluation")
    run(small_world / "seen", output, "--batch-size", "3")
    return output


def lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def test_the_files_of_an_evaluation_agree(done, small_world):
    data, rows = DataSet(small_world / "seen"), lines(done)
    results = json.loads((done / "results.json").read_text())
    assert sorted(row["index"] for row in rows) == list(range(8))
    assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)
    for row in rows:
        assert (row["id"], row["fr"]["reference"]) == (
            data[row["index"]].id,
            data[row["index"]].translations["fr"],
        )
        assert row["transcribe"].keys() == {"reference", "answer", "wer", "cer"}
    assert results["normalizer"] == "basic"
    assert results["data set"]["hash"] == data.fingerprint
    scores = results["scores"]
    texts = [[row["fr"][name] for row in rows] for name in ("reference", "answer")]
    assert scores["all"]["scores"]["fr"] == score("fr", *texts)
    assert scores["all"] == scores["by language"]["en"]
    assert sum(one["utterances"] for one in scores["by length"].values()) == scores["all"]["utterances"] == 8

    # As training calls it, in one batch: the same answers.
    by_task, answers = evaluate.evaluate(SparQLe.from_pretrained(), data, ["fr"])
    assert [answers[row["index"]] for row in rows] == [
        {task: row[task]["answer"] for task in ("transcribe", "fr")} for row in rows
    ]
    assert by_task["fr"] == scores["all"]["scores"]["fr"]
    assert by_task["transcribe"]["wer"] < 0.15


def test_the_page_has_the_worst_utterances_with_their_recordings(done):
    page = (done / "index.html").read_text()
    clips = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert clips
    assert page.count("<audio") == len(re.findall(r'data-clip="\d+"', page)) >= len(clips)
    assert all(base64.b64decode(clip)[:4] == b"RIFF" for clip in clips.values())
    assert page.count("<svg") == 2
    assert not re.findall(r'(?:src|href)="https?:', page)  # it works without a network


def test_texts_are_no_markup_on_the_page(done, small_world):
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)> \' " &'
    rows, results = lines(done), json.loads((done / "results.json").read_text())
    for row in rows:
        row |= {"id": evil, "speaker": evil, "language": evil}
        row["transcribe"] |= {"reference": evil, "answer": evil + " <b>more</b>", "wer": 0.5}
        row["fr"]["answer"] = evil
    results["scores"] = scores.group(rows, results["tasks"], "none")
    results["model"]["folder"] = evil
    page = evaluation_page.page(results, rows, DataSet(small_world / "seen"))
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "<b>more" not in page
    assert "&lt;img" in page


@pytest.mark.parametrize("here", [True, False])
def test_what_the_training_data_have_too_is_said(here, small_world, tmp_path, capsys):
    """In what is printed, in results.json and on the page; also that it is not known."""
    model = tmp_path / "model"
    SparQLe.from_pretrained(MODELS / "sparqle").save_pretrained(model, towers=True)
    settings = json.loads((model / "config.json").read_text())
    trained_on = str(small_world / ("train" if here else "nowhere"))
    (model / "config.json").write_text(json.dumps(settings | {"trained_on": [trained_on]}))
    assert evaluate.main([str(model), str(small_world / "seen"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    page = (tmp_path / "out" / "index.html").read_text()
    if here:
        expected = DataSet(small_world / "seen").overlap([DataSet(small_world / "train")])
        assert results["overlap"] == expected
        line = "the training data have 0 utterances, 0 recordings, 0 speakers, 0 texts"
        assert line in printed
        assert line in page
    else:
        assert results["overlap"] is None
        assert "overlap with the training data: not known, as they are not here" in printed
        assert "is not known, as they are not here" in page


def test_recordings_that_have_no_room_on_the_page_are_said_to_be_left_out(done, small_world, monkeypatch):
    monkeypatch.setattr(evaluation_page, "MAX_AUDIO", 100_000)
    results = json.loads((done / "results.json").read_text())
    page = evaluation_page.page(results, lines(done), DataSet(small_world / "seen"))
    assert "Without its recording" in page
    assert len(page) < 200_000


@pytest.mark.parametrize("kept", [2, 5])  # in the first batch and in the second
def test_a_stopped_evaluation_goes_on_to_the_same_results(kept, done, small_world, tmp_path, monkeypatch):
    for name in ("evaluation.json", "answers.jsonl"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    whole = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(whole[:kept]) + whole[kept][:40])
    batches, answer = [], evaluate.Evaluation._answer
    monkeypatch.setattr(
        evaluate.Evaluation, "_answer", lambda self, batch: batches.append(batch) or answer(self, batch)
    )
    run(small_world / "seen", tmp_path, "--batch-size", "3")
    assert len(batches) == 3 - kept // 3
    for name in ("answers.jsonl", "results.json", "index.html"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()

    batches.clear()  # another normaliser needs no new answers
    assert run(small_world / "seen", tmp_path, "--normalizer", "none")["normalizer"] == "none"
    assert not batches


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is gs://bucket."""
    (tmp_path / "bucket").mkdir()
    Bucket(tmp_path / "bucket").use(monkeypatch)
    return tmp_path / "bucket"


def test_an_evaluation_on_gs_is_stopped_and_goes_on_to_the_same_results(
    done, small_world, bucket, monkeypatch
):
    arguments = ["miniature", str(small_world / "seen"), "--translate", "fr", "--batch-size", "3"]
    arguments += ["--output", "gs://bucket/runs/one"]
    monkeypatch.setattr(evaluate, "KEEP_EVERY", 0)
    there, batches, answer = bucket / "runs/one", [], evaluate.Evaluation._answer

    def stop(self, batch):
        batches.append(batch)
        if len(batches) == 3:  # what has been answered so far is safe, whatever ends this
            assert (there / "answers.jsonl").read_text().count("\n") == 6
            raise KeyboardInterrupt
        return answer(self, batch)

    monkeypatch.setattr(evaluate.Evaluation, "_answer", stop)
    assert evaluate.main(arguments) == evaluate.INTERRUPTED
    assert len(lines(there)) == 6
    assert not (there / "results.json").exists()
    assert evaluate.main(arguments) == 0
    assert len(batches) == 4  # only the last one was answered anew
    for name in ("answers.jsonl", "results.json", "index.html"):
        assert (there / name).read_bytes() == (done / name).read_bytes()


def test_answers_of_another_evaluation_are_not_continued(done, small_world, capsys):
    before = (done / "answers.jsonl").read_bytes()
    output = ["--output", str(done)]
    assert evaluate.main(["miniature", str(small_world / "unseen"), *output, "--num-beams", "2"]) == 1
    said = capsys.readouterr().err
    assert "answers of another evaluation" in said
    assert "generation.num_beams is 1 there, 2 here" in said
    assert "data set.hash" in said
    assert "tasks is ['transcribe', 'fr'] there, ['transcribe'] here" in said
    assert (done / "answers.jsonl").read_bytes() == before


def test_damaged_answers_are_not_continued(done, small_world, tmp_path, capsys):
    for name in ("evaluation.json", "answers.jsonl"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    text = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join([text[0], text[2]]))
    arguments = ["miniature", str(small_world / "seen"), "--translate", "fr", "--output", str(tmp_path)]
    assert evaluate.main(arguments) == 1
    assert "is damaged in line 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mesh_gives_the_same_answers(done, small_world, tmp_path):
    run(small_world / "seen", tmp_path, "--batch-size", "3", "--mesh", "2", "-1", "1")
    for name in ("answers.jsonl", "results.json"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()


def test_from_text_the_language_model_alone_is_scored(small_world, tmp_path):
    scores = run(small_world / "seen", tmp_path, "--from-text")["scores"]["all"]["scores"]
    assert scores["transcribe"]["wer"] < 0.05
    assert scores["fr"]["bleu"] > 80


def prepared(tmp_path, **waveforms):
    texts = []
    for name, waveform in waveforms.items():
        soundfile.write(tmp_path / f"{name}.wav", waveform, 16_000)
        texts.append(json.dumps({"id": name, "audio": f"{name}.wav", "text": "some words"}) + "\n")
    (tmp_path / "m.jsonl").write_text("".join(texts))
    arguments = ["manifest", str(tmp_path / "data"), "--manifest", str(tmp_path / "m.jsonl")]
    assert prepare.main([*arguments, "--beam", "runner=DirectRunner"]) == 0
    return tmp_path / "data"


def test_what_is_longer_than_the_model_hears_at_once_is_heard_in_windows(small_world, tmp_path, capsys):
    spoken = DataSet(small_world / "seen")
    both = np.concatenate([spoken.waveform(0), np.zeros(16_000, np.float32), spoken.waveform(1)])
    data = prepared(tmp_path, long=both, short=spoken.waveform(2))
    assert evaluate.main(["miniature", str(data), "--output", str(tmp_path / "out")]) == 0
    long, _ = lines(tmp_path / "out")
    expected = SparQLe.from_pretrained().transcribe((both, 16_000)).text
    assert len(expected.split()) > 5
    assert long["transcribe"]["answer"] == expected


def test_the_encoders_own_window_is_kept_to(small_world, tmp_path, monkeypatch):
    spoken = DataSet(small_world / "seen")
    data = prepared(tmp_path, long=np.concatenate([spoken.waveform(0), spoken.waveform(1)]))
    window = len(spoken.waveform(0)) + 8_000  # shorter than the model's max_seconds
    monkeypatch.setattr(encoders.FAMILIES["hubert"].Config, "max_samples", window)
    sparqle = SparQLe.from_pretrained()
    _, (answers,) = evaluate.evaluate(sparqle, DataSet(data))
    assert answers["transcribe"] == sparqle.transcribe((DataSet(data).waveform(0), 16_000)).text


def test_a_score_that_is_not_there_has_a_dash_and_references_are_counted_where_some_lack():
    all_of_them = {"transcribe": {"wer": 0.5, "cer": 0.25}, "fr": {"bleu": 10.0, "chrf": 20.0, "n": 3}}
    lines = table({"a": all_of_them, "b": {"fr": {"n": 0}}}).splitlines()
    assert lines[0].split() == ["WER", "CER", "n", "fr", "BLEU", "fr", "chrF", "fr"]
    assert lines[1].split() == ["a", "50.0%", "25.0%", "3", "10.0", "20.0"]
    assert lines[2].split() == ["b", "-", "-", "0", "-", "-"]


def test_words_where_nobody_speaks_are_insertions():
    # 4 words, 1 substituted; and 3 that nobody said.
    found = score("transcribe", ["a b c d", "", ""], ["a x c d", "y y y", ""])
    assert found["wer"] == pytest.approx((1 + 3) / 4)
    assert found["exact"] == pytest.approx(1 / 3)
    found = scores.without_speech(["Thank you!", "", "...", "Bye."], 90.0, normalizer="basic")
    assert found == {
        "utterances": 4,
        "seconds": 90.0,
        "with_words": 2,
        "words": 3,
        "words_per_utterance": 0.75,
        "words_per_minute": 2.0,
    }
    line = scores.silence_line(found)
    assert line == "nobody speaks in 4 (1:30 min): 2 got words, 3 in all, 0.75 a recording, 2.0 a minute"


@pytest.fixture(scope="module")
def partly(small_world, tmp_path_factory):
    """The utterances of seen, of which 1, 4 and 6 have a French translation, then silence of two lengths, one
    longer than the model hears at once, and noise: nobody speaks in them."""
    heard, folder = DataSet(small_world / "seen"), tmp_path_factory.mktemp("partly")
    rows = []
    for i, utterance in enumerate(heard):
        soundfile.write(folder / f"{i}.wav", heard.samples(i), 16_000, subtype="PCM_16")
        french = {"fr": utterance.translations["fr"]} if i in (1, 4, 6) else {}
        rows.append({"id": utterance.id, "text": utterance.text, "translations": french})
    noise = 0.1 * np.random.default_rng(0).normal(size=24_000)
    for waveform in (np.zeros(24_000), np.zeros(8 * 16_000), noise):
        soundfile.write(folder / f"{len(rows)}.wav", waveform, 16_000)
        rows.append({"text": ""})
    lines = [json.dumps({"audio": f"{i}.wav", **row}) + "\n" for i, row in enumerate(rows)]
    (folder / "m.jsonl").write_text("".join(lines))
    arguments = ["manifest", str(folder / "data"), "--manifest", str(folder / "m.jsonl"), "--allow-empty"]
    assert prepare.main([*arguments, "--beam", "runner=DirectRunner"]) == 0
    return folder / "data"


def test_only_what_has_a_reference_is_scored_and_nobody_speaking_apart(partly, done, tmp_path, capsys):
    assert SparQLe.from_pretrained().config.max_seconds < 8
    results = run(partly, tmp_path, "--batch-size", "3")
    said = capsys.readouterr().out
    rows = {row["index"]: row for row in lines(tmp_path)}
    assert sorted(rows) == list(range(11))
    expected = {row["index"]: row for row in lines(done)}
    for i in range(8):  # as of the data set in which all have a translation
        assert rows[i]["transcribe"] == expected[i]["transcribe"]
        assert rows[i].get("fr") == (expected[i]["fr"] if i in (1, 4, 6) else None)
    everything = results["scores"]["all"]
    assert everything["references"] == {"transcribe": 11, "fr": 3}
    texts = [[expected[i]["fr"][what] for i in (1, 4, 6)] for what in ("reference", "answer")]
    assert everything["scores"]["fr"] == score("fr", *texts)

    assert rows[8]["transcribe"]["answer"] == rows[9]["transcribe"]["answer"] == ""
    invented = len(basic(rows[10]["transcribe"]["answer"]).split())
    assert rows[10]["transcribe"]["wer"] == invented
    found = everything["without speech"]
    assert (found["utterances"], found["words"], found["with_words"]) == (3, invented, int(invented > 0))
    assert found["words_per_minute"] == pytest.approx(invented / 11 * 60)
    assert everything["utterances"] == 11
    words = sum(len(basic(expected[i]["transcribe"]["reference"]).split()) for i in range(8))
    wrong = sum(
        expected[i]["transcribe"]["wer"] * len(basic(expected[i]["transcribe"]["reference"]).split())
        for i in range(8)
    )
    assert everything["scores"]["transcribe"]["wer"] == pytest.approx((wrong + invented) / words)

    line = scores.silence_line(found)
    assert line in said
    assert line in (tmp_path / "index.html").read_text()
    assert said.splitlines()[0].split()[:4] == ["WER", "CER", "n", "fr"]
    assert re.search(r"^all \(11\) +[\d.]+% +[\d.]+% +3 ", said, re.M)
    assert results["scores"]["by length"]["5-10 s"]["utterances"] == 1  # the longer silence, without a WER
    assert re.search(r"^5-10 s \(1\) +- +- +0 +- +-$", said, re.M)

    by_task, answers = evaluate.evaluate(SparQLe.from_pretrained(), DataSet(partly), ["fr"])
    assert by_task["fr"] == everything["scores"]["fr"]
    assert [i for i, row in enumerate(answers) if "fr" in row] == [1, 4, 6]


def test_a_data_set_in_which_nobody_speaks_at_all(tmp_path, capsys):
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(16_000), 16_000)
    rows = "".join(f'{{"audio": "{i}.wav", "text": ""}}\n' for i in range(2))
    (tmp_path / "m.jsonl").write_text(rows)
    arguments = ["manifest", str(tmp_path / "data"), "--manifest", str(tmp_path / "m.jsonl")]
    with pytest.raises(SystemExit):
        prepare.main([*arguments, "--beam", "runner=DirectRunner"])
    assert "none of 2 records can be used" in capsys.readouterr().err
    assert prepare.main([*arguments, "--allow-empty", "--beam", "runner=DirectRunner"]) == 0
    assert "2 in which nobody speaks" in capsys.readouterr().out
    assert evaluate.main(["miniature", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    line = "nobody speaks in 2 (0:02 min): 0 got words, 0 in all, 0.00 a recording, 0.0 a minute"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "out/index.html").read_text()


def test_mistakes_in_the_command_are_said(small_world, tmp_path, capsys):
    data = str(small_world / "seen")
    for arguments, message in [
        (["miniature", str(tmp_path)], "is no data set: it has no index.arrow"),
        ([str(tmp_path), data], "is no model folder"),
        (["miniature", data, "--translate", "it"], "has no translations into 'it'"),
        (["miniature", data, "--batch-size", "0"], "at least 1"),
        (["miniature", data, "--mesh", "3", "1", "1"], "needs 3 devices, but there are 8"),
        (["miniature", data, "--num-beams", "0"], "must be at least 1"),
    ]:
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert message in capsys.readouterr().err
