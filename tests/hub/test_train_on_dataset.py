"""`epctl train MODEL --data org/data` as typed, stopped and resumed after the branch moved on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dataset_shards import shards
from launch import rank_environment
from tiny_moonlight import write_tiny_moonlight

pytestmark = pytest.mark.distributed

SETTINGS = (
    "--data", "org/data", "--set", "data.streaming=always", "--set", "data.shuffle_window=8",
    "--ep", "2", "--zero", "1", "--lr", "1e-3", "--set", "optim.schedule=constant",
    "--set", "optim.warmup_steps=0", "--set", "train.sequence_length=64",
    "--set", "checkpoint.every=4", "--set", "train.sample_tokens=0",
    "--set", "train.eval_batches=1", "--set", "train.report_every=1",
    # 128 sequences for the first half, more than a round of 64 records a lane fills.
    "--set", "train.micro_batch_size=16",
)  # fmt: skip


def epctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "epctl", "train", *map(str, arguments)],
        env=rank_environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(run: Path) -> dict[int, tuple[float, float]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in events if e["event"] == "step"}


def weights(run: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "model").glob("*.safetensors"))
    }


def test_a_streamed_run_that_is_continued_equals_one_long_run(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub.add("datasets/org/data", shards(3, num_records=300))
    model = write_tiny_moonlight(tmp_path / "model")
    long, parts = tmp_path / "long", tmp_path / "parts"
    done = epctl(model, *SETTINGS, "--steps", 8, "--output", long)
    assert "data: org/data@0123456789ab train, " in done.stderr
    epctl(model, *SETTINGS, "--steps", 4, "--output", parts)
    before = len(list((parts / "data").glob("train-*.ids")))
    sha = json.loads((parts / "dataset.json").read_text())["train"]["sha"]

    # The branch moves on to other files; the run does not.
    hub.commits["datasets/org/data", sha] = hub.files["datasets/org/data"]
    hub.files["datasets/org/data"] = shards(2, num_records=9)
    hub.revisions["datasets/org/data"] = {"main": "f" * 40, sha: sha}
    hub.paths.clear()
    epctl("--resume", parts, "--steps", 8)
    asked = [path for path in hub.paths if "/resolve/" in path]
    assert asked
    assert all(f"/resolve/{sha}/" in path for path in asked)
    assert len(list((parts / "data").glob("train-*.ids"))) == 2 * before == 4

    assert list(losses(long)) == list(range(1, 9))
    assert losses(parts) == losses(long)
    assert weights(parts) == weights(long)
