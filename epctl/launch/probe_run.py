"""Starts the probe ranks, follows their findings, and goes on without a probe that kills them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epctl.launch.command import rank_environment
from epctl.launch.devices import Placement
from epctl.launch.ports import free_port
from epctl.launch.probe import NUM_RANKS
from epctl.launch.supervise import EventTail

POLL_SECONDS = 0.1
# Longest silence: imports at first, and one probe on a busy machine after that.
SILENCE_SECONDS = 60.0


@dataclass(frozen=True)
class ProbeResult:
    """What came of one probe."""

    id: str
    verdict: str
    seen: str
    seconds: float


def run_probes(
    hazard_ids: Sequence[str],
    on_result: Callable[[ProbeResult], None],
    *,
    module: str = "epctl.launch.probe_ranks",
    silence_seconds: float = SILENCE_SECONDS,
) -> list[ProbeResult]:
    """Runs the probes in as few launches as possible; calls `on_result` as each one ends.

    A probe during which a rank dies, or nothing happens for `silence_seconds`, has failed; the
    ranks are started again for those that are left. Ranks that die before their first probe fail
    all of them.
    """
    results: list[ProbeResult] = []
    remaining = list(hazard_ids)
    while remaining:
        with tempfile.TemporaryDirectory(prefix="epctl-doctor-") as name:
            launch = _Launch(Path(name), remaining, module)
            done, culprit = launch.follow(on_result, silence_seconds)
            reason = launch.reason
        results += done
        finished = {result.id for result in done}
        remaining = [hazard_id for hazard_id in remaining if hazard_id not in finished]
        lost = [culprit] if culprit in remaining else remaining
        for hazard_id in lost:
            results.append(ProbeResult(str(hazard_id), "failed", reason, 0.0))
            on_result(results[-1])
        remaining = [hazard_id for hazard_id in remaining if hazard_id not in lost]
    return results


class _Launch:
    """One pair of ranks working through a list of probes."""

    def __init__(self, folder: Path, hazard_ids: Sequence[str], module: str) -> None:
        self.folder = folder
        self.reason = ""
        self._tail = EventTail(folder / "findings.jsonl")  # before anybody writes
        environment = rank_environment(Placement("cpu", NUM_RANKS, "probes"), os.environ) | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(NUM_RANKS),
            "OMP_NUM_THREADS": "1",
            # Compiling Newton-Schulz takes a minute and a half and changes nothing that is probed.
            "TORCHDYNAMO_DISABLE": "1",
        }
        self.processes = []
        for rank in range(NUM_RANKS):
            with (folder / f"rank-{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", module, str(folder), *hazard_ids],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.processes.append(process)

    def follow(
        self, on_result: Callable[[ProbeResult], None], silence_seconds: float
    ) -> tuple[list[ProbeResult], str | None]:
        """Returns (results, the probe that was running when the ranks were lost or None)."""
        results: list[ProbeResult] = []
        running: str | None = None
        heard = time.monotonic()
        try:
            while True:
                ended = self._ended()
                for line in self._tail:
                    heard = time.monotonic()
                    if "begin" in line:
                        running = line["begin"]
                        continue
                    running = None
                    results.append(ProbeResult(**line))
                    on_result(results[-1])
                if ended or self._silent(heard, silence_seconds):
                    return results, running
                time.sleep(POLL_SECONDS)
        finally:
            self._stop()

    def _ended(self) -> bool:
        codes = [process.poll() for process in self.processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            self.reason = f"rank {failed[0]} ended with {codes[failed[0]]}: {self._last(failed[0])}"
        return bool(failed) or all(code == 0 for code in codes)

    def _silent(self, heard: float, limit: float) -> bool:
        silent = time.monotonic() - heard > limit
        if silent:
            self.reason = f"nothing happened for {limit:.0f} s"
        return silent

    def _last(self, rank: int) -> str:
        text = (self.folder / f"rank-{rank}.log").read_text("utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it said nothing"

    def _stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
