"""Third parties' words that mean nothing here are not shown: the first line that a user sees is ours."""

import contextlib
import glob
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
OTHER_CARDS = ("0x01", "0x02")  # classes of Google's disks and network cards
# Where accelerators show up that are no TPUs: NVIDIA's, those of Windows' Linux, AMD's.
GPUS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd")
# Of Beam's worker processes, one each: Google's services are not used, and the worker has begun.
BEAM = re.compile(rb"^(WARNING:root:apitools not found|INFO:__main__:Logging handler created)")


def third_parties() -> None:
    """Silences what the libraries say when they are imported, or look for devices; before they are."""
    # transformers says at each start that PyTorch is not there; it is not needed.
    logging.getLogger("transformers").addFilter(lambda said: "PyTorch was not found" not in said.getMessage())
    # libtpu, which planning needs anywhere, complains of a machine without a TPU in several lines.
    if importlib.util.find_spec("libtpu") and not _has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _has_accelerator() -> bool:
    """Whether there is a device for JAX besides the CPU, or an environment that says so."""
    if any(name.startswith("TPU_") for name in os.environ) or "JAX_FORCE_TPU_INIT" in os.environ:
        return True
    if any(glob.glob(pattern) for pattern in (*GPUS, "/dev/accel*", "/dev/vfio/[0-9]*")):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(file.read_text().strip() == GOOGLE for file in vendors)


def accelerators() -> list[str]:
    """The GPUs and TPUs of this machine, by the files of their devices or their addresses on the PCI bus."""
    patterns = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*")
    found = [file for pattern in patterns for file in glob.glob(pattern)]
    for card in Path("/sys/bus/pci/devices").glob("*"):
        vendor, kind = ((card / name).read_text().strip() for name in ("vendor", "class"))
        if vendor == GOOGLE and not kind.startswith(OTHER_CARDS):
            found.append(f"TPU at {card.name}")
    return found


@contextlib.contextmanager
def processes_without(noise: re.Pattern[bytes]) -> Iterator[None]:
    """Leaves lines that match out of what child processes write to stderr meanwhile; all else comes through.

    This process writes to stderr as before.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)

    def forward() -> None:
        with open(read, "rb") as lines, open(stderr, "wb", buffering=0) as out:
            for line in lines:
                if not noise.match(line):
                    out.write(line)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        if sys.stderr is sys.__stderr__:
            with open(os.dup(stderr), "w", buffering=1) as ours, contextlib.redirect_stderr(ours):
                yield
        else:  # somebody else has it already
            yield
    finally:
        os.dup2(stderr, 2)
        thread.join(timeout=10)  # until the children have closed their ends
