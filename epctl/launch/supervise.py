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

import psutil  # type: ignore[import-untyped]

from epctl.errors import ExitCode, LaunchError
from epctl.launch.failure import explain_failure
from epctl.output import Output

POLL_SECONDS = 0.1
# What asks the ranks for one last checkpoint.
WORKER_MODULE = "epctl.runtime.worker"
END_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class EventTail:
    """Reads the lines of JSON that were appended to a file since the last look.

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
    grace_seconds: float = 0.0,
) -> None:
    """Runs the job to its end, calling `on_event` for each event, in order.

    Args:
        grace_seconds: what the ranks get after SIGTERM or SIGUSR1 to write one last checkpoint.

    Raises:
        LaunchError: a rank failed (its own exit code), SIGTERM or SIGUSR1 arrived (143) or the
            terminal was closed (SIGHUP, 129).
        KeyboardInterrupt: Ctrl-C, after every rank is gone and staging folders are removed.
    """
    following = _Following(run_folder, on_event, verbose_to)
    try:
        with _handled_signals(following.on_signal if grace_seconds else _raise_terminated):
            process = following.run(command, environment, log_name, grace_seconds)
    except _Terminated as error:
        number = signal.Signals(error.args[0])
        code = ExitCode.TERMINATED if number in END_SIGNALS else 128 + number
        raise LaunchError(f"terminated ({number.name})", exit_code=int(code)) from None
    if following.stopped is not None or following.asked is not None:
        raise _terminated(following)
    if process.returncode != 0:
        _remove_staging(run_folder)
        raise explain_failure(run_folder)


def _terminated(following: _Following) -> LaunchError:
    """Returns how a job ended that was asked to, by its launcher or through one of its ranks."""
    name = following.asked.name if following.asked is not None else "a signal to a rank"
    stopped = following.stopped
    if stopped is None:
        _remove_staging(following.run_folder)
        return LaunchError(f"terminated ({name})", exit_code=int(ExitCode.TERMINATED))
    saved = stopped["checkpoint"]
    hint = f"`epctl train --resume {following.run_folder}` goes on from `{saved}`"
    return LaunchError(
        f"terminated ({name}) after step {stopped['step']}",
        exit_code=int(ExitCode.TERMINATED),
        hint=hint if saved is not None else None,
    )


class _Following:
    """A job being run: its events so far, and whether it was asked to end."""

    def __init__(
        self,
        run_folder: Path,
        on_event: Callable[[dict[str, Any]], None],
        verbose_to: Output | None,
    ) -> None:
        self.run_folder = run_folder
        self.asked: signal.Signals | None = None
        self.stopped: dict[str, Any] | None = None
        self._on_event = on_event
        self._tail = EventTail(run_folder / "metrics.jsonl")
        self._follower = _LogFollower(run_folder / "logs" / "rank-0.log", verbose_to)

    def run(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log_name: str,
        grace_seconds: float,
    ) -> subprocess.Popen[bytes]:
        """Returns the ended process; whatever ends the following early ends the process too."""
        process: subprocess.Popen[bytes] | None = None
        try:
            with (self.run_folder / "logs" / log_name).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._follow(process, grace_seconds)
        except BaseException:
            if process is not None:
                stop(process, self.run_folder)
            raise
        return process

    def _follow(self, process: subprocess.Popen[bytes], grace_seconds: float) -> None:
        deadline = float("inf")
        while process.poll() is None:
            self._deliver()
            if self.asked is not None and deadline == float("inf"):
                deadline = time.monotonic() + grace_seconds
                ask_to_end(process)
            if time.monotonic() > deadline:
                raise _Terminated(self.asked)
            time.sleep(POLL_SECONDS)
        self._deliver()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Notes the first request to end; a second one, and SIGHUP, end everything at once."""
        if number not in END_SIGNALS or self.asked is not None:
            _raise_terminated(number, frame)
        self.asked = signal.Signals(number)

    def _deliver(self) -> None:
        for event in self._tail:
            if event["event"] == "stopped":
                self.stopped = event
            self._on_event(event)
        self._follower.show()


def ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGUSR1 to the ranks below a launcher, which finish their step and save it."""
    for rank in _ranks_below(process):
        with contextlib.suppress(psutil.Error):
            rank.send_signal(signal.SIGUSR1)


def _ranks_below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if WORKER_MODULE in child.cmdline() and "RANK" in child.environ():
                    found.append(child)
    return found


@contextlib.contextmanager
def _handled_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Takes over SIGTERM, SIGUSR1 and SIGHUP; an ignored SIGHUP (nohup) stays ignored."""
    numbers = [*END_SIGNALS, signal.SIGHUP]
    previous = {n: signal.getsignal(n) for n in numbers}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated(number)


def stop(process: subprocess.Popen[bytes], run_folder: Path) -> None:
    """Ends a launcher and everything below it at once, and removes half-written folders.

    Ranks lead sessions of their own. Where Linux would not end them with their launcher, they are
    killed by hand, first. A second Ctrl-C ends none of this.
    """
    try:
        for rank in _ranks_below(process):
            with contextlib.suppress(psutil.Error):
                rank.kill()
    finally:
        _signal_group(process, signal.SIGKILL)
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
