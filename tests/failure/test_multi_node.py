"""Two launchers on two loopback addresses: one job, and its way through the loss of a launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from epctl.launch.ports import free_port

pytestmark = pytest.mark.distributed

NUM_STEPS = 40
SETTINGS = [
    "--device=cpu",
    "--ep=2",
    "--zero=2",
    "--num-ranks=2",
    "--nnodes=2",
    "--max-restarts=3",
    f"--steps={NUM_STEPS}",
    "--set=train.sequence_length=32",
    "--set=train.micro_batch_size=1",
    "--set=train.eval_batches=1",
    "--set=train.sample_tokens=0",
    "--set=train.report_every=1",
    "--set=checkpoint.every=2",
    "--set=run.save=false",
]
SECONDS = 150.0


class Job:
    """Launchers of one job in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.nodes: dict[int, subprocess.Popen[str]] = {}

    def start(self, node_rank: int) -> None:
        self.nodes[node_rank] = subprocess.Popen(
            [
                *(sys.executable, "-m", "epctl", "train", "-o", str(self.folder), *SETTINGS),
                *("--node-rank", str(node_rank), "--rdzv", f"127.0.0.1:{self.port}"),
                *("--set", f"launch.local_address=127.0.0.{node_rank + 1}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def wait_for(self, kind: str, count: int = 1) -> None:
        deadline = time.monotonic() + SECONDS
        while len(self.events(kind)) < count:
            ended = [n for n, process in self.nodes.items() if process.poll() not in (None, 0)]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no `{kind}`: {self.nodes[ended[0] if ended else 0].poll()}")
            time.sleep(0.1)

    def finish(self, node_rank: int) -> tuple[int, str]:
        process = self.nodes[node_rank]
        _, stderr = process.communicate(timeout=SECONDS)
        return process.returncode, stderr

    def close(self) -> None:
        for process in self.nodes.values():
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path / "run")
    yield job
    job.close()


@pytest.mark.timeout(420)
def test_a_killed_launcher_is_replaced_and_the_job_goes_on_from_its_checkpoint(job: Job) -> None:
    job.start(0)
    job.start(1)
    job.wait_for("checkpoint", 2)
    assert [event["ranks"] for event in job.events("start")] == [2]
    logs = {path.name for path in (job.folder / "logs").iterdir()}
    assert {"rank-0.log", "rank-1.log", "launcher.log", "launcher-node-1.log"} <= logs

    job.nodes[1].send_signal(signal.SIGKILL)
    job.nodes[1].wait()
    reached = job.events("step")[-1]["step"]
    job.start(1)

    codes = {node_rank: job.finish(node_rank) for node_rank in (0, 1)}
    assert {node_rank: code for node_rank, (code, _) in codes.items()} == {0: 0, 1: 0}, codes
    first, second = job.events("plan")
    assert first["first_step"] == 0
    assert 2 <= second["first_step"] <= reached + 2
    # By time: rank 0 may finish one more step after the kill, which the restart takes again.
    steps = [event["step"] for event in job.events("step") if event["time"] > second["time"]]
    assert steps == list(range(second["first_step"] + 1, NUM_STEPS + 1))
    assert "1 ranks join the job" in codes[1][1]
