import json

import pytest

from benchmarks import __main__ as bench


@pytest.mark.slow
def test_every_work_is_timed(tmp_path, capfd):
    """With tiny sizes; with PyTorch where it is there."""
    output = tmp_path / "results.json"
    assert bench.main(["--size", "tiny", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert [row["work"] for row in results["rows"]["ours"]] == [
        "encoder",
        "stage1",
        "stage2",
        *["decoding"] * 2,
    ]
    printed = capfd.readouterr().out
    for name, rows in results["rows"].items():
        assert len(rows) == 5
        for row in rows:
            assert row["seconds"] > 0
            assert name == "ours" or f"{name} {1e3 * row['seconds']:.2f} ms" in printed
