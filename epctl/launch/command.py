"""The launch command and environment of a run. Pure: what `--dry-run` prints is what runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from epctl.launch.devices import Placement


def torchrun_arguments(run_folder: Path, placement: Placement, program: str) -> list[str]:
    """Returns torchrun's own arguments: one node, one process a rank, no restarts."""
    return [
        "--standalone",
        f"--nproc-per-node={placement.num_ranks}",
        "--max-restarts=0",
        "--monitor-interval=0.2",
        "--module",
        "epctl.runtime.worker",
        str(run_folder),
        program,
    ]


def launch_command(run_folder: Path, placement: Placement, program: str = "train") -> list[str]:
    """Returns the argv that starts the job: torchrun behind epctl's failure reporting.

    Args:
        program: what the ranks run: `train` or `check`.
    """
    agent = [sys.executable, "-m", "epctl.launch.agent", str(run_folder)]
    return agent + torchrun_arguments(run_folder, placement, program)


def rank_environment(placement: Placement, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the ranks: threads shared out, GPUs hidden from CPU ranks."""
    environment = dict(inherited)
    threads = max(1, (os.cpu_count() or 1) // placement.num_ranks)
    environment.setdefault("OMP_NUM_THREADS", str(threads if placement.device == "cpu" else 8))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment["PYTHONUNBUFFERED"] = "1"
    if placement.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment
