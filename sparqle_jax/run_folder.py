"""The folder of a run: which run it holds, who trains into it, and whether it can be written to."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath
from flax import nnx

from sparqle_jax import commands, hosts, owner, pretrained, stages
from sparqle_jax.checkpoint import differences, fingerprint, steps_in
from sparqle_jax.config import Config
from sparqle_jax.start import Start, find

IDENTITY = "identity.json"  # in the run's folder: what must be the same when it goes on
# Keys of the configuration that may be others when a run goes on; of folders, their contents are compared.
FREE = (
    r"run|start|speech_pad|mesh\..*|encoder\.folder|llm|init_from|stage1\.tokenizer|data\.workers|data\.frames"
    r"|data\.valid\..*|data\.train\..*\.folder|stage\d\.(save_every|keep|log_every)"
)


def frozen_keys(config: Any, key: str = "") -> Any:
    """The part of a configuration that must stay when a run is resumed: all but the keys that are FREE."""
    if not isinstance(config, dict):
        return config
    paths = {name: f"{key}.{name}".removeprefix(".") for name in config}
    return {
        name: frozen_keys(value, paths[name])
        for name, value in config.items()
        if not re.fullmatch(FREE, paths[name])
    }


def tower_identity(folder: Path, tower: nnx.Module) -> dict[str, Any]:
    """The hash of a tower's weights, which counts, and where they come from."""
    return {
        "hash": fingerprint(tower),
        "path": str(folder),
        "name": pretrained.hub_name(folder),
        "revision": pretrained.hub_revision(folder),
    }


def find_start(config: Config) -> tuple[Start | None, str]:
    """The state that a run starts from, and its stage; None when the run has checkpoints of its own."""
    there = read_identity(config.run).get("start") or {}
    if there.get("from") == config.start and steps_in(config.run / there["stage"] / "checkpoints"):
        return None, there["stage"]
    start = find(config.start, [name for name in stages.STAGES if getattr(config, name) is not None])
    return start, start.stage


def read_identity(folder: epath.Path) -> dict[str, Any]:
    """What the run in a folder wrote down of itself; {} for none."""
    file = folder / IDENTITY
    return json.loads(file.read_text()) if file.is_file() else {}


def check_folder(folder: epath.Path, identity: dict[str, Any]) -> None:
    """Raises ValueError, listing what differs, when the folder holds another run."""
    there = read_identity(folder)
    if not there:
        return
    wrong = differences({key: there.get(key) for key in identity}, json.loads(json.dumps(identity)))
    if wrong:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(wrong)}. ('data' are the contents of data.train, "
            "'encoder' and 'llm' the weights of the towers.) Choose another folder with --set run=FOLDER, or "
            "delete that one."
        )


def check_writable(folder: epath.Path) -> None:
    """Raises ValueError when nothing can be written where a local folder is, or is to be made."""
    if "://" in str(folder):
        return
    try:
        with tempfile.TemporaryFile(dir=commands.nearest(folder)):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written to run={folder} ({error}): choose another folder with --set run=."
        ) from error


def check_owner(folder: epath.Path) -> None:
    """Raises ValueError, on all hosts, when another command trains into the folder now."""
    owned = None
    if hosts.is_first():
        try:
            owner.check(folder)
        except owner.OwnedError as error:
            owned = error
    _raise_on_all(owned, folder)


def _raise_on_all(owned: owner.OwnedError | None, folder: epath.Path) -> None:
    """Raises on all hosts what the first one has found, if anything."""
    if hosts.max_over_hosts(owned is not None):
        raise owned or ValueError(f"another command trains into run={folder}: see the first host.")


def claim_folder(config: Config, identity: dict[str, Any]) -> Callable[[], None]:
    """The first host claims the folder for all, and writes down which run it holds; the function returned
    gives it back.

    Raises ValueError, on all hosts, when the folder is another's, when nothing can be written there, and when
    the others do not see it.
    """
    failed, owned, release = "", None, lambda: None
    if hosts.is_first():
        try:
            config.run.mkdir(parents=True, exist_ok=True)
            release = owner.claim(config.run)
            if not (config.run / IDENTITY).is_file():
                commands.write_text(config.run / "config.json", config.model_dump_json(indent=2) + "\n")
                commands.write_text(config.run / IDENTITY, json.dumps(identity, indent=1) + "\n")
        except owner.OwnedError as error:
            owned = error
        except Exception as error:  # of a disk, or of a bucket's library
            failed = f": {error}"
    _raise_on_all(owned, config.run)
    if hosts.max_over_hosts(bool(failed)):
        raise ValueError(f"nothing can be written to run={config.run}{failed}. Choose another: --set run=.")
    if hosts.max_over_hosts(not (config.run / IDENTITY).is_file()):
        raise ValueError(
            f"run={config.run} is not the same folder on all hosts: give one that all of them reach, such as "
            "--set run=gs://BUCKET/RUN, or a disk that they share."
        )
    return release


def stage_folder(config: Config, name: str) -> epath.Path:
    folder = config.run / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
