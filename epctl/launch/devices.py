"""Which devices this machine offers, found without torch; every answer carries its reason."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from epctl.errors import ConfigError, ResourceError


@dataclass(frozen=True)
class Placement:
    """Where ranks run, how many there are on all nodes together, and why."""

    device: Literal["cpu", "cuda"]
    num_ranks: int
    reason: str
    num_nodes: int = 1

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes


def count_gpus() -> tuple[int, str]:
    """Returns (number of usable NVIDIA GPUs, reason); `CUDA_VISIBLE_DEVICES` is honoured."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        parts = [part.strip() for part in visible.split(",")]
        # As the driver reads it: what follows the first -1 or empty entry does not count.
        ids = list(itertools.takewhile(lambda part: part not in ("", "-1"), parts))
        if not ids:
            return 0, f"CUDA_VISIBLE_DEVICES={visible} names none"
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0, "no nvidia-smi on this machine"
    try:
        listing = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 0, f"nvidia-smi does not answer: {error}"
    if listing.returncode != 0:
        said = (listing.stdout + listing.stderr).strip().splitlines()
        return 0, f"nvidia-smi failed: {said[-1] if said else f'exit code {listing.returncode}'}"
    found = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    if visible is not None:
        return min(found, len(ids)), f"CUDA_VISIBLE_DEVICES={visible}"
    return found, f"nvidia-smi lists {found}"


def gpu_memory() -> float | None:
    """Returns the bytes of the smallest GPU that the driver lists, None where it does not say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
        return min(float(line) for line in answer.stdout.split()) * 2**20
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def host_memory() -> float:
    """Returns the bytes of host memory that are free to use now."""
    import psutil  # type: ignore[import-untyped]

    return float(psutil.virtual_memory().available)


def place_ranks(
    *, device: Literal["auto", "cpu", "cuda"], num_ranks: int | None, ep: int, gpus: tuple[int, str]
) -> Placement:
    """Decides device and number of ranks.

    Without GPUs there are as many ranks as the ep size; with GPUs one rank a GPU.

    Raises:
        ConfigError: CUDA asked for on a machine without it.
        ResourceError: more ranks than GPUs.
    """
    num_gpus, reason = gpus
    if device == "cuda" and num_gpus == 0:
        raise ConfigError(
            f"device is cuda, but there is no GPU ({reason})", hint="use `--device cpu`"
        )
    if device == "cpu" or num_gpus == 0:
        why = "asked for" if device == "cpu" else reason
        return Placement("cpu", num_ranks or ep, f"CPU ranks over gloo: {why}")
    wanted = num_ranks or max(num_gpus, ep)
    if wanted > num_gpus:
        needed = f"`--num-ranks {num_ranks}`" if num_ranks else f"`--ep {ep}`"
        raise ResourceError(
            f"{needed} needs {wanted} GPUs, this machine offers {num_gpus} ({reason})",
            hint=f"use {_fitting(num_ranks, ep, num_gpus)}, or `--device cpu` for a small model",
        )
    return Placement("cuda", wanted, f"one rank a GPU over NCCL: {reason}")


def _fitting(num_ranks: int | None, ep: int, num_gpus: int) -> str:
    """Returns flags that fit the GPUs: the largest ep that divides what was asked for."""
    size = next(size for size in range(min(ep, num_gpus), 0, -1) if ep % size == 0)
    ranks = f" --num-ranks {num_gpus // size * size}" if num_ranks or num_gpus % size else ""
    return f"`--ep {size}{ranks}`"
