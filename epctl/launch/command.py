"""The launch command and environment of a run. Pure: what `--dry-run` prints is what runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from epctl.config import LaunchSection
from epctl.launch.devices import Placement

ONE_NODE = LaunchSection()


def torchrun_arguments(
    run_folder: Path, placement: Placement, program: str, launch: LaunchSection = ONE_NODE
) -> list[str]:
    """Returns torchrun's own arguments: one process a rank, nodes met by rendezvous."""
    return [
        *_rendezvous(run_folder, launch),
        f"--nproc-per-node={placement.ranks_per_node}",
        f"--max-restarts={launch.max_restarts}",
        "--monitor-interval=0.2",
        "--module",
        "epctl.runtime.worker",
        str(run_folder),
        program,
    ]


def _rendezvous(run_folder: Path, launch: LaunchSection) -> list[str]:
    """One node meets itself; several meet at node 0's address, by the name of the run."""
    if launch.num_nodes == 1:
        return ["--standalone"]
    arguments = [
        f"--nnodes={launch.num_nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={launch.rendezvous}",
        f"--rdzv-id={run_folder.name}",
        # Decided here, not by comparing host names, which fails on addresses and aliases.
        f"--rdzv-conf=is_host={int(launch.node_rank == 0)}",
    ]
    if launch.local_address is not None:
        arguments.append(f"--local-addr={launch.local_address}")
    return arguments


def launch_command(
    run_folder: Path,
    placement: Placement,
    program: str = "train",
    launch: LaunchSection = ONE_NODE,
) -> list[str]:
    """Returns the argv that starts this node's ranks: torchrun behind epctl's failure reporting.

    Args:
        program: what the ranks run: `train` or `check`.
    """
    if launch.launcher == "deepspeed":
        return _deepspeed_command(run_folder, placement, program)
    agent = [sys.executable, "-m", "epctl.launch.agent", str(run_folder)]
    return agent + torchrun_arguments(run_folder, placement, program, launch)


def _deepspeed_command(run_folder: Path, placement: Placement, program: str) -> list[str]:
    """DeepSpeed's launcher on one node; it would start one rank a NUMA node if not told."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--num_gpus={placement.num_ranks}",
        "--no_local_rank",
        "--module",
        "epctl.runtime.worker",
        str(run_folder),
        program,
    ]


def rank_environment(
    placement: Placement, inherited: Mapping[str, str], launch: LaunchSection = ONE_NODE
) -> dict[str, str]:
    """Returns the environment of the ranks.

    Threads are shared out and GPUs hidden from CPU ranks; on GPUs the allocator grows segments
    instead of fragmenting them, and NCCL ends ranks whose peer is gone. What the user set stays.
    """
    environment = dict(inherited)
    threads = max(1, (os.cpu_count() or 1) // placement.ranks_per_node)
    environment.setdefault("OMP_NUM_THREADS", str(threads if placement.device == "cpu" else 8))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment["PYTHONUNBUFFERED"] = "1"
    if launch.num_nodes > 1 or launch.max_restarts:
        # With a store shared between rounds torchrun publishes its address in the first one only
        # (dynamic_rendezvous.py), so a launcher that replaces a dead one waits in vain; and ranks
        # that are started again find gloo addresses of dead ones in it.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if placement.device == "cpu":
        return environment | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if "TORCH_CUDA_ARCH_LIST" in environment:
        # DeepSpeed's JIT builder cannot read `9.0a` (hazard arch_list_suffix).
        plain = re.sub(r"(\d+\.\d+)[a-z]", r"\1", environment["TORCH_CUDA_ARCH_LIST"])
        environment["TORCH_CUDA_ARCH_LIST"] = plain
    return environment
