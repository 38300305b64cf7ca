"""Putting a checkpoint back into a running engine, whatever layout it was written from.

Order matters: the weights were read from the same checkpoint before the engine was made, so low
precision is already the rounded master (at ZeRO-3 writing masters alone would not refresh what the
next forward uses); then masters and moments are overwritten slice by slice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from epctl.config import RunConfig
from epctl.errors import ConfigError
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.checkpoint_progress import Progress
from epctl.runtime.checkpoint_reader import StateReader
from epctl.runtime.checkpoint_snapshot import buffers, counters, random_name
from epctl.runtime.checkpoint_state import named_ranges, restore_slices
from epctl.runtime.mesh import Mesh
from epctl.runtime.random_state import KEYS, seed_anew, set_random_state
from epctl.runtime.run_checkpoints import STATE_FOLDER


@torch.no_grad()
def restore(
    checkpoint: Path,
    config: RunConfig,
    mesh: Mesh,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> tuple[Progress, int]:
    """Overwrites masters, moments, counters, schedule and random state; every rank calls it.

    Returns where the run stands and the bytes this rank read.

    Raises InputError if the checkpoint has not what this run needs, ConfigError if the run is
    complete.
    """
    progress = Progress.read(checkpoint / STATE_FOLDER)
    if progress.step >= config.train.steps:
        raise ConfigError(
            f"`{checkpoint}` stands at step {progress.step} of {config.train.steps}: nothing is "
            "left to train",
            hint="give a longer one with `--steps`, `--tokens` or `--epochs`",
        )
    with StateReader(checkpoint / STATE_FOLDER) as reader:
        partitions = seams.flat_partitions(engine)
        restore_slices(reader, partitions, optimizer, named_ranges(engine.module))
        _restore_buffers(reader, engine, mesh)
        _restore_random(reader, config, progress.step, mesh, engine)
        num_bytes = reader.num_bytes
    _restore_counters(engine, scheduler, config, progress)
    return progress, num_bytes


def _restore_buffers(reader: StateReader, engine: Any, mesh: Mesh) -> None:
    for name, buffer in buffers(engine.module):
        if reader.has(name, "buffer"):
            buffer.copy_(reader.read(name, "buffer").view(buffer.shape))
    for name, counter in counters(engine.module):
        counter.zero_()
        if mesh.rank == 0 and reader.has(name, "count"):
            counter.copy_(reader.read(name, "count").view(counter.shape))


def _restore_random(
    reader: StateReader, config: RunConfig, step: int, mesh: Mesh, engine: Any
) -> None:
    """Gives each rank its own random state back; ranks there were none of get a new one."""
    name = random_name(mesh.rank)
    if not reader.has(name, KEYS[0]):
        seed_anew(config.train.seed, step, mesh.rank)
        return
    for key in KEYS:
        if reader.has(name, key):
            set_random_state(key, reader.read(name, key), engine.device)


def _restore_counters(engine: Any, scheduler: Any, config: RunConfig, progress: Progress) -> None:
    engine.global_steps = progress.global_steps
    engine.micro_steps = progress.global_steps * config.train.gradient_accumulation_steps
    # The rate is a function of the step: one call brings every group to it.
    scheduler.last_epoch = progress.step - 1
    scheduler.step()
