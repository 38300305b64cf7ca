"""The sbatch script of a run. Pure: text from settings, nothing of Slurm is needed to make it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from epctl.config import RunConfig
from epctl.errors import ConfigError
from epctl.launch.nodes import DEFAULT_PORT

# The run goes on by itself after a requeue. An attempt that left no checkpoint is put aside.
BODY = """\
set -euo pipefail

run={run}
if compgen -G "$run/checkpoints/step-*[0-9]/manifest.json" > /dev/null; then
  where=(--resume "$run")
else
  if [ -e "$run" ]; then mv "$run" "$run.before-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"; fi
  where=(--output "$run")
fi
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${{nodes%%$'\\n'*}}
port=$(({port} + SLURM_JOB_ID % 1000))
export EPCTL_RENDEZVOUS="$head:$port"

# SLURM_NODEID is known on each node only, so its shell fills it in.
exec srun --kill-on-bad-exit=1 bash -c \\
  'exec "$@" --rdzv "$EPCTL_RENDEZVOUS" --node-rank "$SLURM_NODEID"' epctl \\
  {command} \\
  "${{where[@]}}"
"""


def sbatch_script(
    config: RunConfig, run_folder: Path, program: str, arguments: Sequence[str]
) -> str:
    """Returns the script: resources, log path, signal before the limit, requeue, rendezvous.

    Args:
        program: the Python that runs epctl on every node.
        arguments: what epctl is given there (`nodes.node_arguments`).

    Raises ConfigError if the number of ranks is not stated: there is no GPU to count here,
    or the run folder's path has a space.
    """
    launch = config.launch
    if config.parallel.num_ranks is None:
        raise ConfigError(
            "`--launcher slurm` needs `--num-ranks`: the GPUs of the nodes cannot be counted here",
            hint=f"for {launch.num_nodes} nodes of 8 GPUs: `--num-ranks {8 * launch.num_nodes}`",
        )
    if config.parallel.num_ranks % launch.num_nodes:
        raise ConfigError(
            f"{config.parallel.num_ranks} ranks cannot be shared out over {launch.num_nodes} nodes"
        )
    if any(character.isspace() for character in str(run_folder)):
        raise ConfigError(f"Slurm cannot log beside `{run_folder}`: the path has a space")
    directives = _directives(config, run_folder)
    command = shlex.join([program, "-m", "epctl", *arguments])
    return (
        "#!/bin/bash\n"
        + "".join(f"#SBATCH {directive}\n" for directive in directives)
        + "\n"
        + BODY.format(run=shlex.quote(str(run_folder)), port=DEFAULT_PORT, command=command)
    )


def _directives(config: RunConfig, run_folder: Path) -> list[str]:
    launch = config.launch
    assert config.parallel.num_ranks is not None
    directives = [
        f"--job-name=epctl-{run_folder.name}",
        f"--nodes={launch.num_nodes}",
        "--ntasks-per-node=1",
        f"--time={launch.slurm_time}",
        # Beside the run folder, which must be new when the first attempt starts.
        f"--output={run_folder}-slurm-%j.log",
        "--open-mode=append",
        "--requeue",
    ]
    if config.parallel.device != "cpu":
        gpus = config.parallel.num_ranks // launch.num_nodes
        directives.append(f"--gpus-per-node={gpus}")
    if launch.slurm_partition is not None:
        directives.append(f"--partition={launch.slurm_partition}")
    if launch.slurm_account is not None:
        directives.append(f"--account={launch.slurm_account}")
    if launch.slurm_signal_seconds:
        directives.append(f"--signal=TERM@{launch.slurm_signal_seconds}")
    return directives
