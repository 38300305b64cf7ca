"""From what a failed job left behind to one error that names the rank, its log and the reason."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

from epctl.errors import EpctlError, LaunchError
from epctl.launch.agent import FILE_NAME

# What a rank's death by signal usually means to the person who started it.
SIGNAL_MEANING: dict[int, str] = {
    signal.SIGKILL: "killed, usually the host ran out of memory",
    signal.SIGBUS: "bus error, usually /dev/shm is full",
    signal.SIGABRT: "aborted, usually a failed assertion in native code",
    signal.SIGSEGV: "segmentation fault in native code",
    signal.SIGTERM: "terminated from outside",
}


def explain_failure(run_folder: Path) -> EpctlError:
    """Returns the error of the rank that failed first; later ranks only lost their peer.

    A rank killed by a signal leaves no record of its own; it comes before ranks whose only
    complaint is a lost connection, and after none.
    """
    records = _records(run_folder)
    codes = _exit_codes(run_folder)
    causes = [record for record in records if not record["peer_lost"]]
    if causes:
        return _from_record(run_folder, min(causes, key=lambda record: record["time"]))
    recorded = {record["rank"] for record in records}
    for rank, code in sorted(codes.items()):
        if rank not in recorded and code != -signal.SIGTERM:
            return _from_exit_code(run_folder, rank, code)
    if records:
        return _from_record(run_folder, min(records, key=lambda record: record["time"]))
    return LaunchError(
        f"the launcher failed; its log is `{run_folder / 'logs' / 'launcher.log'}`\n"
        + _tail(run_folder / "logs" / "launcher.log"),
        exit_code=1,
    )


def _records(run_folder: Path) -> list[dict[str, Any]]:
    paths = sorted((run_folder / "logs").glob("failure-rank-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _exit_codes(run_folder: Path) -> dict[int, int]:
    path = run_folder / "logs" / FILE_NAME
    if not path.exists():
        return {}
    return {int(rank): code for rank, code in json.loads(path.read_text("utf-8")).items()}


def _from_record(run_folder: Path, record: dict[str, Any]) -> EpctlError:
    log = run_folder / "logs" / f"rank-{record['rank']}.log"
    if record["known"]:
        return LaunchError(record["message"], exit_code=record["exit_code"], hint=record["hint"])
    reason = f"{record['type']}: {record['message']}".strip()
    return LaunchError(
        f"rank {record['rank']} failed first: {reason}",
        exit_code=record["exit_code"],
        hint=f"its log ends with the traceback: `tail {shlex.quote(str(log))}`",
    )


def _from_exit_code(run_folder: Path, rank: int, code: int) -> EpctlError:
    log = shlex.quote(str(run_folder / "logs" / f"rank-{rank}.log"))
    if code < 0:
        known = -code in set(signal.Signals)
        name = signal.Signals(-code).name if known else f"signal {-code}"
        meaning = SIGNAL_MEANING.get(-code, "killed by a signal")
        message = f"rank {rank} failed first: {name} ({meaning})"
        return LaunchError(message, exit_code=128 - code, hint=f"see its log: `tail {log}`")
    message = f"rank {rank} failed first with exit code {code}"
    return LaunchError(message, exit_code=code, hint=f"see its log: `tail {log}`")


def _tail(path: Path, num_lines: int = 15) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])
