"""What `show` says of a data set is what is in it."""

import json
import re

import matplotlib.image
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparqle_jax.config import read_config
from sparqle_jax.data import prepare, show
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.demo.__main__ import CONFIG


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer that knows the letters from a to z, whatever word they are in."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    words = ["[UNK]", *alphabet, *(f"##{letter}" for letter in alphabet)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    folder = tmp_path_factory.mktemp("letters")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_counts_lengths_and_buckets(small_world, tmp_path, capsys):
    arguments = ["--batch-size", "2", "--buckets", "2", "--examples", "2", "--output", str(tmp_path)]
    assert show.main([str(small_world / "train"), *arguments]) == 0
    printed = capsys.readouterr().out
    data = DataSet(small_world / "train")
    seconds = data.num_samples / 16_000
    assert f"24 recordings, {seconds.sum() / 3600:.2f} hours" in printed
    assert f"lengths: {seconds.min():.2f} to {seconds.max():.2f} s, mean {seconds.mean():.2f} s" in printed
    assert "languages: en; translated into: de, es, fr" in printed
    rows = re.findall(r"^ +([\d.]+) s +(\d+) +(\d+) +([\d.]+)%$", printed, re.M)
    assert len(rows) == 2
    assert sum(int(size) * int(number) for _, size, number, _ in rows) == 24

    fixed = re.search(r"--set '(data.buckets=\[.*\])'", printed)[1]
    assert len(read_config(CONFIG, [fixed]).data.buckets) == 2
    picture = matplotlib.image.imread(tmp_path / "lengths.png")
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.05  # there is something on it
    for name in re.findall(r"^\S+/(\d+)\.wav: ", printed, re.M):
        waveform, _ = soundfile.read(tmp_path / f"{name}.wav", dtype="float32")
        np.testing.assert_array_equal(waveform, data.waveform(int(name)))
        assert data[int(name)].text in printed


def test_characters_that_the_tokenizer_has_never_seen(letters, tmp_path, capsys):
    rng = np.random.default_rng(0)
    texts = ["all known", "ten °", "naïve ж and ж"]
    for i in range(len(texts)):
        soundfile.write(tmp_path / f"{i}.wav", rng.normal(0, 0.1, 16_000), 16_000)
    rows = [json.dumps({"audio": f"{i}.wav", "text": text}) for i, text in enumerate(texts)]
    rows.append(json.dumps({"audio": "missing.wav", "text": "x"}))
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    made = ["manifest", str(tmp_path / "data"), "--manifest", str(tmp_path / "m.jsonl")]
    assert prepare.main([*made, "--max-rejected", "0.5", "--beam", "runner=DirectRunner"]) == 0
    capsys.readouterr()
    arguments = ["--tokenizer", str(letters), "--output", str(tmp_path / "shown")]
    assert show.main([str(tmp_path / "data"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "rejected, no such file: 1" in printed
    assert "2 texts have words that the tokenizer does not know" in printed
    unseen = re.search(r"has never seen: (.*)$", printed, re.M)[1].split(", ")
    assert unseen[0] == "'ж' (2 times)"
    assert set(unseen[1:]) == {"'°' (1 times)", "'ï' (1 times)"}
    assert "at most 8" in printed  # a l l k n o w n


def test_what_is_not_there_is_said(small_world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        show.main([str(tmp_path)])
    assert "is no data set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        show.main([str(small_world / "train"), "--tokenizer", "nowhere"])
    assert "nowhere is no folder" in capsys.readouterr().err


def test_translations_that_lack_and_recordings_without_speech_are_counted(tmp_path, letters, capsys):
    rows = [{"text": "ab", "translations": {"de": "cd"}}, {"text": "ef"}, {"text": ""}]
    for i in range(3):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, 16_000)
        soundfile.write(tmp_path / f"{i}.wav", noise, 16_000)
    lines = [json.dumps({"audio": f"{i}.wav", **row}) + "\n" for i, row in enumerate(rows)]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    arguments = ["manifest", str(tmp_path / "data"), "--manifest", str(tmp_path / "m.jsonl"), "--allow-empty"]
    assert prepare.main([*arguments, "--beam", "runner=DirectRunner"]) == 0
    capsys.readouterr()
    arguments = ["--buckets", "1", "--tokenizer", str(letters), "--output", str(tmp_path / "show")]
    assert show.main([str(tmp_path / "data"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "translated into: de\n" in printed
    assert "without a translation into de: 2\n" in printed
    assert "nobody speaks in 1 of them" in printed
    assert "de: 1 texts, 2.0 tokens on average, at most 2" in printed
    assert re.search(r"transcribe: 3 texts, 1\.3 tokens", printed)
    assert "2.wav: (nobody speaks)" in printed
