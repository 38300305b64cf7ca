"""The gate of `epctl bench train`: losses, norms, choices and weights against the whole model.

The comparison of `epctl train --check` (runtime/check.py): transformers' own blocks on one rank in
float32. Where bfloat16 is timed, that engine's losses are held against the whole model, too, its
weights rounded as the engine's are and everything else in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.bench.train_engines import Order, open_epctl
from epctl.config import RunConfig
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import meta_model
from epctl.runtime.check import (
    compare_asked,
    rank_batches,
    reference_on_rank_0,
    train_on_rank_0,
)
from epctl.runtime.check_reference import Reference
from epctl.runtime.data_batch import Batch
from epctl.runtime.events import EventLog
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe_blocks import moe_layout
from epctl.runtime.native_config import native_config
from epctl.runtime.training_model import TrainingModel
from epctl.runtime.weights import DeviceWeights

# Of a loss, relative: five times what 14 steps of a bfloat16 run differed from another engine's.
BFLOAT16_TOLERANCE = 5e-3


class RandomTokens:
    """Token ids that depend on their global position alone: the same on any number of ranks."""

    num_train_rows: int | None = None

    def __init__(self, vocab_size: int, length: int, seed: int = 0) -> None:
        self.vocab_size, self.length, self.seed = vocab_size, length, seed

    def train_batch(self, first: int, count: int) -> Batch:
        rows = [self._row(first + number) for number in range(count)]
        return Batch.of_ids(torch.stack(rows))

    def held_out_batch(self, first: int, count: int) -> Batch:
        return self.train_batch(first, count)

    def prompt(self, num_tokens: int) -> list[int]:
        return [int(token) for token in self._row(0)[:num_tokens]]

    def prompt_inputs(self, num_tokens: int) -> dict[str, Any]:
        return {}

    def _row(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randint(0, self.vocab_size, (self.length,), generator=generator)


class OneBatch(RandomTokens):
    """The same rows every step: a loss that falls shows whether the updates are right."""

    def __init__(self, vocab_size: int, length: int, num_rows: int) -> None:
        super().__init__(vocab_size, length)
        self.num_rows = num_rows

    def _row(self, number: int) -> Tensor:
        return super()._row(number % self.num_rows)


def run_gate(
    values: Mapping[str, Any],
    config: RunConfig,
    device: torch.device,
    folder: Path,
    *,
    bfloat16: bool,
) -> dict[str, Any]:
    """Returns the report of rank 0: `ok`, the worst row and the errors. A collective.

    Args:
        values: config.json of the model, at the gate's depth.
        config: a case's settings in float32.
        bfloat16: the case itself is timed in bfloat16.
    """
    mesh = seams.create_mesh(config.parallel.ep)
    model = training_model(values, config.train.seed)
    num_rows = config.train.micro_batch_size * mesh.num_ranks
    data = OneBatch(model.config.vocab_size, config.train.sequence_length, num_rows)
    reference = reference_on_rank_0(config, mesh, model, data, device, folder)
    events = EventLog(folder, mesh.rank)
    document: Any = compare_asked(config, mesh, model, data, device, events, folder, reference)
    events.close()
    stored, losses = [], []
    if bfloat16:
        stored = _stored_losses(config, mesh, model, data, device)
        losses = _bfloat16_losses(values, config, device, data)
    pairs = list(zip(stored, losses, strict=False))  # only rank 0 has both
    report = [_summary(document, reference, pairs) if reference is not None else {}]
    dist.broadcast_object_list(report, src=0, device=device)
    return report[0]


def training_model(values: Mapping[str, Any], seed: int) -> TrainingModel:
    """Returns the model with fresh weights, as the check wants it; it has no tokenizer."""
    config = native_config(values)
    moe = moe_layout(meta_model(config, torch.bfloat16), config)
    return TrainingModel("bench", config, DeviceWeights(seed), None, moe)


def _stored_losses(
    config: RunConfig, mesh: Mesh, model: TrainingModel, data: OneBatch, device: torch.device
) -> list[float]:
    """Returns rank 0's losses of the whole model whose weights are rounded to bfloat16.

    At real widths most of AdamW's first updates are smaller than that rounding: a bfloat16 engine
    does not see them, and its second loss is not that of float32 weights. A collective.
    """
    reference = train_on_rank_0(config, mesh, model, data, device, stored_dtype=torch.bfloat16)
    return [] if reference is None else [step.loss for step in reference.steps]


def _bfloat16_losses(
    values: Mapping[str, Any], config: RunConfig, device: torch.device, data: OneBatch
) -> list[float]:
    """Returns the losses of the gate's steps in bfloat16."""
    timed = config.train.model_copy(update={"precision": "bfloat16"})
    config = config.model_copy(update={"train": timed})
    trainee = open_epctl(Order(values, config, device))
    mesh = seams.create_mesh(config.parallel.ep)
    steps = [list(rank_batches(config, mesh, data, n)) for n in range(config.check.steps)]
    losses = [trainee.step(batches)[0] for batches in steps]
    trainee.close()
    return losses


def _summary(
    document: Mapping[str, Any], reference: Reference, bfloat16: list[tuple[float, float]]
) -> dict[str, Any]:
    """Returns whether all is within its tolerance, the worst row, and the errors for the rows."""
    rows = [(row["quantity"], row["difference"], row["tolerance"]) for row in document["rows"]]
    for number, (expected, loss) in enumerate(bfloat16, start=1):
        error = abs(loss - expected) / expected
        rows.append((f"bfloat16 loss, step {number}", error, BFLOAT16_TOLERANCE))
    worst = max(rows, key=lambda row: math.inf if math.isnan(row[1]) else row[1] / row[2])
    signs = {
        "loss": "loss, step",
        "norm": "gradient",
        "weights": "weights of",
        "bfloat16_loss": "bfloat16",
    }
    errors = {
        name: max(found)
        for name, sign in signs.items()
        if (found := [error for quantity, error, _ in rows if quantity.startswith(sign)])
    }
    return {
        "ok": all(error <= tolerance for _, error, tolerance in rows),
        "worst": f"{worst[0]}: {worst[1]:.1e}, {worst[2]:.0e} allowed",
        "errors": errors,
        "losses": [step.loss for step in reference.steps],
    }
