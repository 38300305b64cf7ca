"""Muon for matrices and AdamW for the rest, as one client optimizer of DeepSpeed.

At every ZeRO stage `step()` sees float32 tensors whose gradient is already averaged; what clipping
and unscaling divide it by, *as the raw gradient*, comes with it (`divide_gradients_by`). Muon's
orthogonalisation happens here, once an optimizer step. The
class is not named after Muon: DeepSpeed treats a client optimizer whose class name contains that
word as its own (zero/stage_1_and_2.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from epctl.kernels.adamw import AdamWRule, adamw_step_
from epctl.kernels.newton_schulz import iteration_dtype
from epctl.launch.memory_step import MUON_CHUNK_ELEMENTS
from epctl.runtime.attention_logits import AttentionLogits
from epctl.runtime.deepspeed_seams import FlatPartition, full_shape
from epctl.runtime.muon_plan import MuonUnit, RowBlocks, first_parameter, plan_units
from epctl.runtime.muon_rule import MuonRule
from epctl.runtime.muon_step import UnitStep, step_units


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps on flat partitions; parameter groups carry `kind`: "muon" or "adamw".

    Before `wire` it ignores `step()`: ZeRO-0 bf16 runs one with zero gradients in the engine's
    constructor, which would decay the loaded weights.

    Args:
        parameter_groups: torch parameter groups, each with `name`, `kind`, `lr`, `weight_decay`.
        rule: the Muon update.
        row_blocks: Parameters whose rows fall into several matrices, by id.
        betas: of AdamW.
        eps: of AdamW.
        chunk_elements: bound on what a rank orthogonalises at once.
    """

    def __init__(
        self,
        parameter_groups: Iterable[dict[str, Any]],
        *,
        rule: MuonRule | None = None,
        row_blocks: RowBlocks | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        chunk_elements: int = MUON_CHUNK_ELEMENTS,
    ) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "kind": "adamw", "betas": betas, "eps": eps}
        super().__init__(list(parameter_groups), defaults)
        self.rule = rule or MuonRule()
        self._row_blocks = dict(row_blocks or {})
        self._chunk_elements = chunk_elements
        # Noted now: the engine later swaps Parameters for flat tensors.
        self._kind_of = {
            id(p): group["kind"] for group in self.param_groups for p in group["params"]
        }
        self._device = torch.device("cpu")
        self._partitions: dict[int, FlatPartition] | None = None
        self._copies: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._units: list[MuonUnit] = []
        self._row_factors: dict[int, Tensor] = {}
        self._skips_steps = False
        self._divisor: Tensor | None = None
        self.attention_logits: AttentionLogits | None = None

    def wire(
        self,
        partitions: list[FlatPartition],
        device: torch.device | None = None,
        copies: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Takes the layout of the tensors that `step()` will see and creates all state.

        Every rank creates every state tensor now: lazily created state differs between ranks and
        breaks DeepSpeed's state links at ZeRO-1/2 (mixed_precision_linkage.py).

        Args:
            partitions: of every tensor, in the same order on all ranks of a group.
            device: where matrices are orthogonalised, if not where the partitions are.
            copies: what the model computes with, by the id of its partition's flat tensor: written
                by every step, as ZeRO does of those that are not in it.
        """
        self._copies = dict(copies or {})
        self._device = device or partitions[0].flat.device
        self.rule.passes(self._device)  # what cannot run is refused before the first step
        self._partitions = {id(partition.flat): partition for partition in partitions}
        kinds = [self._kind_of[id(first_parameter(p))] for p in partitions]
        on_muon = [p for p, kind in zip(partitions, kinds, strict=True) if kind == "muon"]
        self._units = plan_units(on_muon, self._row_blocks, self._chunk_elements)
        for partition, kind in zip(partitions, kinds, strict=True):
            self._create_state(partition.flat, kind)
        self._assert_nothing_lost(on_muon)

    def _assert_nothing_lost(self, on_muon: list[FlatPartition]) -> None:
        """Every element classified for Muon is in exactly one matrix of one unit."""
        parameters = {
            id(f.parameter): f.parameter
            for partition in on_muon
            for fragments in partition.fragments_by_rank
            for f in fragments
        }
        missing = {key for key, kind in self._kind_of.items() if kind == "muon"} - set(parameters)
        assert not missing, f"{len(missing)} Muon parameters are in no partition"
        classified = sum(full_shape(p).numel() for p in parameters.values())
        planned = sum(matrix.num_elements for unit in self._units for matrix in unit.matrices)
        assert planned == classified, f"{planned} of {classified} Muon elements are in a matrix"

    def _create_state(self, flat: Tensor, kind: str) -> None:
        state = self.state[flat]
        if kind == "muon":
            dtype = self.rule.momentum_dtype
            state["momentum_buffer"] = torch.zeros_like(flat, dtype=dtype)
        else:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat)
            state["exp_avg_sq"] = torch.zeros_like(flat)

    def skip_steps(self, skip: bool) -> None:
        """Says whether `step()` is to do nothing until it is said otherwise.

        Momentum folds a gradient in for ever, so an overflow or a spike must not reach it. One
        step of the engine calls `step()` once for each group or sub-group.
        """
        self._skips_steps = skip

    def divide_gradients_by(self, divisor: Tensor | None) -> None:
        """Says what gradients are divided by as they are read, until it is said otherwise.

        So clipping and unscaling take no pass of their own over all gradients.

        Args:
            divisor: float32, one element, on any device; None is one.
        """
        self._divisor = divisor

    def take_gradient(self, flat: Tensor, gradient: Tensor | None) -> None:
        """Says what the gradient of a flat tensor is, in place of its `grad`; None is that again.

        Args:
            gradient: as many elements, of any floating dtype (`grad` can only be float32), of a
                tensor that this rank alone holds.
        """
        if gradient is None:
            self._gradients.pop(id(flat), None)
        else:
            self._gradients[id(flat)] = gradient

    def gradient_of(self, flat: Tensor) -> Tensor | None:
        """Returns what the next step takes for a flat tensor's gradient, not yet divided."""
        return self._gradients.get(id(flat), flat.grad)

    @property
    def divisor(self) -> float:
        """What gradients are divided by as they are read; the host waits for it."""
        return 1.0 if self._divisor is None else float(self._divisor)

    def scale_rows_after_step(self, factors: Mapping[int, Tensor]) -> None:
        """Multiplies rows of Parameters (by id: one float32 factor a row) after the next step."""
        self._row_factors = dict(factors)

    @property
    def num_owned_matrices(self) -> int:
        """Matrices this rank orthogonalises in a step."""
        return sum(unit.num_owned for unit in self._units)

    @property
    def num_matrices(self) -> int:
        """Matrices this rank holds a piece of or shares a group with."""
        return sum(len(unit.matrices) for unit in self._units)

    @property
    def num_sent_bytes(self) -> int:
        """Bytes this rank sends to other ranks in a step, slices and updates."""
        dtype = iteration_dtype(self._device)
        return sum(unit.num_sent_bytes(dtype) for unit in self._units)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on whatever tensors the groups hold now (all, or one sub-group at a time)."""
        assert closure is None, "closures are not supported"
        if self._partitions is None:
            return
        if self._skips_steps:
            return
        groups = {id(flat): group for group in self.param_groups for flat in group["params"]}
        steps = [
            self._unit_step(unit, [groups[id(flat)] for flat in unit.flats])
            for unit in self._units
            if id(unit.flats[0]) in groups
        ]
        step_units(steps, self.rule, self._device)
        for group in self.param_groups:
            for flat in group["params"]:
                gradient = self.gradient_of(flat)
                if group["kind"] == "adamw" and gradient is not None:
                    self._step_adamw(flat, gradient, group)
                self._scale_rows(flat)

    def _step_adamw(self, flat: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One pass over gradient, master, both moments and what the model computes with."""
        state = self.state[flat]
        state["step"] += 1  # counted on the host
        beta1, beta2 = group["betas"]
        adamw_step_(
            flat,
            gradient.detach().contiguous(),
            state["exp_avg"],
            state["exp_avg_sq"],
            AdamWRule(
                step=int(state["step"]),
                rate=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                decay=group["weight_decay"],
            ),
            divisor=self._divisor,
            copy_P=self._copy_of(flat),
            implementation=self.rule.passes(flat.device),
        )

    def _copy_of(self, flat: Tensor) -> Tensor | None:
        return self._copies.get(id(flat))

    def _unit_step(self, unit: MuonUnit, groups: list[dict[str, Any]]) -> UnitStep:
        return UnitStep(
            unit,
            gradients=[self._gradient(flat) for flat in unit.flats],
            buffers=[self.state[flat]["momentum_buffer"] for flat in unit.flats],
            rates=[group["lr"] for group in groups],
            decays=[group["weight_decay"] for group in groups],
            divisor=self._divisor,
            copies=[self._copy_of(flat) for flat in unit.flats],
        )

    def _gradient(self, flat: Tensor) -> Tensor:
        """Returns the gradient in float32, which the step writes Muon's direction over.

        Without one (an expert no token reached) it is zero: the momentum goes on alone. One that
        was handed in stays in its dtype.
        """
        gradient = self.gradient_of(flat)
        if id(flat) not in self._gradients:
            gradient = (torch.zeros_like(flat) if gradient is None else gradient).float()
        assert gradient is not None
        return gradient.detach().contiguous()

    def _scale_rows(self, flat: Tensor) -> None:
        assert self._partitions is not None
        if not self._row_factors:
            return
        partition = self._partitions[id(flat)]
        for fragment in partition.fragments_by_rank[partition.group_rank]:
            factors = self._row_factors.pop(id(fragment.parameter), None)
            if factors is not None:
                num_columns = full_shape(fragment.parameter).numel() // factors.numel()
                end = fragment.start + fragment.num_elements
                every = factors.repeat_interleave(num_columns)[fragment.start : end]
                part = flat.view(-1).narrow(0, fragment.offset, fragment.num_elements)
                part.mul_(every.to(part.device))
                copy = self._copy_of(flat)
                if copy is not None:
                    copy.view(-1).narrow(0, fragment.offset, fragment.num_elements).copy_(part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads state; torch casts it to the parameters' float32, so momentum is cast back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "momentum_buffer" in state:
                buffer = state["momentum_buffer"]
                state["momentum_buffer"] = buffer.to(self.rule.momentum_dtype)
