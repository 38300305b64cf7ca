"""One Muon step over units: exchanges are under way while matrices are orthogonalised.

Chunk after chunk, every rank of a group in the same order: the next chunk's slices are sent, this
one's matrices are orthogonalised, its updates are sent, and the chunk before gets its updates. So
at most two chunks' buffers exist, and nothing here waits on the host for the GPU, except where
masters are in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epctl.kernels.newton_schulz import iteration_dtype
from epctl.runtime.muon_exchange import (
    Batches,
    Chunk,
    Piece,
    Run,
    SlicesToOwners,
    UpdatesFromOwners,
    part_of,
    piece_of,
    run_of,
)
from epctl.runtime.muon_plan import MuonUnit
from epctl.runtime.muon_rule import MuonRule

# Elements from which on reading a run again takes longer than launching a kernel of its own.
LARGE = 2**22


@dataclass
class UnitStep:
    """A unit and what this step does to it; lists go with the unit's flat tensors.

    Attributes:
        gradients: flat float32 tensors that are turned into directions in place; or of another
            dtype and left as they are, where every matrix is whole at home.
        buffers: momentum.
        divisor: of the gradients, one element; None is one.
        copies: what the model computes with, written with the masters; None for none at all.
        squares: of directions, by the id of their run, once they are mixed.
    """

    unit: MuonUnit
    gradients: list[Tensor]
    buffers: list[Tensor]
    rates: list[float]
    decays: list[float]
    divisor: Tensor | None = None
    copies: list[Tensor | None] | None = None
    squares: dict[int, Tensor | None] = field(default_factory=dict)

    def copy_of(self, tensor: int, offset: int, num_elements: int) -> Tensor | None:
        """Returns the elements of a copy that a master's at `offset` go to, if there is one."""
        copy = None if self.copies is None else self.copies[tensor]
        return None if copy is None else copy.view(-1).narrow(0, offset, num_elements)


def step_units(steps: Sequence[UnitStep], rule: MuonRule, device: torch.device) -> None:
    """Folds gradients into momentum and updates the masters of every unit, in place.

    Args:
        device: where matrices are orthogonalised.
    """
    gathered = _start(steps, rule, device)
    current = next(gathered, None)
    before: tuple[UnitStep, Chunk, UpdatesFromOwners] | None = None
    while current is not None:
        step, chunk, slices = current
        following = next(gathered, None)  # its slices travel while this chunk is worked on
        owned = _owned(step, chunk, slices, rule, device)
        rule.orthogonalize_(*owned.values())
        dtype = iteration_dtype(device)
        updates = UpdatesFromOwners(owned, chunk, dtype, step.unit.process_group, device)
        _apply_at_home(step, chunk, owned, rule)
        if before is not None:
            _apply_received(*before, rule)
        before = (step, chunk, updates)
        current = following
        del owned, slices
    if before is not None:
        _apply_received(*before, rule)


def _start(
    steps: Sequence[UnitStep], rule: MuonRule, device: torch.device
) -> Iterator[tuple[UnitStep, Chunk, SlicesToOwners]]:
    for step in steps:
        step.squares = _mix(step, rule)
        group = step.unit.process_group
        for chunk in step.unit.chunks:
            yield step, chunk, SlicesToOwners(step.gradients, chunk, group, device)


def _mix(step: UnitStep, rule: MuonRule) -> dict[int, Tensor | None]:
    """Turns gradients into directions; returns the squares of those of large runs, by the run."""
    runs = [run for chunk in step.unit.chunks for run in chunk.runs if run.num_elements >= LARGE]
    squares: dict[int, Tensor | None] = {}
    for tensor, (gradient, buffer) in enumerate(zip(step.gradients, step.buffers, strict=True)):
        if gradient.dtype != torch.float32:
            continue  # what will be the direction takes memory: by the chunk
        begin, flat, average = 0, gradient.view(-1), buffer.view(-1)
        for run in sorted((r for r in runs if r.tensor == tensor), key=lambda r: r.offset):
            rule.mix_momentum_(flat[begin : run.offset], average[begin : run.offset], step.divisor)
            squares[id(run)] = rule.mix_matrices_(*_matrices(step, run), step.divisor)
            begin = run.offset + run.num_elements
        rule.mix_momentum_(flat[begin:], average[begin:], step.divisor)
    return squares


def _matrices(step: UnitStep, run: Run) -> tuple[Tensor, Tensor]:
    """Returns gradients and momentum of a run, [B, M, N]."""
    shape = run.count, *run.shape
    return run_of(step.gradients, run).view(shape), run_of(step.buffers, run).view(shape)


def _normalize_run(step: UnitStep, run: Run, target_BMN: Tensor, rule: MuonRule) -> None:
    source_BMN, momentum_BMN = _matrices(step, run)
    squares_BS = step.squares.get(id(run))
    if source_BMN.dtype != torch.float32:
        mixed_BMN = torch.empty_like(source_BMN, dtype=torch.float32)
        squares_BS = rule.mix_matrices_(source_BMN, momentum_BMN, step.divisor, mixed_BMN)
        source_BMN = mixed_BMN
    rule.normalize_into(source_BMN, target_BMN, squares_BS)


def _owned(
    step: UnitStep, chunk: Chunk, slices: SlicesToOwners, rule: MuonRule, device: torch.device
) -> Batches:
    """Returns what this rank owns of a chunk, normalised, in the dtype of the iteration."""
    dtype = iteration_dtype(device)
    owned = {
        shape: torch.empty(count, *shape, dtype=dtype, device=device)
        for shape, count in chunk.num_owned.items()
    }
    for run in chunk.runs:
        target_BMN = owned[run.shape][run.index : run.index + run.count]
        _normalize_run(step, run, target_BMN, rule)
    for shape, batch_BMN in slices.assemble().items():
        assert len(batch_BMN) == len(chunk.assembled[shape])
        for place, index, count in consecutive(chunk.assembled[shape]):
            target_BMN = owned[shape][index : index + count]
            rule.normalize_into(batch_BMN[place : place + count], target_BMN)
    return owned


def consecutive(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yields (place, first number, count) of each stretch in which they go up by one."""
    begin = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield begin, numbers[begin], place - begin
            begin = place


def _apply_at_home(step: UnitStep, chunk: Chunk, owned: Batches, rule: MuonRule) -> None:
    for run in chunk.runs:
        factor = owned[run.shape][run.index : run.index + run.count].view(-1)
        weight, tensor = run_of(step.unit.flats, run), run.tensor
        copy = step.copy_of(tensor, run.offset, run.num_elements)
        rule.apply_(weight, factor, run.shape, step.rates[tensor], step.decays[tensor], copy)
    for entry in chunk.at_home:
        _apply(step, entry.piece, part_of(owned, entry), entry.shape, rule)


def _apply_received(
    step: UnitStep, chunk: Chunk, updates: UpdatesFromOwners, rule: MuonRule
) -> None:
    for (shape, piece), factor in updates.received():
        _apply(step, piece, factor, shape, rule)


def _apply(
    step: UnitStep, piece: Piece, factor: Tensor, shape: tuple[int, int], rule: MuonRule
) -> None:
    tensor = piece.tensor
    weight = piece_of(step.unit.flats, piece)
    copy = step.copy_of(tensor, piece.offset, piece.num_elements)
    rule.apply_(weight, factor, shape, step.rates[tensor], step.decays[tensor], copy)
