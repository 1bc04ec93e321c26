"""The Colab notebooks, from top to bottom, as on a machine without an accelerator and with the miniature."""

import json
from pathlib import Path

import pytest

from sparqle_jax.config import read_config
from sparqle_jax.sparqle import SparQLe

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "launch").glob("*.ipynb"))
TIMEOUT = 500  # seconds, of a cell


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in a folder of its own: what cells have printed, and the types of all they show."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat reads notebooks: pip install nbclient")
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs notebooks: pip install nbclient")
    pytest.importorskip("ipykernel", reason="notebooks run in ipykernel: pip install ipykernel")
    pytest.importorskip("espeakng_loader", reason="espeak-ng says the sentences: pip install -e '.[demo]'")
    pytest.importorskip("matplotlib", reason="a notebook draws: pip install -e '.[prepare]'")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS")  # those of the tests compile fast and run slowly

    def run(name: str) -> tuple[list[str], set[str]]:
        notebook = nbformat.read(ROOT / "launch" / name, as_version=4)
        client = nbclient.NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        )
        client.execute()  # raises CellExecutionError, with the cell, for the first that fails
        outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
        printed = ["".join(out["text"] for out in some if out.get("name") == "stdout") for some in outputs]
        shown = {kind for some in outputs for out in some for kind in out.get("data", {})}
        return [text.strip() for text in printed if text], shown

    return run


def wer(folder: Path) -> float:
    scores = json.loads((folder / "results.json").read_text())["scores"]["all"]
    assert scores["utterances"] == 20
    return scores["scores"]["transcribe"]["wer"]


def test_there_are_two():
    assert [file.name for file in NOTEBOOKS] == ["colab_demo.ipynb", "colab_finetune.ipynb"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_are_not_stored(file):
    notebook = json.loads(file.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "colab" in notebook["metadata"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_they_are_valid(file):
    nbformat = pytest.importorskip("nbformat", reason="nbformat reads notebooks: pip install nbclient")
    nbformat.validate(json.loads(file.read_text()))


@pytest.mark.slow
def test_the_demo_hears_and_draws(execute, tmp_path):
    printed, shown = execute("colab_demo.ipynb")
    assert {"image/png", "text/html"} <= shown  # the picture, and the player
    assert "the train to vienna leaves at seven thirty five" in printed
    (translations,) = (text for text in printed if text.startswith("German: "))
    german, french = translations.splitlines()
    assert german == "German: der zug nach wien fährt um sieben uhr fünfunddreißig"
    assert french.startswith("French: le train ")
    subtitles = (tmp_path / "long.srt").read_text()
    assert subtitles.strip() in printed
    assert subtitles.count(" --> ") == 3
    assert "my sister has twelve apples" in subtitles


@pytest.mark.slow
def test_fine_tuning_halves_the_errors(execute, tmp_path):
    printed, _ = execute("colab_finetune.ipynb")
    before, after = (wer(tmp_path / "finetune" / name) for name in ("before", "after"))
    print(f"WER before: {before:.1%}, after: {after:.1%}")
    assert f"WER before: {before:.1%}, after: {after:.1%}" in printed
    assert before > 0.3
    assert after < before / 2
    (saved,) = (tmp_path / "saved").iterdir()
    (listened,) = (text for text in printed if text.startswith("said: "))
    heard = listened.splitlines()[2].removeprefix("after: ").strip()
    assert printed[-1].splitlines() == [str(saved), heard]
    assert SparQLe.from_pretrained(saved).config.encoder.folder.is_relative_to(saved)


def test_the_recipe_of_the_notebook_is_the_one_for_the_shell():
    config = read_config(ROOT / "configs" / "finetune.py")
    assert config.stage1 is None
    assert config.init_from.is_file()
    assert config.stage2.steps == 200
    assert config.stage2.optim.lr == 1e-3
