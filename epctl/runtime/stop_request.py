"""SIGTERM and SIGUSR1: finish the step, write one checkpoint, end with 143."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from epctl.errors import ExitCode

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
# Slurm, torchrun and a launcher may all pass the same signal on: copies come close together.
SAME_SIGNAL_SECONDS = 2.0


class StopRequest:
    """Notes that this process was asked to end; a second SIGTERM ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._first = 0.0

    def install(self) -> None:
        """Takes over both signals for the rest of the process's life."""
        for number in NUMBERS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.number is not None and now - self._first > SAME_SIGNAL_SECONDS
        if again and number == signal.SIGTERM:
            os._exit(ExitCode.TERMINATED)
        if self.number is None:
            self.number, self._first = number, now

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number is not None else ""
