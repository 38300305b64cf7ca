"""The launcher never leaves a process behind, however it behaves."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from epctl.errors import LaunchError
from epctl.launch import supervise


def test_stop_kills_a_process_that_ignores_sigterm_and_removes_staging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.3)
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "half").write_text("x")
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", program + "; time.sleep(600)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    started = time.monotonic()
    supervise.stop(process, tmp_path)
    assert process.returncode == -9
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


def test_events_written_just_before_the_end_are_delivered(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    program = f"open({str(tmp_path / 'metrics.jsonl')!r}, 'w').write('{{\"event\": \"done\"}}\\n')"
    seen: list[dict[str, object]] = []
    supervise.run_job([sys.executable, "-c", program], {}, tmp_path, seen.append)
    assert seen == [{"event": "done"}]


def test_a_failed_job_raises_with_the_launchers_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "model.tmp").mkdir()
    command = [sys.executable, "-c", "raise SystemExit('no torch here')"]
    with pytest.raises(LaunchError, match="no torch here") as caught:
        supervise.run_job(command, {}, tmp_path, lambda event: None)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "model.tmp").exists()
