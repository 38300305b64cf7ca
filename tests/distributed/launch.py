"""Starts gloo ranks for a test and kills the whole group on timeout."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def rank_environment() -> dict[str, str]:
    """Environment of CPU ranks: no GPU, one thread, no color, quiet DeepSpeed."""
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent))),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    module: str, num_ranks: int, folder: Path, *arguments: str, timeout: float = 240
) -> list[dict[str, Any]]:
    """Runs `python -m module FOLDER ...` on gloo ranks; returns each rank's `rank-K.json`.

    Ranks are started directly, not by torchrun: one interpreter start fewer. The whole group is
    killed when one fails or the time is over, and the failing rank's output is in the error.
    """
    environment = rank_environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
    }
    processes = []
    for rank in range(num_ranks):
        log = (folder / f"rank-{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(folder), *arguments],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    try:
        _wait(processes, folder, timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(num_ranks)]


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    import time

    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = [r for r, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        first = next((r for r, code in enumerate(codes) if code not in (None, 0)), 0)
        tail = (folder / f"rank-{first}.log").read_text()[-4000:]
        raise AssertionError(f"ranks ended with {codes}; rank {first} said:\n{tail}")
