"""The launcher never leaves a process behind, however it behaves."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from epctl.errors import LaunchError
from epctl.launch import supervise
from epctl.output import Output


def test_stop_kills_a_process_that_ignores_sigterm_and_removes_staging(tmp_path: Path) -> None:
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


def test_an_impatient_second_interrupt_still_kills_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.tmp").mkdir()
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", program + "; time.sleep(600)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()

    def interrupted(process: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(supervise, "_ranks_below", interrupted)
    with pytest.raises(KeyboardInterrupt):
        supervise.stop(process, tmp_path)
    assert process.returncode == -9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_the_job_and_has_its_code(tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "pid").touch()
    program = (
        "import os, pathlib, signal, time;"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()));"
        f"os.kill(os.getppid(), signal.{name}); time.sleep(600)"
    )
    with pytest.raises(LaunchError, match=name) as caught:
        supervise.run_job([sys.executable, "-c", program], {}, tmp_path, lambda event: None)
    assert caught.value.exit_code == code
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_closed_terminal_is_ignored_under_nohup(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
        supervise.run_job([sys.executable, "-c", program], {}, tmp_path, lambda event: None)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_process_ends_with_its_parent_however_that_dies(tmp_path: Path) -> None:
    child = (
        "import signal, time; from epctl.launch.agent import end_with_parent;"
        "end_with_parent(signal.SIGTERM); print('up', flush=True); time.sleep(600)"
    )
    parent = (
        "import subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    orphan = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    orphan.wait(timeout=10)


def test_a_verbose_log_is_shown_in_whole_lines(tmp_path: Path) -> None:
    shown = io.StringIO()
    log = tmp_path / "rank-0.log"
    follower = supervise._LogFollower(log, Output(stderr=shown))
    for part in ("one\ntw", "o\nthr", "ee\n"):
        with log.open("a") as file:
            file.write(part)
        follower.show()
    assert shown.getvalue() == "one\ntwo\nthree\n"


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
