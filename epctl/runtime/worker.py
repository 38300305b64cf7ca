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

from epctl.errors import EpctlError, ResourceError, exit_code_of
from epctl.launch.agent import end_with_parent
from epctl.runtime.leave import leave

# What gloo and NCCL say on ranks whose peer has gone: a symptom of another rank's failure.
GLOO_PEER_LOSS = ("connection closed by peer", "connection reset", "broken pipe", "read error")
NCCL_PEER_LOSS = ("remote process exited", "socket closed", "connection closed", "timed out")
# By name: torch need not be importable where a failure is written down.
COMMUNICATION_ERRORS = ("DistBackendError", "DistNetworkError")
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
MEMORY_HINT = (
    "a smaller `train.micro_batch_size` or `train.sequence_length`, a higher `--zero`, "
    "`--set train.activation_checkpointing=full`, or `--set optim.offload=true`"
)


def main(run_folder: Path, program: str) -> int:
    """Runs `train` or `check`; returns the exit code.

    A failure leaves `logs/failure-rank-K.json`.
    """
    rank = int(os.environ["RANK"])
    _log_to_file(run_folder / "logs" / f"rank-{rank}.log")
    end_with_parent(signal.SIGKILL)  # no orphan keeps the GPUs
    failure_record(run_folder, rank).unlink(missing_ok=True)  # of the attempt before a restart
    try:
        _run(run_folder, program)
    except Exception as error:
        traceback.print_exc()
        record_failure(run_folder, rank, error)
        return exit_code_of(explained(rank, error))
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
    known = explained(rank, error)
    record = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(known),
        "hint": known.hint if isinstance(known, EpctlError) else None,
        "known": isinstance(known, EpctlError),
        "peer_lost": lost_its_peer(error),
        "exit_code": exit_code_of(known),
    }
    failure_record(run_folder, rank).write_text(json.dumps(record), encoding="utf-8")


def explained(rank: int, error: Exception) -> Exception:
    """Returns `error`, or for memory that ran out the error a person can act on (exit 6)."""
    if type(error).__name__ not in OUT_OF_MEMORY:
        return error
    first_line = (str(error).splitlines() or ["the host refused an allocation"])[0]
    return ResourceError(f"rank {rank} ran out of memory: {first_line}", hint=MEMORY_HINT)


def lost_its_peer(error: Exception) -> bool:
    """True for a collective that failed because another rank went first.

    gloo raises plain RuntimeErrors; NCCL's carry torch's own class.
    """
    text = str(error).lower()
    if type(error).__name__ in COMMUNICATION_ERRORS:
        return any(sign in text for sign in GLOO_PEER_LOSS + NCCL_PEER_LOSS)
    return type(error) is RuntimeError and any(sign in text for sign in GLOO_PEER_LOSS)


def failure_record(run_folder: Path, rank: int) -> Path:
    """Returns where a rank says why it failed."""
    return run_folder / "logs" / f"failure-rank-{rank}.json"


def _log_to_file(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), sys.argv[2]))
