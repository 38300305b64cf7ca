"""A rank's process ends with its code, its exit handlers run, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import atexit, threading
from epctl.runtime.leave import leave

class DiesInFinalization:
    def __del__(self):
        import os
        os.abort()

atexit.register(lambda: print("handler ran"))
threading.Thread(target=threading.Event().wait).start()  # would be joined for ever
held = DiesInFinalization()
print("work done", end="")
leave({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_process_ends_at_once_with_its_code(code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{code}", str(code))],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "work donehandler ran\n"


def test_every_program_of_ranks_ends_this_way() -> None:
    """gloo's threads abort in a finalizing interpreter now and then (see `leave`)."""
    programs = [
        path
        for folder in ("epctl", "tests/distributed")
        for path in (ROOT / folder).rglob("*.py")
        if "__main__" in (text := path.read_text()) and "destroy_process_group" in text
    ]
    programs.append(ROOT / "epctl/runtime/worker.py")
    assert len(programs) >= 8
    for path in programs:
        assert "leave(" in path.read_text().split('if __name__ == "__main__":')[1], path
