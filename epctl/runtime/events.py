"""`metrics.jsonl`: what a run tells the launcher and whoever reads the run folder later."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class EventLog:
    """Appends one JSON object a line; only rank 0 has a file, other ranks drop their events.

    The thread that writes a checkpoint reports too, so lines are written one at a time.
    """

    def __init__(self, run_folder: Path, rank: int) -> None:
        self._file = (run_folder / FILE_NAME).open("a", encoding="utf-8") if rank == 0 else None
        self._lock = threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        """Writes and flushes, so that the launcher sees it at once."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        finite = {key: _or_null(value) for key, value in record.items()}
        line = json.dumps(finite, allow_nan=False) + "\n"
        with self._lock:
            if self._file is not None:
                self._file.write(line)
                self._file.flush()

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def _or_null(value: Any) -> Any:
    """JSON has no NaN: a loss that is not a number, or a load nobody measured, becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
