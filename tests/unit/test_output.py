"""The one sink: what goes where in each mode."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from epctl.launch.view import facts, with_numbers
from epctl.output import Mode, Output, format_bytes, format_count, format_seconds
from epctl.runtime.events import EventLog

SOURCES = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("mode", "stdout", "stderr"),
    [
        (Mode.HUMAN, "result\n", "note\nwarning: odd\nerror: bad\n"),
        (Mode.JSON, '{\n  "a": 1\n}\n{"b": 2}\n', "warning: odd\nerror: bad\n"),
        (Mode.QUIET, "result\n", "warning: odd\nerror: bad\n"),
    ],
)
def test_each_mode(mode: Mode, stdout: str, stderr: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    sink = Output(mode, out, err)
    sink.text("result")
    sink.document({"a": 1})
    sink.record({"b": 2})
    sink.note("note")
    sink.warning("odd")
    sink.error("error: bad")
    assert (out.getvalue(), err.getvalue()) == (stdout, stderr)


def test_json_mode_writes_parsable_text(sink: tuple[Output, io.StringIO, io.StringIO]) -> None:
    output, stdout, _ = sink
    output.mode = Mode.JSON
    output.document({"name": "é", "n": 1.5})
    assert json.loads(stdout.getvalue()) == {"name": "é", "n": 1.5}


def test_a_warning_once_appears_once(sink: tuple[Output, io.StringIO, io.StringIO]) -> None:
    output, _, stderr = sink
    for _ in range(3):
        output.warning("slow path", once=True)
    assert stderr.getvalue() == "warning: slow path\n"


def test_only_output_py_writes_to_a_stream() -> None:
    """ruff's T20 bans print; this catches the other ways."""
    offenders = [
        str(path.relative_to(SOURCES))
        for folder in ("epctl", "kernels")
        for path in (SOURCES / folder).rglob("*.py")
        if path.name != "output.py"
        and any(way in path.read_text() for way in ("sys.stdout", "sys.stderr", "print("))
    ]
    assert offenders == []


def test_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "3.00 GiB",
    ]
    assert [format_count(n) for n in (12, 67968, 15.96e9)] == ["12", "67.97 k", "15.96 B"]
    assert [format_seconds(s) for s in (0.84, 80, 7380)] == ["0.8 s", "1 min 20 s", "2 h 03 min"]


def test_events_are_json_even_when_a_number_is_not_one(tmp_path: Path) -> None:
    log = EventLog(tmp_path, rank=0)
    log.write("step", loss=math.nan, grad_norm=math.inf, expert_load=1.5)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    event = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (event["loss"], event["grad_norm"], event["expert_load"]) == (None, None, 1.5)


def test_a_report_without_a_load_shows_a_dash() -> None:
    event = {"step": 1, "loss": None, "grad_norm": 1.0, "expert_load": None}
    event |= {"tokens_per_second": 1.0, "seconds_per_step": 1.0, "memory_bytes": 0}
    assert facts(with_numbers(event)).startswith("loss nan")
    assert facts(with_numbers(event)).endswith("load -")
