"""The first line that a user sees is ours, and third parties' words that mean nothing are not shown."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from sparqle_jax import quiet
from sparqle_jax.demo.speech import Voice, synthesise

ROOT = Path(__file__).parents[1]
NO_LIBTPU = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
hidden = lambda name, *args: None if name.partition(".")[0] == "libtpu" else find(name, *args)
machinery.PathFinder.find_spec = hidden
"""


def run(module: str, *arguments: str, libtpu: bool, folder: Path) -> str:
    """What a command writes to stderr, in an environment such as a user has."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "TPU", "XLA", "TRANSFO"))}
    paths = [str(ROOT)]
    if not libtpu:
        (folder / "hidden").mkdir(exist_ok=True)
        (folder / "hidden" / "sitecustomize.py").write_text(NO_LIBTPU)
        paths.insert(0, str(folder / "hidden"))
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", f"sparqle_jax.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stderr


# Every line that a command may write: its own messages and progress bars.
OURS = re.compile(
    r"""\s*$|(list|prepare|evaluate|stage2|frames|test|texts.*|tokens.*|\d+\ recordings)\b.*(\||\[).*
    |[\d.]+\ s\ of\ audio\ in\ .*|stage2:\ .*|done:\ .*""",
    re.VERBOSE,
)


@pytest.mark.slow
@pytest.mark.parametrize("libtpu", [True, False])
def test_stderr_of_the_commands_is_ours_alone(libtpu, tmp_path):
    if libtpu:
        pytest.importorskip("libtpu", reason="only Linux on x86-64 has it")
    rows = []
    for number in range(8):
        text = f"my sister has {number + 2} flowers"
        waveform = synthesise(text, Voice("en-us", "m3", 200))
        soundfile.write(tmp_path / f"{number}.wav", waveform, 16_000, subtype="PCM_16")
        rows.append({"audio": f"{number}.wav", "text": text})
    manifest, data = tmp_path / "mine.jsonl", tmp_path / "data"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"run={tmp_path / 'run'}", f"data.train={data}", "data.frames=null", "stage2.steps=2"]
    settings += ["stage2.batch_size=4", "stage2.save_every=2"]
    options = dict(libtpu=libtpu, folder=tmp_path)
    for module, *arguments in (
        ("transcribe", str(tmp_path / "0.wav")),
        ("data.prepare", "manifest", str(data), "--manifest", str(manifest)),
        ("train", "configs/finetune.py", *(part for one in settings for part in ("--set", one))),
        ("evaluate", str(tmp_path / "run" / "stage2"), str(data), "--output", str(tmp_path / "results")),
    ):
        stderr = run(module, *arguments, **options)
        strangers = [line for line in re.split(r"[\r\n]+", stderr) if not OURS.match(line)]
        assert not strangers, (module, strangers)


def test_a_machine_with_an_accelerator_is_left_alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TPU_", "JAX_")):
            monkeypatch.delenv(name)
    there: set[str] = set()
    monkeypatch.setattr(quiet.glob, "glob", lambda pattern: [pattern] if pattern in there else [])
    monkeypatch.setattr(quiet.importlib.util, "find_spec", lambda name: object())
    quiet.third_parties()
    assert os.environ.pop("JAX_PLATFORMS") == "cpu"
    for device in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*"):
        there = {device}
        quiet.third_parties()
        assert "JAX_PLATFORMS" not in os.environ
    there = set()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host")
    quiet.third_parties()
    assert "JAX_PLATFORMS" not in os.environ


def test_noise_of_child_processes_alone_is_left_out(capfd):
    noise = re.compile(rb"^noise")
    with quiet.processes_without(noise):
        print("noise of our own", file=sys.stderr)
        script = "import sys; print('noise', file=sys.stderr); print('an error', file=sys.stderr)"
        subprocess.run([sys.executable, "-c", script], check=True)
    print("after", file=sys.stderr)
    assert capfd.readouterr().err.splitlines() == ["noise of our own", "an error", "after"]
