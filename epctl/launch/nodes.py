"""Several machines as one job: who runs what, what must be stated, and joining a job."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path

from epctl.config import ResolvedConfig, RunConfig
from epctl.errors import ConfigError, InputError
from epctl.launch.command import launch_command, rank_environment
from epctl.launch.devices import Placement, place_ranks
from epctl.launch.supervise import run_job
from epctl.output import Output

DEFAULT_PORT = 29500
POLL_SECONDS = 0.2
# Longest wait of a joining node for node 0 to write the run folder on the shared disk.
FOLDER_SECONDS = 600.0
# What differs from node to node or has no meaning there.
OWN_SETTINGS = ("launch.launcher", "launch.hostfile", "launch.node_rank", "launch.local_address")
OWN_PREFIX = "launch.slurm_"


def place_job(config: RunConfig, gpus: tuple[int, str]) -> Placement:
    """Decides device and ranks of the whole job; every node is taken to be like this one.

    Raises ConfigError if the ranks cannot be shared out evenly, and what `place_ranks` raises.
    """
    num_nodes = config.launch.num_nodes
    num_gpus, reason = gpus
    if num_nodes > 1:
        reason = f"{reason} on each of {num_nodes} nodes"
    placement = place_ranks(
        device=config.parallel.device,
        num_ranks=config.parallel.num_ranks,
        ep=math.lcm(config.parallel.ep, config.parallel.sp),
        gpus=(num_gpus * num_nodes, reason),
    )
    if placement.num_ranks % num_nodes:
        raise ConfigError(
            f"{placement.num_ranks} ranks cannot be shared out over {num_nodes} nodes",
            hint=f"use `--num-ranks` with a multiple of {num_nodes}",
        )
    return dataclasses.replace(placement, num_nodes=num_nodes)


def require_node_settings(config: RunConfig) -> None:
    """Raises ConfigError unless the settings of a job on several nodes are complete."""
    launch = config.launch
    if launch.node_rank >= launch.num_nodes:
        raise ConfigError(
            f"node rank {launch.node_rank} does not exist among {launch.num_nodes} nodes",
            hint=f"use `--node-rank` 0 to {launch.num_nodes - 1}, or more `--nnodes`",
        )
    if launch.launcher == "deepspeed" and (launch.num_nodes > 1 or launch.max_restarts):
        raise ConfigError(
            "`--launcher deepspeed` runs on one node and restarts nothing",
            hint="use torchrun, the default, for `--nnodes` and `--max-restarts`",
        )
    if launch.num_nodes == 1:
        return
    if launch.rendezvous is None or not re.fullmatch(r"\S+:\d+", launch.rendezvous):
        raise ConfigError(
            f"{launch.num_nodes} nodes need a place to meet, got {launch.rendezvous!r}",
            hint=f"use `--rdzv HOST:{DEFAULT_PORT}` with the address of node 0",
        )
    if config.run.output is None and config.run.resume is None:
        raise ConfigError(
            f"{launch.num_nodes} nodes need one run folder on a shared disk",
            hint="name it with `--output`",
        )


def node_arguments(resolved: ResolvedConfig) -> list[str]:
    """Returns what to give `epctl` on every node: each chosen setting by `--set`, in TOML."""
    arguments = ["train"]
    for key, value in resolved.given().items():
        if key in (*OWN_SETTINGS, "run.output", "run.resume") or key.startswith(OWN_PREFIX):
            continue
        if value is not None:
            arguments += ["--set", f"{key}={json.dumps(value)}"]
    return arguments


def join_job(config: RunConfig, placement: Placement, output: Output, program: str) -> None:
    """Runs this node's ranks of a job whose run folder node 0 writes.

    Raises InputError if the folder does not appear, LaunchError as the job's node 0 does.
    """
    launch = config.launch
    folder = Path(config.run.resume or config.run.output or "")
    wait_for_folder(folder)
    folder = folder.resolve()
    output.note(
        f"node {launch.node_rank} of {launch.num_nodes}: {placement.ranks_per_node} ranks join the "
        f"job of `{folder}`"
    )
    run_job(
        launch_command(folder, placement, program, launch),
        rank_environment(placement, os.environ, launch),
        folder,
        lambda event: None,
        log_name=f"launcher-node-{launch.node_rank}.log",
        grace_seconds=config.checkpoint.grace_seconds,
    )


def wait_for_folder(folder: Path, seconds: float = FOLDER_SECONDS) -> None:
    """Waits for node 0's `command.txt`, the last file that it writes before it starts ranks."""
    deadline = time.monotonic() + seconds
    while not (folder / "command.txt").exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"run folder `{folder}` did not appear in {seconds:.0f} s",
                hint="start node 0, and give every node the same `--output` on a shared disk",
            )
        time.sleep(POLL_SECONDS)
