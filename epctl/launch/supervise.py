"""Starts a job, follows its events, forwards signals, and never leaves a rank behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from epctl.errors import ExitCode, LaunchError
from epctl.launch.failure import explain_failure
from epctl.output import Output

POLL_SECONDS = 0.1
GRACE_SECONDS = 8.0


class EventTail:
    """Reads the lines that were appended to `metrics.jsonl` since the last look.

    What stands there at first, of a run that is resumed, was seen before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = path.stat().st_size if path.exists() else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            while (line := file.readline()).endswith(b"\n"):  # an unfinished line waits
                self._position += len(line)
                yield json.loads(line)


class _Terminated(Exception):
    """A signal that ends the launcher; `args[0]` is its number."""


def run_job(
    command: list[str],
    environment: Mapping[str, str],
    run_folder: Path,
    on_event: Callable[[dict[str, Any]], None],
    *,
    verbose_to: Output | None = None,
    log_name: str = "launcher.log",
) -> None:
    """Runs the job to its end, calling `on_event` for each event, in order.

    Raises:
        LaunchError: a rank failed (its own exit code), SIGTERM arrived (143) or the terminal was
            closed (SIGHUP, 129).
        KeyboardInterrupt: Ctrl-C, after every rank is gone and staging folders are removed.
    """
    try:
        with _raised_signals():
            process = _start_and_follow(
                command, environment, run_folder, on_event, verbose_to, log_name
            )
    except _Terminated as error:
        number = signal.Signals(error.args[0])
        code = ExitCode.TERMINATED if number == signal.SIGTERM else 128 + number
        raise LaunchError(f"terminated ({number.name})", exit_code=int(code)) from None
    if process.returncode != 0:
        _remove_staging(run_folder)
        raise explain_failure(run_folder)


def _start_and_follow(
    command: list[str],
    environment: Mapping[str, str],
    run_folder: Path,
    on_event: Callable[[dict[str, Any]], None],
    verbose_to: Output | None,
    log_name: str,
) -> subprocess.Popen[bytes]:
    """Returns the ended process; whatever ends the following early ends the process too."""
    tail = EventTail(run_folder / "metrics.jsonl")
    follower = _LogFollower(run_folder / "logs" / "rank-0.log", verbose_to)
    process: subprocess.Popen[bytes] | None = None
    try:
        with (run_folder / "logs" / log_name).open("wb") as log:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while process.poll() is None:
            _deliver(tail, on_event)
            follower.show()
            time.sleep(POLL_SECONDS)
        _deliver(tail, on_event)
        follower.show()
    except BaseException:
        if process is not None:
            stop(process, run_folder)
        raise
    return process


@contextlib.contextmanager
def _raised_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP exceptions; an ignored SIGHUP (nohup) stays ignored."""
    numbers = [signal.SIGTERM, signal.SIGHUP]
    previous = {n: signal.getsignal(n) for n in numbers}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise_terminated)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _deliver(tail: EventTail, on_event: Callable[[dict[str, Any]], None]) -> None:
    for event in tail:
        on_event(event)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated(number)


def stop(process: subprocess.Popen[bytes], run_folder: Path) -> None:
    """Ends the whole process group, politely first, and removes half-written folders.

    A second signal or Ctrl-C ends the patience, not the cleaning up.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        _signal_group(process, signal.SIGTERM)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        _signal_group(process, signal.SIGKILL)  # ranks ask Linux to die with their launcher
        process.wait()
        _remove_staging(run_folder)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _remove_staging(run_folder: Path) -> None:
    for path in (*run_folder.glob("*.tmp"), *run_folder.glob("checkpoints/*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


class _LogFollower:
    """Copies rank 0's log to the screen as it grows; does nothing without an output."""

    def __init__(self, path: Path, output: Output | None) -> None:
        self.path = path
        self.output = output
        self._position = 0

    def show(self) -> None:
        if self.output is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]  # an unfinished line waits
        self._position += len(text)
        if text:
            self.output.note(text.decode("utf-8", errors="replace").rstrip("\n"))
