import json

from benchmarks import encoder


def test_the_encoder_is_timed(tmp_path, capsys):
    """Of tiny sizes; with PyTorch where it is there."""
    output = tmp_path / "encoder.json"
    assert encoder.main(["--size", "tiny", "--output", str(output)]) == 0
    assert "HuBERT, 2 x 1 s, float32" in capsys.readouterr().out
    results = json.loads(output.read_text())
    assert results["ours"].keys() == {"seconds", "compile_seconds", "bytes"}
    assert results["ours"]["seconds"] > 0
