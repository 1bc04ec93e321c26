"""The README's Python runs as it stands there, on tiny models under the names of the large ones."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparqle_jax.demo import say
from tests.conftest import part_of

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def save_model(folder: Path, config: dict, tensors: dict) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folders(tmp_path, tiny, monkeypatch) -> Path:
    """A folder to work in, with what the README tells to download, but tiny."""
    stage1, stage2 = (load_file(tiny.folder / f"stage{n}_state_dict.safetensors") for n in (1, 2))
    hubert = {"model_type": "hubert", **tiny.config["hubert"]}
    save_model(tmp_path / "hubert-large-ll60k", hubert, part_of(stage2, "speech_encoder."))
    save_model(tmp_path / "Meta-Llama-3-8B-Instruct", tiny.config["llm"], part_of(stage2, "llama_model."))

    sizes = tiny.config["qformer"]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    bert = {"model_type": "bert"} | {name: sizes[name] for name in names}
    tensors = part_of(stage1, "Qformer.")
    tensors = {k: v for k, v in tensors.items() if "_query" not in k and "crossattention" not in k}
    position_embeddings = tensors["bert.embeddings.position_embeddings.weight"]
    bert["max_position_embeddings"] = len(position_embeddings)
    save_model(tmp_path / "bert-base-uncased", bert, tensors)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "bert-base-uncased")
    for seed, name in enumerate(("speech", "one", "two")):
        noise = np.random.default_rng(seed).normal(size=16_000).clip(-3, 3) / 4
        soundfile.write(tmp_path / f"{name}.flac", noise, 16_000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: str, **sizes: str) -> dict:
    """Runs a block after replacing the large models' sizes, each of which must be there."""
    for large, small in sizes.items():
        assert large.strip("_") in block
        block = block.replace(large.strip("_"), small)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_a_model_in_use(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    say.main(["the train to vienna leaves at seven thirty five"])
    capsys.readouterr()
    run(BLOCKS[0])
    heard, german, french, segments = capsys.readouterr().out.splitlines()
    assert heard == "the train to vienna leaves at seven thirty five"
    assert german == " ".join(["der zug nach wien fährt um sieben uhr fünfunddreißig"] * 2)
    assert french == "le train pour vienne part à sept heures trente-cinq"
    assert re.fullmatch(r"0\.0 to 2\.\d s: the train to vienna leaves at seven thirty five", segments)


def test_a_first_look(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run(BLOCKS[1])
    tokens = re.findall(r"\d+", capsys.readouterr().out)
    assert len(tokens) == 10


@pytest.mark.slow
def test_a_training_step(folders):
    names = run(BLOCKS[3], _768="32")
    before = jax.tree.leaves(names["partition"](names["aligner"])[1])
    changed = [
        not np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(names["trained"]), strict=True)
    ]
    assert np.isfinite(names["loss"])
    assert np.mean(changed) > 0.9
    assert set(names["parts"]) == {"stc", "stm", "stg"}
