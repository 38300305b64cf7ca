"""The checkpoints of a run folder: which are there, which is newest, does it fit. No torch.

A folder appears under its final name by rename, when everything in it is written and synced, so
what has the name is whole.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from epctl.errors import ConfigError, InputError

STATE_FOLDER = "state"
STATE_NAME = "run.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Topology:
    """How a run is spread; a checkpoint resumes at the same one."""

    num_ranks: int
    ep: int
    zero: int

    def __str__(self) -> str:
        return f"{self.num_ranks} ranks, ep {self.ep}, ZeRO-{self.zero}"


@dataclass(frozen=True)
class RunState:
    """Where a checkpoint stands: optimizer steps done, and DeepSpeed's own counters."""

    step: int
    topology: Topology
    global_steps: int
    micro_steps: int

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """Reads `state/run.json`; raises InputError if it is missing or damaged."""
        path = folder / STATE_FOLDER / STATE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**(values | {"topology": Topology(**values["topology"])}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"`{path}` cannot be read: {error}") from None


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:07d}"


def committed_checkpoints(run_folder: Path) -> list[Path]:
    """Returns the finished checkpoints of a run, oldest first."""
    found = (run_folder / "checkpoints").glob("step-*")
    return sorted(path for path in found if path.is_dir() and _STEP.fullmatch(path.name))


def newest_checkpoint(run_folder: Path) -> Path:
    """Returns the checkpoint to resume from; raises InputError if the run has none."""
    if not (run_folder / "config.json").is_file():
        raise InputError(
            f"`{run_folder}` is no run folder: it has no config.json",
            hint="`--resume` takes the folder that an earlier `epctl train` wrote",
        )
    committed = committed_checkpoints(run_folder)
    if not committed:
        raise InputError(
            f"run `{run_folder}` has no checkpoint to resume from",
            hint="train with `--set run.checkpoint_every=STEPS` to write them",
        )
    return committed[-1]


def require_topology(checkpoint: Path, asked: Topology) -> None:
    """Raises ConfigError if the run is to go on at another topology than it was saved at."""
    written = RunState.read(checkpoint).topology
    if written != asked:
        raise ConfigError(
            f"`{checkpoint}` was written by {written}; asked for {asked}",
            hint=f"resume with `--ep {written.ep} --zero {written.zero} --num-ranks "
            f"{written.num_ranks}`, or start a new run from its weights: "
            f"`epctl train {checkpoint}`",
        )
