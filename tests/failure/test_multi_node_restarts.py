"""`--max-restarts` on one node, and DeepSpeed's launcher: real ranks, killed and counted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.distributed

SMALL = [
    "--device=cpu",
    "--ep=2",
    "--zero=2",
    "--set=train.sequence_length=32",
    "--set=train.micro_batch_size=1",
    "--set=train.eval_batches=1",
    "--set=train.sample_tokens=0",
    "--set=train.report_every=1",
    "--set=run.save=false",
]
SECONDS = 120.0


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "epctl", "train", "-o", str(folder), *SMALL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def wait_for_checkpoints(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + SECONDS
    while len(events(folder, "checkpoint")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.1)


def kill_rank(process: subprocess.Popen[str], rank: int) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        if "epctl.runtime.worker" in child.cmdline() and child.environ().get("RANK") == str(rank):
            child.kill()
            return
    raise AssertionError(f"rank {rank} is not running")


@pytest.mark.timeout(400)
def test_a_killed_rank_is_restarted_once_and_named_the_second_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "--steps=100000", "--max-restarts=1", "--set=checkpoint.every=2")
    try:
        wait_for_checkpoints(run, process, 1)
        kill_rank(process, 1)
        reached = events(run, "step")[-1]["step"]
        before = len(events(run, "checkpoint"))
        wait_for_checkpoints(run, process, before + 2)
        plans = [event["first_step"] for event in events(run, "plan")]
        assert plans[0] == 0
        assert 2 <= plans[1] <= reached + 2
        kill_rank(process, 0)
        _, stderr = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 137
    assert "rank 0 failed first: SIGKILL" in stderr
    assert len(events(run, "start")) == 2
    logs = subprocess.run(
        [sys.executable, "-m", "epctl", "logs", str(run)], capture_output=True, text=True
    )
    assert "state        failed" in logs.stdout
    assert f"resume       epctl train --resume {run}" in logs.stdout


@pytest.mark.timeout(200)
def test_deepspeeds_launcher_runs_the_same_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "--steps=3", "--launcher=deepspeed")
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, stderr + (run / "logs" / "launcher.log").read_text()[-2000:]
    assert events(run, "start")[0]["ranks"] == 2
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3]
    assert {"rank-0.log", "rank-1.log"} <= {path.name for path in (run / "logs").iterdir()}
