"""What torchrun starts on every rank: `python -m epctl.runtime.worker RUN_FOLDER PROGRAM`.

Sends the rank's output to its own log before anything noisy is imported, runs the trainer, and
leaves a record of a failure that the launcher can explain.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from epctl.errors import EpctlError, exit_code_of
from epctl.launch.agent import end_with_parent

# What gloo and NCCL say on ranks whose peer has gone: a symptom of another rank's failure.
PEER_LOSS = ("connection closed by peer", "connection reset", "broken pipe", "read error")


def main(run_folder: Path, program: str) -> int:
    """Runs `train` or `check`; returns the exit code.

    A failure leaves `logs/failure-rank-K.json`.
    """
    rank = int(os.environ["RANK"])
    _log_to_file(run_folder / "logs" / f"rank-{rank}.log")
    end_with_parent(signal.SIGKILL)  # no orphan keeps the GPUs
    try:
        _run(run_folder, program)
    except Exception as error:
        traceback.print_exc()
        record_failure(run_folder, rank, error)
        return exit_code_of(error)
    return 0


def _run(run_folder: Path, program: str) -> None:
    if program == "check":
        from epctl.runtime.check import check

        check(run_folder)
    else:
        from epctl.runtime.train import train

        train(run_folder)


def record_failure(run_folder: Path, rank: int, error: Exception) -> None:
    """Writes what the launcher needs to name the first failing rank and its reason."""
    record = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "hint": error.hint if isinstance(error, EpctlError) else None,
        "known": isinstance(error, EpctlError),
        "peer_lost": any(sign in str(error).lower() for sign in PEER_LOSS),
        "exit_code": exit_code_of(error),
    }
    path = run_folder / "logs" / f"failure-rank-{rank}.json"
    path.write_text(json.dumps(record), encoding="utf-8")


def _log_to_file(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
