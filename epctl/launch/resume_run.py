"""What `--resume RUN` means before anything starts: settings, checkpoint, the same topology."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epctl.config import ResolvedConfig
from epctl.errors import InputError
from epctl.launch.devices import Placement
from epctl.runtime.run_checkpoints import Topology, newest_checkpoint, require_topology

# Where a run was to go, and what it resumed itself, is not for the next one to inherit.
NOT_INHERITED = ("run.output", "run.resume", "launch.node_rank", "launch.local_address")


def resumed_settings(run_folder: Path) -> tuple[Mapping[str, Any], str]:
    """Returns the settings somebody chose for the earlier run, and their source for `--dry-run`.

    Raises InputError if the folder is no run or has no checkpoint.
    """
    newest_checkpoint(run_folder)
    path = run_folder / "config.json"
    try:
        earlier = ResolvedConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"`{path}` cannot be read: {error}") from None
    values = {key: v for key, v in earlier.given().items() if key not in NOT_INHERITED}
    return values, f"run {run_folder}"


def checkpoint_to_resume(resolved: ResolvedConfig, placement: Placement) -> Path | None:
    """Returns the checkpoint the run goes on from, None for a fresh run.

    Raises ConfigError if it was written at another topology.
    """
    config = resolved.config
    if config.run.resume is None:
        return None
    checkpoint = newest_checkpoint(Path(config.run.resume))
    asked = Topology(placement.num_ranks, config.parallel.ep, config.parallel.zero)
    require_topology(checkpoint, asked)
    return checkpoint.resolve()


def reopen_run_folder(folder: Path) -> Path:
    """Removes what the earlier job left behind about its own failure; returns the absolute path."""
    for pattern in ("logs/failure-rank-*.json", "logs/failed-ranks.json", "command.txt"):
        for path in folder.glob(pattern):
            path.unlink()
    return folder.resolve()
