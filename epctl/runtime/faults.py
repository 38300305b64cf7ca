"""Planted faults: `EPCTL_FAULT` hurts one rank at a named point, so that tests meet real deaths.

    EPCTL_FAULT="POINT RANK|all ACTION [COUNT]", several joined by `;`

POINT has its blanks written as `-`; ACTION is kill, term (SIGTERM), raise, full (no space left),
stall or nan; COUNT says at which time of passing (1). Without the variable nothing here costs
anything.

A rank that is killed takes the others' connections with it, and one that is not yet at POINT then
fails of that: where `EPCTL_FAULT_MEETING` names an empty folder, the ranks of `all kill` wait for
each other there and die together.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

VARIABLE = "EPCTL_FAULT"
MEETING_VARIABLE = "EPCTL_FAULT_MEETING"
STALL_SECONDS = 3600.0
MEETING_SECONDS = 60.0
_passed: Counter[str] = Counter()


def reached(point: str) -> bool:
    """Marks a point of the program; returns True where a test asks for `nan` there.

    Raises RuntimeError or OSError(ENOSPC), stalls, or kills the process, if a test asks for it.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return False
    _passed[point] += 1
    for fault in wanted.split(";"):
        where, rank, action, *count = fault.split()
        here = rank in ("all", os.environ.get("RANK", "0"))
        passing = int(count[0]) if count else 1
        if where == point.replace(" ", "-") and here and _passed[point] == passing:
            together = rank == "all" and action == "kill"
            return _die_together(where) if together else _act(action, point)
    return False


def _act(action: str, point: str) -> bool:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if action == "raise":
        raise RuntimeError(f"planted at `{point}`")
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action == "stall":
        threading.Event().wait(STALL_SECONDS)
    return action == "nan"


def _die_together(where: str) -> bool:
    """Kills all ranks once all are here; alone where there is no meeting, or after a minute."""
    pids = [os.getpid()]
    if folder := os.environ.get(MEETING_VARIABLE):
        (Path(folder) / f"{where}.{pids[0]}").touch()
        deadline = time.monotonic() + MEETING_SECONDS
        while len(pids) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < deadline:
            pids = [int(path.suffix[1:]) for path in Path(folder).glob(f"{where}.*")]
            time.sleep(0.005)
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # itself last
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return False
