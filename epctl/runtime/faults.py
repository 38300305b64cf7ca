"""Planted faults: `EPCTL_FAULT` hurts one rank at a named point, so that tests meet real deaths.

    EPCTL_FAULT="POINT RANK|all ACTION [COUNT]", several joined by `;`

POINT has its blanks written as `-`; ACTION is kill, term (SIGTERM), raise, full (no space left),
stall or nan; COUNT says at which time of passing (1). Without the variable nothing here costs
anything.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter

VARIABLE = "EPCTL_FAULT"
STALL_SECONDS = 3600.0
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
            return _act(action, point)
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
