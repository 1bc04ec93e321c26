"""The demo through its command, on a setting that is smaller still."""

import base64
import hashlib
import json
import re
import shlex

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sparqle_jax import assemble, evaluate, pretrained, train
from sparqle_jax.config import read_config
from sparqle_jax.demo import __main__ as demo
from sparqle_jax.demo import encoder, language_model, release, study
from sparqle_jax.sparqle import SparQLe


def run_demo(run, data, *more: str) -> dict:
    arguments = ["--run", str(run), "--data", str(data), "--train", "24", "--test", "8", "--steps", "3"]
    small = ["--set", "stage2.batch_size=8", "--set", "stage2.log_every=1"]
    assert demo.main([*arguments, *small, *more]) == 0
    return json.loads((run / "results.json").read_text())


@pytest.mark.slow
def test_the_demo_leaves_its_page_and_numbers(small_world, tmp_path, capsys):
    results = run_demo(tmp_path / "run", small_world)
    assert results.keys() == {"yours", "shipped", "from text"}
    for by_set in results.values():
        assert by_set.keys() == {"seen", "unseen"}
        for scores in by_set.values():
            assert scores.keys() == {"transcribe", "fr", "de", "es"}
    assert results["shipped"]["seen"]["transcribe"]["wer"] < results["yours"]["seen"]["transcribe"]["wer"]
    assert (tmp_path / "run" / "stage2" / "checkpoints" / "3").is_dir()

    page = (tmp_path / "run" / "index.html").read_text()
    content = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert len(content["utterances"]) == 12
    card = content["utterances"][0]
    weights = np.frombuffer(base64.b64decode(card["attention"]["weights"]), np.uint8)
    assert weights.size == card["attention"]["queries"] * card["attention"]["frames"]
    assert card["attention"]["frames"] == pytest.approx(card["seconds"] * 50, abs=2)
    assert base64.b64decode(card["audio"].split(",")[1])[:4] == b"RIFF"
    assert [c["name"] for c in content["curves"]] == ["yours", "shipped"]
    assert not re.findall(r'(?:src|href)="https?:', page)  # it works without a network

    printed = capsys.readouterr().out
    assert "shipped, unseen" in printed
    assert list((small_world / "frames").glob("*.frames"))

    # What it says to try next works as it stands there, but for the name of the new run.
    commands = dict(re.findall(r"^  python -m sparqle_jax\.(\w+) (.*?)   #", printed, re.M))
    next_run = commands["train"].replace("runs/mine", str(tmp_path / "next"))
    assert train.main(shlex.split(next_run)) == 0
    trained = json.loads((tmp_path / "next" / "config.json").read_text())
    assert trained["stage2"]["optim"]["lr"] == 5e-4
    evaluate.main(shlex.split(commands["evaluate"]))
    assert "WER" in capsys.readouterr().out

    again = run_demo(tmp_path / "again", small_world)
    assert again == results  # the same seed, the same numbers


@pytest.mark.slow
def test_from_scratch_to_a_package_of_its_own(small_world, tmp_path, monkeypatch):
    def shrink(module, *arguments: str) -> None:
        main = module.main
        monkeypatch.setattr(module, "main", lambda argv: main([*argv, *arguments]))

    monkeypatch.setattr(encoder, "CLUSTERS", 8)
    monkeypatch.setattr(encoder, "CROP", 40)
    monkeypatch.setattr(language_model, "SENTENCES", 200)
    shrink(encoder, "--steps", "2", "2", "--batch-size", "2", "--width", "32", "--layers", "2")
    shrink(language_model, "--steps", "2", "--batch-size", "2", "--width", "32", "--layers", "1")
    sizes = dict(num_queries=4, span_frames=150, hidden_size=32, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=2, intermediate_size=64, max_position_embeddings=32)
    changes = [
        f"adapter={json.dumps({'kind': 'qformer', **sizes})}",
        "stage1.embed_dim=8",
        "max_new_tokens=8",
    ]
    changes += [f"{stage}.{size}" for stage in ("stage1", "stage2") for size in ("steps=2", "batch_size=8")]
    run = tmp_path / "run"
    arguments = [
        "--from-scratch",
        "--run",
        str(run),
        "--data",
        str(small_world),
        "--train",
        "24",
        "--test",
        "8",
    ]
    assert demo.main([*arguments, *(arg for change in changes for arg in ("--set", change))]) == 0
    assert json.loads((run / "results.json").read_text()).keys() == {"yours", "from text"}
    assert (run / "index.html").is_file()

    package = tmp_path / "models"
    monkeypatch.setattr(release, "MODELS", package)
    release.main([str(run)])
    model = SparQLe.from_pretrained(package / "sparqle").model
    assert model.encoder.config.num_hidden_layers == 2
    assert model.llm.config.vocab_size == language_model.VOCAB_SIZE
    assert model.adapter.config.num_queries == 4
    stage1 = assemble.load_aligner(package / "stage1.safetensors", model.encoder)
    assert stage1.adapter.vocab_size is not None


@pytest.mark.slow
def test_a_study_trains_variants_and_collects_their_scores(small_world, tmp_path, capsys):
    assert study.main([]) == 0
    listed = capsys.readouterr().out
    for name in study.VARIANTS:
        assert f"  {name} " in listed
    with pytest.raises(SystemExit):
        study.main(["everything"])

    small = ["--data", str(small_world), "--folder", str(tmp_path), "--train", "24", "--test", "8"]
    steps = ["--set", "stage2.steps=2", "--set", "stage2.batch_size=8"]
    assert study.main(["translations", *small, *steps]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["translations"].keys() == {"seen", "unseen"}
    assert re.search(r"^\| translations \| [\d.]+% \| [\d.]+ \|", capsys.readouterr().out, re.M)
    trained = json.loads((tmp_path / "translations" / "config.json").read_text())
    assert trained["stage2"]["tasks"].keys() == {"transcribe", "fr", "de", "es"}


@pytest.mark.parametrize("name", study.VARIANTS)
def test_every_variant_is_a_configuration_of_its_own(name):
    config = read_config(study.CONFIG, study.VARIANTS[name])
    assert config != read_config(study.CONFIG)


def test_mfccs_have_a_row_for_every_frame():
    config = pretrained.load_encoder(demo.MODELS / "hubert").config
    for num_samples in (1040, 1359, 1360, 16_000, 33_333):
        waveform = np.random.default_rng(0).normal(size=num_samples).astype(np.float32)
        assert encoder.mfcc(waveform).shape == (config.num_frames(num_samples), 39)


def test_a_blurred_sentence_keeps_its_tokens_in_order():
    for seed in range(20):
        weights = language_model.spread([3, 5, 2, 7], 24, np.random.default_rng(seed))
        assert weights.shape == (24, 4)
        assert (weights.sum(1) <= 1 + 1e-6).all()
        centres = (weights * np.arange(24)[:, None]).sum(0) / weights.sum(0)
        assert (np.diff(centres) > 0).all()


def test_what_is_shipped_is_small_and_is_what_its_list_says():
    listed = dict(
        re.findall(r"^\| (\S+) \| [\d,]+ \| (\w{64}) \|$", (demo.MODELS / "README.md").read_text(), re.M)
    )
    files = {str(p.relative_to(demo.MODELS)): p for p in demo.MODELS.rglob("*") if p.is_file()}
    assert set(listed) == set(files) - {"README.md"}
    for name, digest in listed.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in files.values()) < 20e6


def test_shipping_halves_the_adapter(tmp_path):
    tensors = {"a": np.float32([[0.1, 2.0]]), "position_ids": np.arange(4)}
    save_file(tensors, tmp_path / "a.safetensors", {"qformer": "{}"})
    release.to_float16(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "np") as file:
        assert file.metadata() == {"qformer": "{}"}
        halves = {name: file.get_tensor(name) for name in tensors}
    assert halves["a"].dtype == np.float16
    np.testing.assert_allclose(halves["a"], tensors["a"], rtol=1e-3)
    np.testing.assert_array_equal(halves["position_ids"], tensors["position_ids"])
