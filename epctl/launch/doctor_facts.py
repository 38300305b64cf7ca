"""What this machine offers, found in a second or two and without torch; secrets stay here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from epctl.output import format_bytes
from epctl.runtime.versions import installed_versions

REDACTED = "(redacted)"
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)
# Tokens by their form, wherever they stand, and the user part of an address.
SECRET_VALUE = re.compile(r"\b(?:hf|ghp|gho|glpat|sk)[_-][A-Za-z0-9_-]{8,}|(?<=://)[^/@\s]+(?=@)")
SHOWN_VARIABLES = re.compile(
    r"^(NCCL|GLOO|TORCH|PYTORCH|CUDA|HF|EPCTL|DS|SLURM|OMP|MASTER|WORLD|RANK|LOCAL_RANK|TRITON)"
)
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_WANTED = 1 << 30
DISK_WANTED = 10 << 30
STALE_SECONDS = 600
# Distributions whose names end in the CUDA version they are of.
OF_CUDA = {"nvidia-nccl": "nccl", "nvidia-cuda-nvrtc": "nvrtc"}
GPU_FIELDS = ("name", "memory.total", "driver_version", "compute_cap", "pci.bus_id")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "warning"]
    value: str
    hint: str | None = None


def redact(name: str, value: str) -> str:
    """Returns the value of an environment variable, without what could be a secret."""
    if SECRET_NAME.search(name) and name != "TOKENIZERS_PARALLELISM":
        return REDACTED
    return SECRET_VALUE.sub(REDACTED, value)


def relevant_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that steer a run, redacted."""
    names = sorted(name for name in environment if SHOWN_VARIABLES.match(name))
    return {name: redact(name, environment[name]) for name in names}


def versions() -> dict[str, str]:
    """Returns versions of Python, the libraries, NCCL and NVRTC, from their metadata."""
    result = installed_versions()
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        for start, label in OF_CUDA.items():
            if name.startswith(start):
                result[label] = distribution.version
    return result


def machine() -> dict[str, Any]:
    """Returns cores, memory, system, and which build tools there are."""
    import psutil  # type: ignore[import-untyped]

    tools = ("g++", "ninja", "nvcc", "numactl", "nvidia-smi")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "num_cores": os.cpu_count() or 1,
        "memory_bytes": int(psutil.virtual_memory().total),
        "memory_available_bytes": int(psutil.virtual_memory().available),
        "tools": {tool: shutil.which(tool) is not None for tool in tools},
    }


def gpus() -> list[dict[str, str]]:
    """Returns name, memory, driver, compute capability and bus of each GPU."""
    listing = _nvidia_smi(f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    rows = [line.split(", ") for line in listing.splitlines()]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(GPU_FIELDS)]


def links() -> list[str]:
    """Returns the lines of the topology matrix: NV is NVLink, the rest is PCIe or the host."""
    lines = _nvidia_smi("topo", "-m").splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in lines]
    return [line for line in plain if line.startswith("GPU") or "GPU0" in line]


def _nvidia_smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    return result.stdout if result.returncode == 0 else ""


def build_locks(environment: Mapping[str, str]) -> list[Path]:
    """Returns lock files of op builds that nobody can still hold: older than ten minutes."""
    default = Path.home() / ".cache" / "torch_extensions"
    root = Path(environment.get("TORCH_EXTENSIONS_DIR", default))
    now = time.time()
    return [p for p in sorted(root.glob("**/lock")) if now - p.stat().st_mtime > STALE_SECONDS]


def checks(environment: Mapping[str, str]) -> list[Check]:
    """Returns what was looked at on this machine, each with its verdict."""
    return [
        _free("disk", Path.cwd(), DISK_WANTED, "checkpoints need room; change to another disk"),
        _free("disk, Hugging Face cache", _hub_cache(environment), DISK_WANTED, "set `HF_HOME`"),
        _free("shared memory", SHARED_MEMORY, SHARED_MEMORY_WANTED, "start with `--shm-size=8g`"),
        _locks(environment),
        _arch_list(environment),
        hub_reachability(environment),
    ]


def _hub_cache(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HF_HOME", Path.home() / ".cache" / "huggingface"))


def _free(name: str, folder: Path, wanted: int, hint: str) -> Check:
    """Free space where `folder` is or would be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    value = f"{format_bytes(free)} free at {folder}"
    if free < wanted:
        return Check(name, "warning", f"{value}, {format_bytes(wanted)} wanted", hint)
    return Check(name, "ok", value)


def _locks(environment: Mapping[str, str]) -> Check:
    found = build_locks(environment)
    if not found:
        return Check("build locks", "ok", "none older than ten minutes")
    paths = " ".join(map(str, found))
    return Check("build locks", "warning", f"{len(found)} stale: {paths}", f"`rm {paths}`")


def _arch_list(environment: Mapping[str, str]) -> Check:
    value = environment.get("TORCH_CUDA_ARCH_LIST")
    name = "TORCH_CUDA_ARCH_LIST"
    if value is None:
        return Check(name, "ok", "not set")
    if re.search(r"\d[a-z]", value):
        hint = "ranks get it without suffixes; other programs that build DeepSpeed ops fail"
        return Check(name, "warning", f"{value} has a suffix", hint)
    return Check(name, "ok", value)


def hub_reachability(environment: Mapping[str, str], timeout_seconds: float = 3.0) -> Check:
    """Whether the hub's address answers; offline mode is respected."""
    from huggingface_hub import constants

    if environment.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return Check("hub", "ok", "not tried: HF_HUB_OFFLINE is set")
    parts = urllib.parse.urlsplit(constants.ENDPOINT)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((host, port), timeout=timeout_seconds):
            return Check("hub", "ok", f"{host} answers")
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        hint = "use a local folder as MODEL; a proxy may still let downloads through"
        return Check("hub", "warning", f"{host} does not answer: {reason}", hint)
