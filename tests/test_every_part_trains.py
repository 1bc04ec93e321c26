"""Every encoder and every adapter through the commands: trained, stopped, resumed, exported, heard with."""

import itertools
import json
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
from flax import nnx
from safetensors.numpy import load_file
from transformers import HubertConfig, Wav2Vec2Config, WavLMConfig, WhisperConfig

from sparqle_jax import SparQLe, adapters, encoders, export, metrics, pretrained, train, transcribe
from sparqle_jax.data.dataset import DataSet

SPEECH = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SPEECH |= dict(conv_dim=[16] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
TOWERS = {
    "hubert": HubertConfig(**SPEECH),
    "wav2vec2": Wav2Vec2Config(**SPEECH),
    "wavlm": WavLMConfig(**SPEECH, num_buckets=16),
    "whisper": WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=150,  # 3 s, as long as the miniature hears
    ),
}
BERT = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
ADAPTERS = {
    "conv1d": dict(kernel=5, stride=5, hidden=16),
    "cross_attention": dict(num_queries=4, num_hidden_layers=1, **BERT),
    "fully_connected": dict(k=3, hidden=[32, 16]),
    "linear": dict(k=5, hidden=16),
    "pooling": dict(k=4, width=32),
    "qformer": dict(num_queries=4, num_hidden_layers=1, **BERT),
    "windowed_qformer": dict(window=17, stride=17, num_queries=1, **BERT),
}
# LoRA and a mix of layers go with WavLM.
PAIRS = list(itertools.product(TOWERS, ADAPTERS))


def test_every_part_is_here():
    assert TOWERS.keys() == encoders.FAMILIES.keys()
    assert ADAPTERS.keys() == adapters.KINDS.keys()


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, Path]:
    """Folders as transformers saves them, with random weights."""
    folders = {}
    for family, settings in TOWERS.items():
        part = encoders.FAMILIES[family]
        encoder = part.Encoder(part.Config.from_dict(settings.to_dict()), rngs=nnx.Rngs(0))
        folders[family] = tmp_path_factory.mktemp(family)
        pretrained.save_folder(encoder, folders[family], settings, dtype=np.float32)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_through_the_commands(family, kind, towers, small_world, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    changes = [
        f"run={run}",
        f"encoder={towers[family]}",
        f"adapter={json.dumps({'kind': kind} | ADAPTERS[kind])}",
        "stage1=null",
        f"data.train={small_world / 'train'}",
        "data.valid={}",
        "data.frames=null",
        "stage2.steps=10",
        "stage2.batch_size=8",
        "stage2.save_every=5",
        "stage2.log_every=1",
        "max_new_tokens=4",
    ]
    if family == "wavlm":  # as SpeechVerse has it
        changes += ["encoder.layer_mix=true", 'stage2.lora={"rank": 2}']
    arguments = ["configs/tiny.py", *(part for change in changes for part in ("--set", change))]
    write = metrics.Log._write

    def write_and_stop(self, step, row):
        write(self, step, row)
        if step == 5 and "loss" in row:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Log, "_write", write_and_stop)
        assert train.main(arguments) == 130
    assert not (run / "stage2" / "adapter.safetensors").exists()
    assert train.main(arguments) == 0
    rows = [json.loads(line) for line in (run / "stage2" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert np.isfinite([row["loss"] for row in rows]).all()

    assert export.main([str(run / "stage2"), str(tmp_path / "model"), "--towers"]) == 0
    saved, exported = (load_file(f / "adapter.safetensors") for f in (run / "stage2", tmp_path / "model"))
    assert saved.keys() == exported.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(value, exported[name])
    if family == "wavlm":
        assert {"encoder.weights", "llm.layers.query.lora_a"} < saved.keys()

    utterance = DataSet(small_world / "seen")
    soundfile.write(tmp_path / "a.wav", utterance.waveform(0), 16_000)
    capsys.readouterr()
    assert transcribe.main([str(tmp_path / "a.wav"), "--model", str(tmp_path / "model")]) == 0
    heard = capsys.readouterr().out.strip()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # four tokens are no answer
        assert heard == SparQLe.from_pretrained(run / "stage2").transcribe(str(tmp_path / "a.wav")).text
