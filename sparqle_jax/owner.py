"""One run, one owner: whoever trains into a folder claims it first, and others are told who has it.

On a disk a claim is a lock of the operating system, which ends with its process however that ends. In a
bucket, and on disks without locks, it is a lease: a file that its owner renews while it lives. A lease that
is not renewed any more is taken over.
"""

import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

FILE = "owner.json"
LEASE = "lease.json"  # beside FILE, which a disk without locks may have as well
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
RENEWAL = 10.0  # seconds from one renewal of a lease to the next
STALE = 3 * RENEWAL
LOST = 3  # the exit status of an owner who finds that another has taken over


class OwnedError(ValueError):
    """Another process trains into the folder."""


def claim(folder: epath.Path) -> Callable[[], None]:
    """Claims a folder that is there; the function returned gives it back. Raises OwnedError."""
    if "://" in str(folder):
        return _lease(folder)
    try:
        return _lock(Path(folder))
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return _lease(folder)


def check(folder: epath.Path) -> None:
    """Raises OwnedError for a folder on a disk that is locked now; leaves no trace."""
    if "://" in str(folder) or not (Path(folder) / FILE).is_file():
        return
    with open(Path(folder) / FILE) as file:
        try:
            _try_lock(file, Path(folder), fcntl.LOCK_SH)  # others that look are not in the way
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise


def _lock(folder: Path) -> Callable[[], None]:
    file = open(folder / FILE, "a+")  # noqa: SIM115 (whoever gives the folder back closes it)
    try:
        _try_lock(file, folder, fcntl.LOCK_EX, patience=1.0)  # whoever looks has it for a moment
        file.truncate(0)
        file.write(json.dumps(_about_me()) + "\n")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file.close


def _try_lock(file: Any, folder: Path, kind: int, patience: float = 0.0) -> None:
    # Not flock: its locks would outlive a killed process in the workers that it has forked.
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() >= deadline:
            file.seek(0)
            raise _owned(folder, file.read())
        time.sleep(0.05)


def _about_me() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": now}


def _owned(folder: Path | epath.Path, text: str) -> OwnedError:
    try:
        about = json.loads(text)
        who = f"process {about['process']} on {about['host']}, since {about['since']}"
    except (ValueError, KeyError):  # it is being written
        who = "another process"
    return OwnedError(
        f"another command trains into run={folder}: {who}. Wait until it has ended, stop it (it saves a "
        "checkpoint), or choose another folder with --set run=FOLDER."
    )


def _lease(folder: epath.Path) -> Callable[[], None]:
    fs, path = fsspec.core.url_to_fs(f"{folder}/{LEASE}")

    def read() -> str | None:
        try:
            return fs.cat_file(path).decode()
        except FileNotFoundError:
            return None

    if there := read():
        print(f"{folder} has had an owner: is it alive? Up to {STALE:.0f} s ...", file=sys.stderr, flush=True)
        deadline = time.monotonic() + STALE
        while time.monotonic() < deadline and (now := read()) is not None:
            if now != there:
                raise _owned(folder, now)
            time.sleep(RENEWAL / 5)
        if read() == there:
            fs.rm_file(path)
    mine = _about_me() | {"token": uuid.uuid4().hex, "renewed": 0}
    try:
        fs.pipe_file(path, json.dumps(mine).encode(), mode="create")
    except FileExistsError:
        raise _owned(folder, read() or "") from None
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWAL):
            try:
                is_mine = mine["token"] in (read() or "")
                if is_mine:
                    mine["renewed"] += 1
                    fs.pipe_file(path, json.dumps(mine).encode())
            except Exception:  # of the network, say: whoever takes over meanwhile is found the next time
                continue
            if not is_mine:
                print(
                    f"another process has taken over run={folder}, where this one was thought dead: it was "
                    f"not heard of for {STALE:.0f} s. This one ends, so that only one writes.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(LOST)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()

    def release() -> None:
        ended.set()
        thread.join()
        if mine["token"] in (read() or ""):
            fs.rm_file(path)

    return release
