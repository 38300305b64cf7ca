"""What of an event goes to an experiment tracker: its numbers, by stable names."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epctl.config import RunConfig
from epctl.errors import ConfigError
from epctl.launch.track import open_tracker, tracked_values
from epctl.launch.view import RunView
from epctl.output import Mode, Output

EVENTS: list[dict[str, Any]] = [
    {"event": "eval", "when": "before", "loss": 3.0, "step": 0},
    {"event": "eval", "when": "step", "loss": 2.0, "step": 1},
]

# What wandb and trackio share, written down; each call goes to a file.
STAND_IN = """
import json
def _write(**call):
    with open({path!r}, "a") as file:
        file.write(json.dumps(call) + "\\n")
def init(project, name=None, config=None):
    print("announced on stdout")
    _write(call="init", project=project, name=name, steps=config["train"]["steps"])
def log(metrics, step=None):
    _write(call="log", metrics=metrics, step=step)
def finish():
    _write(call="finish")
"""


def test_a_step_gives_its_numbers_and_leaves_out_names() -> None:
    event = {
        "event": "step",
        "time": 1.0,
        "step": 7,
        "loss": 2.5,
        "tokens": 10,
        "attention_logit_layer": "model.layers.3.self_attn",
    }
    assert tracked_values(event) == {"train/loss": 2.5, "train/tokens": 10.0}


def test_an_evaluation_gives_its_loss_and_other_events_nothing() -> None:
    assert tracked_values({"event": "eval", "loss": 1.5, "step": 3}) == {"eval/loss": 1.5}
    assert tracked_values({"event": "plan", "num_ranks": 4}) == {}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_started_fed_and_finished(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stand-in of the functions both modules have; the modules themselves are tested below."""
    calls = tmp_path / "calls"
    (tmp_path / f"{name}.py").write_text(STAND_IN.format(path=str(calls)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)  # restored as it was, whatever comes
    del sys.modules[name]
    view = RunView(
        Output(Mode.QUIET, io.StringIO(), io.StringIO()),
        tmp_path / "run-7",
        open_tracker(name, tmp_path / "run-7", RunConfig()),
    )
    for event in EVENTS:
        view(event)
    view.close()
    view.close()
    assert [json.loads(line) for line in calls.read_text().splitlines()] == [
        {"call": "init", "project": "epctl", "name": "run-7", "steps": 100},
        {"call": "log", "metrics": {"eval/loss": 3.0}, "step": 0},
        {"call": "log", "metrics": {"eval/loss": 2.0}, "step": 1},
        {"call": "finish"},
    ]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "announced" in captured.err


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package `wandb`") as caught:
        open_tracker("wandb", Path("run"), RunConfig())
    assert "pip install wandb" in str(caught.value.hint)


PROGRAM = """
import sys
from pathlib import Path
from epctl.config import RunConfig
from epctl.launch.track import open_tracker
tracker = open_tracker(sys.argv[1], Path(sys.argv[2]), RunConfig())
tracker.log({"train/loss": 2.5}, 1)
tracker.log({"train/loss": 1.25}, 2)
tracker.log({"eval/loss": 1.5}, 2)
tracker.close()
"""


def run_tracker(name: str, folder: Path, **environment: str) -> str:
    """Runs the real module in a process of its own; returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(folder)],
        cwd=folder.parent,
        env={**os.environ, "HOME": str(folder.parent), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_itself_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is optional; run with it 2026-11-22")
    assert run_tracker("wandb", tmp_path / "run", WANDB_MODE="offline") == ""
    stored = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(stored) == 1
    assert b"train/loss" in stored[0].read_bytes()


def test_trackio_itself(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is optional; run with it 2026-11-22")
    assert run_tracker("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "db")) == ""
    stored = [path for path in (tmp_path / "db").rglob("*") if path.is_file()]
    assert any(b"train/loss" in path.read_bytes() for path in stored)


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is optional; run with it 2026-11-22")
    run_tracker("tensorboard", tmp_path / "run")
    [stored] = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"train/loss" in stored.read_bytes()
