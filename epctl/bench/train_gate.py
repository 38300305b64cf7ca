"""The gate of `epctl bench train`: losses, norms, choices and weights against the whole model.

The comparison of `epctl train --check` (runtime/check.py): transformers' own blocks on one rank in
float32. Where bfloat16 is timed, that engine's losses and its first gradient are held against the
whole model, too, whose weights are rounded as the engine's are and everything else in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from epctl.bench.train_engines import Order, open_epctl, with_changes
from epctl.bench.train_routing import RoutingControl
from epctl.config import RunConfig
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import meta_model
from epctl.runtime.check import (
    compare_asked,
    rank_batches,
    reference_on_rank_0,
    train_on_rank_0,
)
from epctl.runtime.check_directions import WHOLE, DirectionObserver, cosines
from epctl.runtime.check_reference import Reference
from epctl.runtime.data_batch import Batch
from epctl.runtime.events import EventLog
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe_blocks import moe_layout
from epctl.runtime.native_config import native_config, text_config
from epctl.runtime.training_model import TrainingModel
from epctl.runtime.weights import DeviceWeights

Rows = list[tuple[str, float, float]]  # quantity, difference, tolerance

# Of a loss, relative, in every step; and what the cosine of the first gradient may lack of one: all
# of it, and parts, which may be a thousandth of it. Those are for what points elsewhere: in
# bfloat16 scores may come in another order, which alone turned a router's gradient by 0.05.
BFLOAT16_TOLERANCE = 2e-3
BFLOAT16_DIRECTION = 1e-3
BFLOAT16_PART = 0.3
BFLOAT16_GRADIENTS = "reference-gradients-bfloat16.safetensors"
BFLOAT16_RATES: Mapping[str, float] = {"muon": 1e-4, "adamw": 3e-5}
# Of many steps at real widths: at the rates above, twenty learn the batch by heart, and what is
# left of its loss is as uncertain as weights of eight significant bits are (transformers' own model
# in bfloat16 was 1.3e-2 from float32, on an H200: benchmarks/train_h200x2_202611.md). Of few steps
# these would show nothing: AdamW's first moves such a loss by half of the tolerance.
SLOW_RATES: Mapping[str, float] = {"muon": 2e-5, "adamw": 5e-6}
MANY_STEPS, WIDE = 5, 1024
# Once less than this of the first loss is left, differences are shares of the first loss.
LEARNT = 0.5


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
    bfloat16_steps: int,
) -> dict[str, Any]:
    """Returns the report of rank 0: `ok`, the worst row and the errors. A collective.

    Args:
        values: config.json of the model, at the gate's depth.
        config: a case's settings in float32.
        bfloat16_steps: steps to compare in bfloat16, none if the case is not timed in it.
    """
    mesh = seams.create_mesh(config.parallel.ep)
    model = training_model(values, config.train.seed)
    num_rows = config.train.micro_batch_size * mesh.num_ranks
    data = OneBatch(model.config.vocab_size, config.train.sequence_length, num_rows)
    reference = reference_on_rank_0(config, mesh, model, data, device, folder)
    events = EventLog(folder, mesh.rank)
    document: Any = compare_asked(config, mesh, model, data, device, events, folder, reference)
    events.close()
    rows: Rows = [
        (r["quantity"], r["difference"], r["tolerance"]) for r in document.get("rows", [])
    ]
    whole: list[float] = []
    losses: list[float] = []
    if bfloat16_steps:
        longer = _bfloat16_config(config, bfloat16_steps, model)
        whole = _stored_losses(longer, mesh, model, data, device, folder)
        losses, directions = _bfloat16_steps(values, longer, model, device, data, folder)
        rows += _bfloat16_rows(whole, losses, directions)
    report = [_summary(rows, reference, whole, losses) if reference is not None else {}]
    dist.broadcast_object_list(report, src=0, device=device)
    return report[0]


def training_model(values: Mapping[str, Any], seed: int) -> TrainingModel:
    """Returns the model with fresh weights, as the check wants it; it has no tokenizer."""
    config = native_config(values)
    moe = moe_layout(meta_model(config, torch.bfloat16), config)
    return TrainingModel("bench", config, DeviceWeights(seed), None, moe)


def _bfloat16_config(config: RunConfig, num_steps: int, model: TrainingModel) -> RunConfig:
    rate = bfloat16_rate(config.optim.name, num_steps, int(text_config(model.config).hidden_size))
    config = with_changes(config, "optim", lr=rate)
    config = with_changes(config, "train", precision="bfloat16")
    return with_changes(config, "check", steps=num_steps)


def bfloat16_rate(optim: str, num_steps: int, hidden_size: int) -> float:
    """Returns the learning rate of the steps that are compared in bfloat16."""
    slow = num_steps > MANY_STEPS and hidden_size >= WIDE
    return (SLOW_RATES if slow else BFLOAT16_RATES)[optim]


def _stored_losses(
    config: RunConfig,
    mesh: Mesh,
    model: TrainingModel,
    data: OneBatch,
    device: torch.device,
    folder: Path,
) -> list[float]:
    """Returns rank 0's losses of the whole model whose weights are rounded to bfloat16.

    At real widths most of AdamW's first updates are smaller than that rounding: a bfloat16 engine
    does not see them, and its second loss is not that of float32 weights. In the first step an even
    table chooses experts, here and in the engine: where scores are close, bfloat16 sends a few
    tokens elsewhere, and a gradient cannot be compared with that of other choices. A collective,
    after which that step's gradients are in `folder`.
    """
    controls: list[RoutingControl] = []

    def before_step(module: nn.Module, number: int) -> None:
        if number == 0:
            controls.append(_control(module, model, device))
        controls[0].balanced = number == 0

    reference = train_on_rank_0(
        config, mesh, model, data, device, stored_dtype=torch.bfloat16, before_step=before_step
    )
    if reference is not None:
        save_file(reference.gradients, folder / BFLOAT16_GRADIENTS)
    dist.barrier()
    return [] if reference is None else [step.loss for step in reference.steps]


def _bfloat16_steps(
    values: Mapping[str, Any],
    config: RunConfig,
    model: TrainingModel,
    device: torch.device,
    data: OneBatch,
    folder: Path,
) -> tuple[list[float], dict[str, float]]:
    """Returns the losses of the gate's steps in bfloat16, and on rank 0 its first directions."""
    trainee = open_epctl(Order(values, config, device))
    mesh = seams.create_mesh(config.parallel.ep)
    optimizer, losses = seams.client_optimizer(trainee.engine), []
    control = _control(trainee.engine.module, model, device)
    with safe_open(folder / BFLOAT16_GRADIENTS, framework="pt") as gradients:
        observer = DirectionObserver(trainee.engine, mesh, gradients)
        hook = optimizer.register_step_pre_hook(observer)
        for number in range(config.check.steps):
            control.balanced = number == 0
            losses.append(trainee.step(list(rank_batches(config, mesh, data, number)))[0])
            hook.remove()
        found = observer.take()
        directions = cosines(found, gradients) if mesh.rank == 0 else {}
    trainee.close()
    return losses, directions


def _control(module: nn.Module, model: TrainingModel, device: torch.device) -> RoutingControl:
    assert model.moe is not None
    return RoutingControl(module, model.moe.num_experts, device)


def _bfloat16_rows(
    expected: list[float], losses: list[float], directions: Mapping[str, float]
) -> Rows:
    """Returns the rows of rank 0; the others know nothing to expect."""
    rows: Rows = []
    if not expected:
        return rows
    for part, cosine in sorted(directions.items()):
        tolerance = BFLOAT16_DIRECTION if part == WHOLE else BFLOAT16_PART
        rows.append((f"bfloat16 gradient direction of {part}, step 1", 1 - cosine, tolerance))
    whole = num_unlearnt(expected)
    for number, (left, right) in enumerate(zip(expected, losses, strict=True), start=1):
        share = "" if number <= whole else " over the first"
        error = abs(right - left) / (expected[0] if share else left)
        name = f"bfloat16 loss, step {number}{share} ({right:.4f}, of the whole model {left:.4f})"
        rows.append((name, error, BFLOAT16_TOLERANCE))
    return rows


def num_unlearnt(losses: list[float]) -> int:
    """Returns how many steps come before the one whose loss shows the batch as learnt."""
    learnt = (number for number, loss in enumerate(losses) if loss < LEARNT * losses[0])
    return next(learnt, len(losses))


def _summary(
    rows: Rows, reference: Reference, whole: list[float], losses: list[float]
) -> dict[str, Any]:
    """Returns whether all is within its tolerance, the worst row, and the errors for the rows."""
    worst = max(rows, key=lambda row: math.inf if math.isnan(row[1]) else row[1] / row[2])
    signs = {
        "loss": ("loss, step",),
        "norm": ("gradient norm", "gradient of"),
        "direction": ("gradient direction",),
        "weights": ("weights of",),
        "bfloat16_loss": ("bfloat16 loss",),
        "bfloat16_direction": (f"bfloat16 gradient direction of {WHOLE}",),
        "bfloat16_parts": ("bfloat16 gradient",),
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
        "bfloat16_losses": {"whole": whole, "epctl": losses, "unlearnt": num_unlearnt(whole)},
    }
