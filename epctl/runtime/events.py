"""`metrics.jsonl`: what a run tells the launcher and whoever reads the run folder later."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class EventLog:
    """Appends one JSON object a line; only rank 0 has a file, other ranks drop their events."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        self._file = (run_folder / FILE_NAME).open("a", encoding="utf-8") if rank == 0 else None

    def write(self, event: str, **fields: Any) -> None:
        """Writes and flushes, so that the launcher sees it at once."""
        if self._file is not None:
            record = {"event": event, "time": round(time.time(), 3), **fields}
            finite = {key: _or_null(value) for key, value in record.items()}
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _or_null(value: Any) -> Any:
    """JSON has no NaN: a loss that is not a number, or a load nobody measured, becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
