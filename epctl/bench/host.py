"""What a benchmark of files needs of this machine: facts, caches, resident memory. No torch."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Returns median, lowest and highest of `samples`: a disk's few rounds have no percentiles."""
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}


def host_facts(folder: Path) -> dict[str, Any]:
    """Returns what a reader needs to judge a disk's figures."""
    import psutil  # type: ignore[import-untyped]

    usage = shutil.disk_usage(folder)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": _processor(),
        "num_cpus": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "memory_bytes": psutil.virtual_memory().total,
        "disk_total_bytes": usage.total,
        "disk_free_bytes": usage.free,
        "file_system": _file_system(folder),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _file_system(folder: Path) -> str:
    import psutil

    where = folder.resolve()
    mounts = [
        part for part in psutil.disk_partitions(all=True) if where.is_relative_to(part.mountpoint)
    ]
    best = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return f"{best.fstype} on {best.device}" if best else "unknown"


def drop_caches(folder: Path) -> str:
    """Empties the page cache of a folder's files; returns how, for the report.

    Root empties the whole cache; others ask the system to forget these files, which it may not do.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    except OSError:
        for path in folder.rglob("*"):
            if path.is_file():
                _forget(path)
        return "asked to be dropped (posix_fadvise); not verified"
    return "dropped before each measurement (drop_caches)"


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def reset_peak_resident() -> bool:
    """Sets the process's peak resident memory to what is resident now; False if impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5\n", encoding="ascii")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """Returns the peak resident memory since the last reset (since the start, without /proc)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
