"""`metrics.jsonl`: what a run tells the launcher and whoever reads the run folder later."""

from __future__ import annotations

import json
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
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
