"""Several processes on this machine that train together, as hosts do."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(
    processes: int,
    devices: int,
    arguments: Sequence[str],
    program: Sequence[str] = ("-m", "sparqle_jax.train"),
    apart: Path | None = None,
) -> list[subprocess.Popen]:
    """Starts the training command on `processes` processes of `devices` CPU devices each.

    apart: a folder in which each has a working directory of its own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments, "--distributed", address, str(processes), str(i)],
            env=environment,
            cwd=ROOT if apart is None else tempfile.mkdtemp(dir=apart),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def finish(cluster: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str]]:
    """Waits for all: their exit statuses, and what they printed."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in cluster]
    finally:
        for process in cluster:
            process.kill()
    return [(process.returncode, output) for process, output in zip(cluster, outputs, strict=True)]
