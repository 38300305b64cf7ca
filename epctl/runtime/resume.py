"""Checkpoints that a run continues from, bit for bit at the same topology.

`checkpoints/step-N/` is a Hugging Face model; its `state/` holds what the next step needs besides:
every rank's float32 masters, optimizer state and random state as safetensors, and `run.json`.
Nothing in it is ever unpickled. Position in the data is the step: order is a function of it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from epctl.config import RunConfig
from epctl.errors import ConfigError, InputError
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.checkpoint import save_model, sync_path, write_safetensors
from epctl.runtime.mesh import Mesh
from epctl.runtime.run_checkpoints import (
    STATE_FOLDER,
    STATE_NAME,
    RunState,
    Topology,
    checkpoint_folder,
    committed_checkpoints,
)
from epctl.runtime.training_model import TrainingModel


@dataclass
class Checkpointer:
    """Saves and restores one run's state."""

    run_folder: Path
    config: RunConfig
    mesh: Mesh
    engine: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    model: TrainingModel

    def save(self, step: int) -> Path:
        """Writes `checkpoints/step-N`, then removes what is older than the newest few. Collective.

        Raises ResourceError if the disk cannot hold it; earlier checkpoints stay.
        """
        folder = checkpoint_folder(self.run_folder, step)
        dtype = next(self.engine.module.parameters()).dtype
        save_model(
            self.engine.module,
            self.mesh,
            folder,
            lambda staging: self.model.write_extras(staging, dtype),
            write_state=lambda staging: self._write_state(staging / STATE_FOLDER, step),
        )
        if self.mesh.rank == 0:
            for old in committed_checkpoints(self.run_folder)[: -self.config.run.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
        return folder

    def _write_state(self, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / state_file(self.mesh.rank)
        on_host = {n: t.detach().to("cpu", copy=True) for n, t in self._tensors().items()}
        write_safetensors(path, on_host)
        if self.mesh.rank == 0:
            topology = Topology(self.mesh.num_ranks, self.mesh.ep_size, self.config.parallel.zero)
            state = RunState(step, topology, self.engine.global_steps, self.engine.micro_steps)
            (folder / STATE_NAME).write_text(json.dumps(asdict(state)), encoding="utf-8")
            sync_path(folder / STATE_NAME)

    def _tensors(self) -> dict[str, Tensor]:
        """Returns this rank's live masters and optimizer state, and its random state, by name."""
        tensors = {"random.cpu": torch.get_rng_state()}
        if self.engine.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.engine.device)
        for index, partition in enumerate(seams.flat_partitions(self.engine)):
            tensors[f"{index}.master"] = partition.flat
            tensors |= {
                f"{index}.{key}": value
                for key, value in self.optimizer.state[partition.flat].items()
                if isinstance(value, Tensor)
            }
        return tensors

    @torch.no_grad()
    def restore(self, folder: Path) -> int:
        """Overwrites masters, optimizer and random state; returns the step to go on from.

        The model's weights must have been read from the same folder: low precision is then
        already the rounded master.

        Raises InputError if the state does not fit this run, ConfigError if the run is complete.
        """
        state = RunState.read(folder)
        if state.step >= self.config.train.steps:
            raise ConfigError(
                f"`{folder}` stands at step {state.step} of {self.config.train.steps}: nothing is "
                "left to train",
                hint="give a longer one with `--steps`, `--tokens` or `--epochs`",
            )
        path = folder / STATE_FOLDER / state_file(self.mesh.rank)
        try:
            with safe_open(path, framework="pt") as file:
                self._restore_tensors(file, path)
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot read `{path}`: {error}") from None
        self.engine.global_steps = state.global_steps
        self.engine.micro_steps = state.micro_steps
        for _ in range(state.step):
            self.scheduler.step()
        return state.step

    def _restore_tensors(self, file: Any, path: Path) -> None:
        missing = set(self._tensors()) - set(file.keys())
        if missing:
            raise InputError(
                f"`{path}` lacks {len(missing)} tensors, first `{min(missing)}`: it was written "
                "with other settings of the optimizer or of `--train`"
            )
        torch.set_rng_state(file.get_tensor("random.cpu"))
        if self.engine.device.type == "cuda":
            torch.cuda.set_rng_state(file.get_tensor("random.cuda"), self.engine.device)
        for index, partition in enumerate(seams.flat_partitions(self.engine)):
            _copy(file, f"{index}.master", partition.flat, path)
            for key, value in self.optimizer.state[partition.flat].items():
                if isinstance(value, Tensor):
                    _copy(file, f"{index}.{key}", value, path)


def state_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _copy(file: Any, name: str, destination: Tensor, path: Path) -> None:
    value = file.get_tensor(name)
    if value.shape != destination.shape:
        raise InputError(
            f"`{name}` of `{path}` has shape {list(value.shape)}, this run "
            f"{list(destination.shape)}: other settings of `--train` or of the parallel layout"
        )
    destination.copy_(value)
