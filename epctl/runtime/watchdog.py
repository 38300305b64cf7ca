"""Names the rank that holds all others up, and what it was doing, then ends this one.

Each rank counts the phases it enters; a thread publishes the count in `logs/`. When a rank has
made no progress for the limit, it writes its stacks to its log, and whoever has entered the fewest
phases is the one that stalls: the others wait for it in a collective.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epctl.errors import LaunchError

# As of an abort: what NCCL's own watchdog ends with.
EXIT_CODE = 134
# The rank's log (worker.py sends its output there).
LOG_DESCRIPTOR = 2
# What other ranks get to publish how far they are, once one has seen the limit pass.
SETTLE_SECONDS = 1.0


@dataclass
class _Place:
    count: int = 0
    step: int = 0
    phase: str = "starting"
    since: float = 0.0


class Watchdog:
    """Watches this rank; does nothing with a limit of 0."""

    def __init__(self, run_folder: Path, rank: int, num_ranks: int, limit_seconds: float) -> None:
        self._folder = run_folder / "logs"
        self._rank = rank
        self._num_ranks = num_ranks
        self._limit = limit_seconds
        self._place = _Place(since=time.time())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        if self._limit:
            self._publish()
            self._thread.start()

    def stop(self) -> None:
        """Ends the watching; what follows may take as long as it likes."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._file(self._rank).unlink(missing_ok=True)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Says what this rank does from now on; cheap enough for every micro-step."""
        old = self._place
        step = old.step if step is None else step
        self._place = _Place(old.count + 1, step, phase, time.time())

    def _watch(self) -> None:
        published = -1
        while not self._stopped.wait(min(10.0, self._limit / 8)):
            place = self._place
            if place.count != published:
                self._publish()
                published = place.count
            if time.time() - place.since > self._limit:
                self._end()

    def _publish(self) -> None:
        place = self._place
        document = {"rank": self._rank, "pid": os.getpid(), **vars(place)}
        path = self._file(self._rank)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(document), encoding="utf-8")
            temporary.rename(path)
        except OSError:  # a full or lost disk is not for this thread to report
            return

    def _file(self, rank: int) -> Path:
        return self._folder / f"place-rank-{rank}.json"

    def _end(self) -> None:
        """Dumps stacks, finds the rank that is behind, leaves the record of a failure and exits."""
        from epctl.runtime.worker import record_failure

        self._publish()
        faulthandler.dump_traceback(file=LOG_DESCRIPTOR, all_threads=True)
        time.sleep(SETTLE_SECONDS)
        record_failure(self._folder.parent, self._rank, self._verdict())
        os._exit(EXIT_CODE)

    def _verdict(self) -> LaunchError:
        places = [p for p in map(self._read, range(self._num_ranks)) if p is not None]
        behind = min(places, key=lambda p: (p["count"], p["since"]), default=None)
        if behind is None:
            behind = {"rank": self._rank, **vars(self._place)}
        seconds = time.time() - behind["since"]
        level = len(places) > 1 and all(p["count"] == behind["count"] for p in places)
        who = "no rank is behind: all" if level else f"rank {behind['rank']}"
        others = "" if level else "; the others wait for it"
        log = self._folder / f"rank-{behind['rank']}.log"
        return LaunchError(
            f"{who} stalled in step {behind['step']}, phase `{behind['phase']}`, "
            f"for {seconds:.0f} s (limit {self._limit:.0f} s){others}",
            exit_code=EXIT_CODE,
            hint=f"stacks of every rank that could write them are in `{log.parent}/rank-*.log`; "
            "`guards.stall_minutes` is the limit",
        )

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            document: dict[str, Any] = json.loads(self._file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return document
