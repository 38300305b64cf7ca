"""Progress of bytes: a bar with GB, GB/s and time left, or a line every 5 % off a terminal."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from epctl.output import Mode, Output, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY = 0.05
# Seconds between lines at least: what ends sooner needs none.
LINE_PAUSE = 2.0
GIGABYTE = 1e9


class ByteProgress:
    """Counts bytes from any thread; use as a context manager around the work."""

    def __init__(self, out: Output, title: str, total: int) -> None:
        self.out = out
        self.title = title
        self.total = max(1, total)
        self.done = 0
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._next_line = LINE_EVERY
        self._last_line = self._started
        self._bar = _bar(out) if out.is_terminal and out.mode is Mode.HUMAN else None
        self._task = self._bar.add_task(title, total=self.total) if self._bar else None

    def __enter__(self) -> ByteProgress:
        self._started = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._started

    def advance(self, num_bytes: int) -> None:
        """Counts bytes that are done."""
        with self._lock:
            self.done += num_bytes
            if self._bar and self._task is not None:
                self._bar.update(self._task, completed=self.done)
            elif self.done >= self._next_line * self.total:
                while self._next_line * self.total <= self.done:
                    self._next_line += LINE_EVERY
                if time.monotonic() - self._last_line >= LINE_PAUSE:
                    self._last_line = time.monotonic()
                    self.out.note(self.line())

    def line(self) -> str:
        """Returns the state in one line: `shard  40 %  3.2 of 8.0 GB, 0.41 GB/s, 12 s left`."""
        seconds = max(1e-9, self.seconds)
        rate = self.done / seconds
        left = format_seconds((self.total - self.done) / rate) if rate else "?"
        return (
            f"{self.title} {self.done / self.total:4.0%}  {self.done / GIGABYTE:.2f} of "
            f"{self.total / GIGABYTE:.2f} GB, {rate / GIGABYTE:.2f} GB/s, {left} left"
        )


def _bar(out: Output) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=out.console(),
    )
