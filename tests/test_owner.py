"""Who trains into a folder: on a disk, in a bucket, and through the command."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from sparqle_jax import owner
from tests.bucket import Bucket
from tests.test_train import arguments

HOLDER = """
import sys, time
from etils import epath
from sparqle_jax import owner
release = owner.claim(epath.Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""

LOOKER = """
import fcntl, sys, time
with open(sys.argv[1] + "/owner.json", "w+") as file:
    fcntl.lockf(file, fcntl.LOCK_SH)
    print("looking", flush=True)
    time.sleep(0.5)
time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen:
    """A process that has claimed the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    return process


def test_a_lock_says_who_has_it_and_ends_with_its_process(tmp_path):
    folder = epath.Path(tmp_path)
    owner.check(folder)
    assert not list(tmp_path.iterdir())
    process = hold(tmp_path)
    try:
        for ask in (owner.check, owner.claim):
            with pytest.raises(owner.OwnedError) as raised:
                ask(folder)
            assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(raised.value)
            assert "choose another folder with --set run=FOLDER" in str(raised.value)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    owner.check(folder)
    release = owner.claim(folder)
    assert json.loads((tmp_path / owner.FILE).read_text())["process"] == os.getpid()
    release()
    process = hold(tmp_path)
    process.kill()


def test_whoever_looks_is_not_in_the_way(tmp_path):
    """Neither of others that look, nor, for the moment that it takes, of who claims."""
    looking = subprocess.Popen(
        [sys.executable, "-c", LOOKER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert looking.stdout.readline() == "looking\n"
        owner.check(epath.Path(tmp_path))
        owner.claim(epath.Path(tmp_path))()
    finally:
        looking.kill()
        looking.wait()


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    Bucket(tmp_path).use(monkeypatch)
    monkeypatch.setattr(owner, "RENEWAL", 0.1)
    monkeypatch.setattr(owner, "STALE", 1.0)
    return tmp_path


def test_a_disk_without_locks_has_leases(tmp_path, monkeypatch):
    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(owner.fcntl, "lockf", without_locks)
    monkeypatch.setattr(owner, "RENEWAL", 0.1)
    monkeypatch.setattr(owner, "STALE", 1.0)
    folder = epath.Path(tmp_path)
    for _ in range(2):  # the second finds what the first has left
        release = owner.claim(folder)
        owner.check(folder)
        with pytest.raises(owner.OwnedError, match=rf"process {os.getpid()} on "):
            owner.claim(folder)
        release()


@pytest.mark.usefixtures("bucket")
class TestLease:
    FOLDER = epath.Path("gs://bucket/run")

    def test_one_that_is_renewed_is_anothers(self, capsys):
        release = owner.claim(self.FOLDER)
        with pytest.raises(owner.OwnedError, match=rf"process {os.getpid()} on .* since 20"):
            owner.claim(self.FOLDER)
        assert "has had an owner: is it alive? Up to 1 s" in capsys.readouterr().err
        release()
        owner.claim(self.FOLDER)()

    def test_what_is_given_back_is_gone(self, bucket):
        owner.claim(self.FOLDER)()
        assert not (bucket / "run" / owner.LEASE).exists()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_one_that_is_not_renewed_is_taken_over_and_its_owner_ends(self, monkeypatch, capsys):
        """As after a kill; and if it was only slow, it must not write any more."""
        ended = []

        def leave(status: int) -> None:
            ended.append(status)
            raise SystemExit  # of the thread

        monkeypatch.setattr(owner.os, "_exit", leave)
        monkeypatch.setattr(owner, "RENEWAL", 2.5)
        owner.claim(self.FOLDER)
        monkeypatch.setattr(owner, "RENEWAL", 0.1)
        release = owner.claim(self.FOLDER)
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ended[0] == owner.LOST
        assert "another process has taken over run=gs://bucket/run" in capsys.readouterr().err
        monkeypatch.setattr(owner, "RENEWAL", 0.0)
        release()

    def test_a_network_that_fails_for_a_while_ends_nothing(self, monkeypatch):
        """The lease is renewed again after that, and is its owner's."""
        down = threading.Event()
        monkeypatch.setattr(owner.fsspec.core, "url_to_fs", failing(owner.fsspec.core.url_to_fs, down))
        release = owner.claim(self.FOLDER)
        down.set()
        time.sleep(0.5)
        down.clear()
        with pytest.raises(owner.OwnedError, match=rf"process {os.getpid()} on "):
            owner.claim(self.FOLDER)
        release()

    def test_of_two_that_come_at_once_one_has_it(self, monkeypatch):
        """The second sees no lease, and then there is one: the bucket itself refuses a second object."""
        release = owner.claim(self.FOLDER)
        monkeypatch.setattr(owner.fsspec.core, "url_to_fs", blind(owner.fsspec.core.url_to_fs))
        with pytest.raises(owner.OwnedError):
            owner.claim(self.FOLDER)
        release()


def blind(url_to_fs):
    """File systems that at the first look see no file."""
    looks = iter([True])

    def read(fs, path):
        if next(looks, False):
            raise FileNotFoundError(path)
        return fs.cat_file(path)

    return reading(url_to_fs, read)


def failing(url_to_fs, down: threading.Event):
    """File systems that can't be reached while `down`."""

    def read(fs, path):
        if down.is_set():
            raise ConnectionError("the network is down")
        return fs.cat_file(path)

    return reading(url_to_fs, read)


def reading(url_to_fs, read):
    """File systems whose files are read by `read(fs, path)`."""

    class Other:
        def __init__(self, fs):
            self.fs = fs

        def __getattr__(self, name):
            return getattr(self.fs, name)

        def cat_file(self, path):
            return read(self.fs, path)

    def open_other(url: str):
        fs, path = url_to_fs(url)
        return Other(fs), path

    return open_other


@pytest.mark.slow
def test_the_second_command_ends_at_once_and_the_first_goes_on(small_world, tmp_path):
    run = tmp_path / "run"
    changes = arguments(run, small_world, "stage1=null", "stage2.steps=40", "stage2.evaluate=false")
    command = [sys.executable, "-m", "sparqle_jax.train", *changes]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while first.poll() is None and not (run / "stage2" / "metrics.jsonl").is_file():
        time.sleep(0.1)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"process {first.pid} on {socket.gethostname()}" in second.stderr
    assert first.wait() == 0, first.stdout.read()
    steps = [json.loads(line)["step"] for line in (run / "stage2" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 40
