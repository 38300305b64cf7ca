"""Which devices this machine offers, found without torch; every answer carries its reason."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from epctl.errors import ConfigError, ResourceError


@dataclass(frozen=True)
class Placement:
    """Where ranks run, how many there are, and why."""

    device: Literal["cpu", "cuda"]
    num_ranks: int
    reason: str


def count_gpus() -> tuple[int, str]:
    """Returns (number of usable NVIDIA GPUs, reason); `CUDA_VISIBLE_DEVICES` is honoured."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        ids = [part for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        if not ids:
            return 0, "CUDA_VISIBLE_DEVICES is empty"
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0, "no nvidia-smi on this machine"
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    found = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    if visible is not None:
        return min(found, len(ids)), f"CUDA_VISIBLE_DEVICES={visible}"
    return found, f"nvidia-smi lists {found}"


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
            hint=f"use `--ep {num_gpus}`, or `--device cpu` for a small model",
        )
    return Placement("cuda", wanted, f"one rank a GPU over NCCL: {reason}")
