"""Starts the ranks of a benchmark on this machine and follows what they write."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from epctl.errors import GateError, LaunchError
from epctl.launch.command import rank_environment
from epctl.launch.devices import Placement
from epctl.launch.ports import free_port
from epctl.launch.supervise import EventTail

POLL_SECONDS = 0.2


def follow_ranks(
    folder: Path,
    device: Literal["cpu", "cuda"],
    num_ranks: int,
    settings: dict[str, Any],
    module: str,
    silence_seconds: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """Yields the ranks' events as they are written; no rank outlives the iteration.

    Args:
        module: what a rank runs: `python -m MODULE FOLDER SETTINGS_JSON`.
        silence_seconds: how long nothing may be written.

    Raises GateError for an event `red`, LaunchError with a failing rank's exit code or for silence.
    """
    tail = EventTail(folder / "events.jsonl")  # before anybody writes
    ranks = _start(folder, device, num_ranks, settings, module)
    heard = time.monotonic()
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            for event in tail:
                heard = time.monotonic()
                if "red" in event:
                    raise GateError(f"gate red: {event['red']}")
                yield event
            failed = next((r for r, code in enumerate(codes) if code not in (None, 0)), None)
            if failed is not None:
                raise LaunchError(
                    f"rank {failed} ended with {codes[failed]}: {_last_line(folder, failed)}",
                    exit_code=codes[failed] or 1,
                )
            if all(code == 0 for code in codes):
                return
            if time.monotonic() - heard > silence_seconds:
                raise LaunchError(
                    f"the ranks said nothing for {silence_seconds:.0f} s", exit_code=1
                )
            time.sleep(POLL_SECONDS)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def _start(
    folder: Path,
    device: Literal["cpu", "cuda"],
    num_ranks: int,
    settings: dict[str, Any],
    module: str,
) -> list[subprocess.Popen[bytes]]:
    environment = rank_environment(Placement(device, num_ranks, "bench"), os.environ) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
    }
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
        # DeepSpeed's Newton-Schulz would compile for a minute and a half and be no faster.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    processes = []
    for rank in range(num_ranks):
        with (folder / f"rank-{rank}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(folder), json.dumps(settings)],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        processes.append(process)
    return processes


def _last_line(folder: Path, rank: int) -> str:
    text = (folder / f"rank-{rank}.log").read_text("utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
