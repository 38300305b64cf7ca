"""Muon for matrices and AdamW for the rest, as one client optimizer of DeepSpeed.

At ZeRO 1 to 3 `step()` sees float32 flat partitions whose gradient is already averaged, unscaled
and clipped *as the raw gradient*; Muon's orthogonalisation happens here, once an optimizer step.
The class is not named after Muon: DeepSpeed treats a client optimizer whose class name contains
that word as its own (zero/stage_1_and_2.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from epctl.kernels.newton_schulz import orthogonalize
from epctl.runtime.deepspeed_seams import FlatPartition, full_shape
from epctl.runtime.muon_exchange import (
    ExchangePlan,
    MatrixSlices,
    Piece,
    gather_to_owners,
    scatter_from_owners,
)

UpdateScale = Literal["match_rms_adamw", "original"]


def update_scale(num_rows: int, num_columns: int, rule: UpdateScale) -> float:
    """Returns the factor on an orthogonal update of a matrix.

    `match_rms_adamw` gives the update the RMS of a typical AdamW step, 0.2 (Moonlight, arXiv
    2502.16982, 2.2); `original` is sqrt(max(1, rows/columns)) (Jordan, 2024).
    """
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(num_rows, num_columns))
    return math.sqrt(max(1.0, num_rows / num_columns))


@dataclass
class _Wired:
    """A flat tensor, how it is cut, and the exchange plan of its matrices (Muon only)."""

    partition: FlatPartition
    plan: ExchangePlan | None


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps on flat partitions; parameter groups carry `kind`: "muon" or "adamw".

    Before `wire` it ignores `step()`: ZeRO-0 bf16 runs one with zero gradients in the engine's
    constructor, which would decay the loaded weights.
    """

    def __init__(
        self,
        parameter_groups: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        num_steps: int = 5,
        scale_rule: UpdateScale = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "kind": "adamw", "betas": betas, "eps": eps}
        super().__init__(list(parameter_groups), defaults)
        self.momentum = momentum
        self.nesterov = nesterov
        self.num_steps = num_steps
        self.scale_rule: UpdateScale = scale_rule
        self._wired: dict[int, _Wired] | None = None

    def wire(self, partitions: list[FlatPartition]) -> None:
        """Takes the layout of the tensors that `step()` will see and creates all state.

        Every rank creates every state tensor now: lazily created state differs between ranks and
        breaks DeepSpeed's state links at ZeRO-1/2 (mixed_precision_linkage.py).
        """
        self._wired = {}
        kinds = self._kinds()
        for partition in partitions:
            kind = kinds[id(_first_parameter(partition))]
            plan = _exchange_plan(partition) if kind == "muon" else None
            self._wired[id(partition.flat)] = _Wired(partition, plan)
            self._create_state(partition.flat, kind)

    def remember_kinds(self) -> None:
        """Notes each Parameter's kind; the engine later swaps Parameters for flat tensors."""
        self._kind_of = {
            id(p): group["kind"] for group in self.param_groups for p in group["params"]
        }

    def _kinds(self) -> dict[int, str]:
        return self._kind_of

    def _create_state(self, flat: Tensor, kind: str) -> None:
        state = self.state[flat]
        if kind == "muon":
            state["momentum_buffer"] = torch.zeros_like(flat)
        else:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat)
            state["exp_avg_sq"] = torch.zeros_like(flat)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on whatever tensors the groups hold now (all, or one sub-group at a time)."""
        assert closure is None, "closures are not supported"
        if self._wired is None:
            return
        for group in self.param_groups:
            for flat in group["params"]:
                if group["kind"] == "muon":
                    self._step_muon(flat, group)
                elif flat.grad is not None:
                    self._step_adamw(flat, group)

    def _step_adamw(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self.state[flat]
        beta1, beta2 = group["betas"]
        adamw(
            [flat],
            [flat.grad.to(flat.dtype)],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_muon(self, flat: Tensor, group: dict[str, Any]) -> None:
        assert self._wired is not None
        wired = self._wired[id(flat)]
        assert wired.plan is not None
        gradient = torch.zeros_like(flat) if flat.grad is None else flat.grad.to(flat.dtype)
        buffer = self.state[flat]["momentum_buffer"]
        buffer.lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp(buffer, self.momentum) if self.nesterov else buffer.clone()
        update = update.view(-1)
        process_group = wired.partition.process_group
        owned = gather_to_owners(update, wired.plan, process_group)
        self._orthogonalize(owned)
        scatter_from_owners(owned, update, wired.plan, process_group)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        flat.add_(update.view_as(flat), alpha=-group["lr"])

    def _orthogonalize(self, owned: dict[int, Tensor]) -> None:
        """Replaces each owned matrix by its scaled orthogonal factor, equal shapes in one batch."""
        by_shape: dict[torch.Size, list[int]] = {}
        for index, matrix in owned.items():
            by_shape.setdefault(matrix.shape, []).append(index)
        for shape, indices in by_shape.items():
            batch = torch.stack([owned[index] for index in indices])
            factor = update_scale(shape[0], shape[1], self.scale_rule)
            result = orthogonalize(batch, num_steps=self.num_steps) * factor
            for index, matrix in zip(indices, result, strict=True):
                owned[index] = matrix.contiguous()


def _first_parameter(partition: FlatPartition) -> nn.Parameter:
    return next(f.parameter for fragments in partition.fragments_by_rank for f in fragments)


def _exchange_plan(partition: FlatPartition) -> ExchangePlan:
    matrices = list(_matrices(partition))
    return ExchangePlan(partition.group_rank, len(partition.fragments_by_rank), matrices)


def _matrices(partition: FlatPartition) -> Iterable[MatrixSlices]:
    """Yields each matrix of a flat partition: a 2-D Parameter, or one expert of a stacked one."""
    parameters: dict[int, nn.Parameter] = {}
    fragments: dict[int, list[tuple[int, Any]]] = {}
    for rank, held in enumerate(partition.fragments_by_rank):
        for fragment in held:
            parameters.setdefault(id(fragment.parameter), fragment.parameter)
            fragments.setdefault(id(fragment.parameter), []).append((rank, fragment))
    for key, parameter in parameters.items():
        shape = full_shape(parameter)
        assert len(shape) in (2, 3), f"Muon got a {len(shape)}-D parameter {tuple(shape)}"
        size = shape[-2] * shape[-1]
        for first in range(0, shape.numel(), size):
            pieces = tuple(_pieces(fragments[key], first, first + size))
            yield MatrixSlices(shape[-2], shape[-1], pieces)


def _pieces(fragments: list[tuple[int, Any]], begin: int, end: int) -> Iterable[Piece]:
    for rank, fragment in fragments:
        low = max(begin, fragment.start)
        high = min(end, fragment.start + fragment.num_elements)
        if low < high:
            offset = fragment.offset + low - fragment.start
            yield Piece(rank, low - begin, high - low, offset)
