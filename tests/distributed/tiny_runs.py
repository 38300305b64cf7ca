"""Prepares run folders for `forked_runs`, starts them, and reads what they left."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch import rank_environment

from epctl.config import resolve_config

NUM_STEPS = 6
SETTINGS: dict[str, Any] = {
    "parallel.device": "cpu",
    "parallel.ep": 2,
    "parallel.zero": 3,
    "parallel.num_ranks": 2,
    "train.steps": NUM_STEPS,
    "train.sequence_length": 16,
    "train.micro_batch_size": 1,
    "train.eval_batches": 1,
    "train.sample_tokens": 0,
    "train.report_every": 1,
    "optim.lr": 2e-3,
    "optim.warmup_steps": 1,
    "checkpoint.every": 2,
    "checkpoint.keep": 3,
}


def prepare(run: Path, **settings: Any) -> Path:
    """Writes the settings of a run (`a__b` is `a.b`) where its ranks look for them."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    given = {key.replace("__", "."): value for key, value in settings.items()}
    (run / "config.json").write_text(resolve_config(flags=SETTINGS | given).to_json())
    return run


def scenario(name: str, run: Path, **more: Any) -> dict[str, Any]:
    return {"name": name, "run": str(run), "num_ranks": 2, **more}


def run_all(scenarios: list[dict[str, Any]], timeout: float = 1500) -> dict[str, list[int]]:
    """Returns each scenario's exit codes; one process tree runs them one after the other."""
    result = subprocess.run(
        [sys.executable, "-m", "forked_runs", json.dumps(scenarios)],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"name"')]
    return {line["name"]: line["codes"] for line in lines}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """Returns loss and norm by step; a step that was taken again counts as it was last."""
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in events(run, "step")}


def weights(run: Path) -> dict[str, str]:
    """Returns a digest of each file of the trained model."""
    files = sorted((run / "model").glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps_on_disk(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def failure(run: Path, rank: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "logs" / f"failure-rank-{rank}.json").read_text())
    return record


def log_tail(run: Path) -> str:
    return "\n".join(p.read_text()[-1500:] for p in sorted((run / "logs").glob("rank-*.log")))
