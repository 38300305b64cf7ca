"""Planted faults: `all kill` is the death of all at one point, however late a rank gets there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from epctl.runtime import faults

# The second rank comes late, and fails of a peer's death as a collective would.
RANKS = """
import os, sys, time
from epctl.runtime.faults import reached
alive, lost = os.pipe()
os.environ["WORLD_SIZE"] = "2"
pids = []
for rank in (0, 1):
    pids.append(os.fork())
    if pids[-1] == 0:
        os.environ["RANK"] = str(rank)
        if rank == 1:
            os.close(lost)
            os.set_blocking(alive, False)
            for _ in range(50):
                time.sleep(0.01)
                try:
                    os.read(alive, 1)
                    os._exit(1)  # end of file: the peer is gone
                except BlockingIOError:
                    pass
        reached("here")
        os._exit(0)
os.close(lost)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
"""


def exit_codes(fault: str, meeting: str) -> str:
    env = {faults.VARIABLE: fault, faults.MEETING_VARIABLE: meeting}
    done = subprocess.run(
        [sys.executable, "-c", RANKS], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("fault", "meets", "codes"),
    [
        ("here all kill", True, "[-9, -9]"),
        ("here all kill", False, "[-9, 1]"),
        ("here 0 kill", True, "[-9, 1]"),
        ("elsewhere all kill", True, "[0, 1]"),
    ],
)
def test_ranks_that_meet_die_together(tmp_path: Path, fault: str, meets: bool, codes: str) -> None:
    assert exit_codes(fault, str(tmp_path) if meets else "") == codes


def test_without_the_variable_nothing_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert not faults.reached("here")
