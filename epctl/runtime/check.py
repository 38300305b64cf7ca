"""`epctl train --check`: two steps of the user's model and data, whole against as asked.

Rank 0 first trains the unsharded model by itself; then all ranks train the asked-for layout on the
same batches, and every difference that rounding does not explain is a row of the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from epctl.config import ResolvedConfig, RunConfig
from epctl.errors import ConfigError
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.check_asked import AskedRun
from epctl.runtime.check_directions import cosines
from epctl.runtime.check_record import (
    TOLERANCES,
    choice_row,
    direction_rows,
    report,
    step_rows,
    weight_rows,
)
from epctl.runtime.check_reference import Reference, run_reference
from epctl.runtime.data_batch import Batch, TrainingData
from epctl.runtime.engine import create_engine
from epctl.runtime.events import EventLog
from epctl.runtime.mesh import Mesh
from epctl.runtime.native_config import cut_depth
from epctl.runtime.run_settings import rows_per_step
from epctl.runtime.train import build, finish_rank, open_data, start_rank
from epctl.runtime.training_model import TrainingModel, open_training_model

REPORT_NAME = "check.json"
WEIGHTS_NAME = "reference.safetensors"
GRADIENTS_NAME = "reference-gradients.safetensors"


def check(run_folder: Path) -> None:
    """Writes `check.json` and an event with the same content; every rank calls it."""
    config = ResolvedConfig.from_json((run_folder / "config.json").read_text("utf-8")).config
    device, mesh = start_rank(config)
    events = EventLog(run_folder, mesh.rank)
    events.write("start", ranks=mesh.num_ranks, torch=torch.__version__)
    model = open_cut_model(config, run_folder)
    data = open_data(config, run_folder, mesh, model, events)
    reference = reference_on_rank_0(config, mesh, model, data, device, run_folder)
    result = compare_asked(config, mesh, model, data, device, events, run_folder, reference)
    events.write("check", **result)
    finish_rank(events)
    if mesh.rank == 0:  # 6 bytes a parameter
        for name in (WEIGHTS_NAME, GRADIENTS_NAME):
            (run_folder / name).unlink()


def open_cut_model(config: RunConfig, run_folder: Path) -> TrainingModel:
    """Returns the model, with its first layers only if the check asks for that.

    Raises ConfigError if no layer with experts is left.
    """
    model = open_training_model(config, run_folder)
    kept = cut_depth(model.config, config.check.num_layers)
    num_dense = min(model.moe.layers) if model.moe is not None else 0
    if kept <= num_dense:
        raise ConfigError(
            f"`--check-layers {kept}` leaves no experts: the first {num_dense} layers are dense",
            hint=f"use `--check-layers {num_dense + 1}` or more",
        )
    return model


def reference_on_rank_0(
    config: RunConfig,
    mesh: Mesh,
    model: TrainingModel,
    data: TrainingData,
    device: torch.device,
    folder: Path,
) -> Reference | None:
    """Trains the unsharded model on rank 0, which keeps its record and writes the rest to files."""
    reference = train_on_rank_0(config, mesh, model, data, device)
    if reference is not None:
        save_file(reference.weights, folder / WEIGHTS_NAME)
        save_file(reference.gradients, folder / GRADIENTS_NAME)
        reference.weights.clear()
        reference.gradients.clear()
    dist.barrier()
    return reference


def train_on_rank_0(
    config: RunConfig,
    mesh: Mesh,
    model: TrainingModel,
    data: TrainingData,
    device: torch.device,
    **asked: Any,
) -> Reference | None:
    """Trains the unsharded model on rank 0; None on the others. A collective.

    Args:
        asked: what else `run_reference` takes.
    """
    solo_group = dist.new_group([0])
    if mesh.rank != 0:
        return None
    steps = [list(global_batches(config, mesh, data, n)) for n in range(config.check.steps)]
    return run_reference(model, config, steps, device, solo_group, **asked)


def compare_asked(
    config: RunConfig,
    mesh: Mesh,
    model: TrainingModel,
    data: TrainingData,
    device: torch.device,
    events: EventLog,
    folder: Path,
    reference: Reference | None,
) -> dict[str, object]:
    """Trains as asked and returns the report; it is complete on rank 0 only."""
    module, ds_config = build(config, mesh, model, device, events)
    engine, optimizer, scheduler = create_engine(module, config, ds_config)
    run = AskedRun(engine, optimizer, scheduler, config, mesh)
    steps = [list(rank_batches(config, mesh, data, n)) for n in range(config.check.steps)]
    choices_LTK = run.choices(steps[0])
    with safe_open(folder / GRADIENTS_NAME, framework="pt") as gradients:
        records, agreements = run.run(steps, gradients)
        directions = cosines(agreements, gradients) if mesh.rank == 0 else {}
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as weights:
        squares = run.weight_squares(weights)
    seams.release_engine(engine)
    if reference is None:
        return {}
    tolerance = TOLERANCES[device.type]
    rows = step_rows(reference.steps, records, tolerance)
    rows += direction_rows(directions, tolerance)
    if choices_LTK is not None and reference.choices_LTK is not None:
        rows.append(choice_row(reference.choices_LTK, choices_LTK, tolerance))
    rows += weight_rows(squares, len(steps), tolerance)
    result = report(rows, _facts(config, mesh, model))
    (folder / REPORT_NAME).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _facts(config: RunConfig, mesh: Mesh, model: TrainingModel) -> dict[str, object]:
    return {
        "model": model.name,
        "num_layers": model.num_layers,
        "num_ranks": mesh.num_ranks,
        "ep": mesh.ep_size,
        "sp": mesh.sp_size,
        "zero": config.parallel.zero,
        "optimizer": config.optim.name,
    }


def global_batches(config: RunConfig, mesh: Mesh, data: TrainingData, step: int) -> Iterator[Batch]:
    """Yields the micro-batches of all places with samples of their own, by micro-step."""
    train = config.train
    first = step * rows_per_step(train, mesh.num_data_ranks)
    for place in range(train.gradient_accumulation_steps * mesh.num_data_ranks):
        yield data.train_batch(first + place * train.micro_batch_size, train.micro_batch_size)


def rank_batches(config: RunConfig, mesh: Mesh, data: TrainingData, step: int) -> Iterator[Batch]:
    """Yields this rank's share of them; ranks of one sample have the same."""
    for place, batch in enumerate(global_batches(config, mesh, data, step)):
        if place % mesh.num_data_ranks == mesh.data_rank:
            yield batch
