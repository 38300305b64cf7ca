"""Real runs that go wrong: what is said, how fast it ends, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.distributed

SMALL = [
    "--device=cpu",
    "--set=train.sequence_length=32",
    "--set=train.micro_batch_size=1",
    "--set=train.eval_batches=1",
    "--set=train.sample_tokens=0",
    "--set=train.report_every=1",
]
ENDLESS = [*SMALL, "--steps=100000"]
SECONDS_TO_STEP = 90.0
SECONDS_TO_END = 20.0


class Run:
    """An `epctl train` in its own process, which a test may wait for, hurt and look at."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "epctl", "train", "-o", str(folder), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_steps(self, count: int = 2) -> None:
        deadline = time.monotonic() + SECONDS_TO_STEP
        while time.monotonic() < deadline and self.process.poll() is None:
            if len(self.events("step")) >= count:
                return
            time.sleep(0.1)
        raise AssertionError(f"no step in time: {self.process.communicate(timeout=30)}")

    def events(self, kind: str) -> list[dict[str, object]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [e for e in map(json.loads, lines) if e["event"] == kind]

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if "epctl.runtime.worker" in child.cmdline() and "RANK" in child.environ():
                found[int(child.environ()["RANK"])] = child
        return found

    def finish(self, seconds: float = SECONDS_TO_END) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=seconds)
        return self.process.returncode, stdout, stderr


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "run", "--ep=2", "--zero=2", *ENDLESS)
    run.wait_for_steps()
    yield run
    if run.process.poll() is None:
        for child in psutil.Process(run.process.pid).children(recursive=True):
            child.kill()
        run.process.kill()


def assert_nothing_left(run: Run, ranks: dict[int, psutil.Process]) -> None:
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=5)
    assert not alive
    assert not list(run.folder.glob("*.tmp"))
    assert not (run.folder / "model").exists()


def test_killed_rank_is_named_with_its_log_and_its_signal(endless: Run) -> None:
    ranks = endless.ranks()
    assert sorted(ranks) == [0, 1]
    ranks[1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    code, _, stderr = endless.finish()
    assert time.monotonic() - started < SECONDS_TO_END
    assert code == 128 + signal.SIGKILL
    assert "error: rank 1 failed first: SIGKILL (killed, usually the host ran out" in stderr
    assert f"hint: see its log: `tail {endless.folder}/logs/rank-1.log`" in stderr
    assert_nothing_left(endless, ranks)


def test_interrupt_stops_every_rank_and_leaves_no_model(endless: Run) -> None:
    ranks = endless.ranks()
    endless.process.send_signal(signal.SIGINT)
    code, _, stderr = endless.finish()
    assert (code, stderr.splitlines()[-1]) == (130, "interrupted")
    assert_nothing_left(endless, ranks)


def test_sigterm_stops_every_rank_with_143(endless: Run) -> None:
    ranks = endless.ranks()
    endless.process.send_signal(signal.SIGTERM)
    code, _, stderr = endless.finish()
    assert code == 143
    assert "error: terminated (SIGTERM) after step " in stderr
    (saved,) = (endless.folder / "checkpoints").glob("step-*")
    hint = f"hint: `epctl train --resume {endless.folder}` goes on from `{saved}`"
    assert hint in stderr
    assert_nothing_left(endless, ranks)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_ranks_die_with_a_killed_epctl_or_a_closed_terminal(
    endless: Run, number: signal.Signals
) -> None:
    ranks = endless.ranks()
    assert len(ranks) == 2
    endless.process.send_signal(number)
    code, _, _ = endless.finish()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 129)
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=SECONDS_TO_END)
    assert not alive


def test_ranks_die_with_a_killed_agent(endless: Run) -> None:
    """SIGKILL cannot be handled, so Linux is asked to end the ranks with their parent."""
    ranks = endless.ranks()
    agents = psutil.Process(endless.process.pid).children()
    assert len(agents) == 1
    agents[0].kill()
    code, _, _ = endless.finish()
    assert code != 0
    assert_nothing_left(endless, ranks)


def test_disk_too_small_for_the_checkpoint_is_refused_before_training(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)])
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = Run(disk / "run", "--ep=1", "--zero=1", *SMALL, "--steps=1")
        code, _, stderr = run.finish(SECONDS_TO_STEP)
        assert code == 6
        assert "error: what this run will save needs 16." in stderr
        assert "has 1." in stderr
        assert "hint: choose another disk with `--output`" in stderr
        assert run.events("step") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_more_rows_than_a_rank_may_take_end_the_run_with_the_numbers(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", *SMALL, "--ep=2", "--steps=2", "--set=moe.max_tokens_per_rank=8")
    code, _, stderr = run.finish(SECONDS_TO_STEP)
    assert code == 6
    assert "rows are on their way to the experts of rank " in stderr
    assert "`moe.max_tokens_per_rank` is 8 (32 tokens of its own)" in stderr
    assert "hint: routing is skewed: raise the bound" in stderr
    assert run.events("step") == []


def test_a_used_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = Run(tmp_path, *SMALL)
    code, _, stderr = run.finish()
    assert code == 3
    assert f"run folder `{tmp_path}` exists and is not empty" in stderr
    assert os.listdir(tmp_path) == ["notes.txt"]
