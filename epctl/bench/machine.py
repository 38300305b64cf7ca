"""What a reader needs to judge a figure: processor or GPU, load, memory, versions, the disk.

Versions come from the installed packages' records, so nothing here imports torch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "deepspeed", "transformers")


def machine_facts(gpu: str | None = None, folder: Path | None = None) -> dict[str, Any]:
    """Returns the facts of this machine now.

    Args:
        gpu: the GPU's name when it is what was measured; its driver is asked for then.
        folder: a folder of the disk that was measured; its size and file system are told then.
    """
    import psutil  # type: ignore[import-untyped]

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": gpu or _processor(),
        "num_cpus": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    } | package_versions()
    if gpu is not None:
        facts["driver"] = _driver_version()
    if folder is not None:
        usage = shutil.disk_usage(folder)
        facts |= {
            "disk_total_bytes": usage.total,
            "disk_free_bytes": usage.free,
            "file_system": _file_system(folder),
        }
    return facts


def package_versions() -> dict[str, str]:
    """Returns the installed versions of what epctl measures with; absent packages are left out."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        completed = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return completed.stdout.splitlines()[0] if completed.stdout else "unknown"


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
