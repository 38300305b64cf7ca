"""`epctl logs`: what is said of a run that is done, that failed, that was cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_by_hand import write_checkpoint

from epctl.config import resolve_config
from epctl.errors import InputError
from epctl.launch.logs_command import describe_run, show_logs
from epctl.output import Mode


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    resolved = resolve_config(flags={"parallel.ep": 2, "parallel.zero": 1})
    (folder / "config.json").write_text(resolved.to_json())
    (folder / "logs" / "rank-0.log").write_text("".join(f"line {n}\n" for n in range(100)))
    return folder


def write_events(run: Path, *events: dict[str, Any]) -> None:
    lines = [json.dumps({"time": 100.0 + n, **event}) for n, event in enumerate(events)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


START = {"event": "start"}
PLAN = {"event": "plan", "steps": 8}
STEP = {"event": "step", "step": 3, "loss": 2.5}


def test_a_run_that_is_done(run: Path, sink: Any) -> None:
    write_events(run, START, PLAN, STEP, {"event": "done"})
    (run / "loss.png").touch()
    show_logs(run, sink[0], rank=None, num_lines=5)
    text = sink[1].getvalue()
    assert text.startswith("state        done, step 3 of 8, loss 2.5000, 3.0 s\n")
    assert "given        parallel.ep=2 parallel.zero=1" in text
    assert f"file         {run / 'loss.png'}: the loss curve" in text
    assert f"log          {run / 'logs' / 'rank-0.log'} (790 B)" in text
    assert "resume" not in text


def test_a_run_that_failed_says_why_and_how_to_go_on(run: Path, sink: Any) -> None:
    write_events(run, START, PLAN, START, PLAN, STEP)
    (run / "logs" / "failed-ranks.json").write_text('{"1": -9}')
    write_checkpoint(run, 2)
    (run / "checkpoints" / "step-0000004.tmp").mkdir()
    show_logs(run, sink[0], rank=None, num_lines=5)
    text = sink[1].getvalue()
    assert "state        failed, step 3 of 8" in text
    assert "rank 1 failed first: SIGKILL (killed, usually the host ran out of memory)" in text
    assert "starts       2" in text
    assert f"resume       epctl train --resume {run}" in text
    assert "step-0000004" not in text


def test_a_line_cut_short_by_a_kill_is_left_out(run: Path) -> None:
    write_events(run, START, PLAN, STEP)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')
    document = describe_run(run)
    assert (document["state"], document["step"]) == ("running or stopped", 3)
    assert document["resume"] is None


def test_a_run_without_events_yet(run: Path) -> None:
    document = describe_run(run)
    assert (document["step"], document["loss"], document["seconds"]) == (0, None, 0.0)


def test_the_end_of_a_ranks_log(run: Path, sink: Any) -> None:
    show_logs(run, sink[0], rank=0, num_lines=2)
    assert sink[1].getvalue() == "line 98\nline 99\n"
    with pytest.raises(InputError, match=r"rank-7\.log") as caught:
        show_logs(run, sink[0], rank=7, num_lines=2)
    assert caught.value.hint == "there are: rank-0.log"


def test_json(run: Path, sink: Any) -> None:
    write_events(run, START, PLAN, STEP, {"event": "done"})
    sink[0].mode = Mode.JSON
    show_logs(run, sink[0], rank=None, num_lines=5)
    document = json.loads(sink[1].getvalue())
    assert document["state"] == "done"
    assert document["given"] == {"parallel.ep": 2, "parallel.zero": 1}


def test_not_a_run(tmp_path: Path, sink: Any) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        show_logs(tmp_path, sink[0], rank=None, num_lines=5)
