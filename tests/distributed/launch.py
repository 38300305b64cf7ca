"""Starts gloo ranks for a test and kills the whole group on timeout."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from epctl.launch.ports import free_port

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


def run_ranks(
    module: str, num_ranks: int, folder: Path, *arguments: str, timeout: float = 240
) -> list[dict[str, Any]]:
    """Runs `python -m module FOLDER ...` on gloo ranks; returns each rank's `rank-K.json`.

    Ranks are forked from one process that has imported what all import. The whole group is killed
    when one fails or the time is over, and the failing rank's output is in the error.
    """
    environment = rank_environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
    }
    (folder / "codes.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "forked_ranks", str(num_ranks), module, str(folder)]
    with (folder / "ranks.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):  # ranks outlive it when one has failed
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _require_success(folder, num_ranks, timeout)
    return [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(num_ranks)]


def _require_success(folder: Path, num_ranks: int, timeout: float) -> None:
    written = folder / "codes.json"
    codes = json.loads(written.read_text()) if written.exists() else [None] * num_ranks
    if codes != [0] * num_ranks:
        first = next((r for r, code in enumerate(codes) if code not in (None, 0)), 0)
        log = folder / f"rank-{first}.log"
        tail = (log if log.exists() else folder / "ranks.log").read_text()[-4000:]
        said = f"ranks ended with {codes} within {timeout:.0f} s"
        raise AssertionError(f"{said}; rank {first} said:\n{tail}")
