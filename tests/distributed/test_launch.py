"""A test's own ranks: one that fails ends the group at once, a hang ends with the time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launch import run_ranks

pytestmark = pytest.mark.distributed


def is_running(pid: int) -> bool:
    """A killed orphan stays in the table until the machine's first process has asked for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise", "ended with \\[None, 1\\].*rank 1 said(?s:.)*the unlucky one"),
     ("exit", "ended with \\[None, 7\\]"),
     ("hang", "ended with \\[None, None\\] within 20 s")],
)  # fmt: skip
def test_the_group_ends_together(tmp_path: Path, what: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=said):
        run_ranks("unlucky_ranks", 2, tmp_path, what, timeout=20 if what == "hang" else 100)
    assert time.monotonic() - started < 60
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)
