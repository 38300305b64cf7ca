"""From the flat partitions a rank steps on to the matrices in them, and one exchange plan a unit.

A unit is what enters one exchange together: a flat partition at ZeRO 1 to 3; at ZeRO-0, where each
Parameter is a tensor of its own and all ranks hold all, every matrix of a process group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.launch.memory_step import MUON_CHUNK_ELEMENTS
from epctl.runtime.deepspeed_seams import FlatPartition, full_shape, replica_group
from epctl.runtime.muon_exchange import (
    Chunk,
    MatrixSlices,
    Piece,
    plan_exchange,
)

# Rows of the matrices that a Parameter's rows (or each expert's) fall into, by the Parameter's id;
# a Parameter that is not in it is one matrix (one an expert).
RowBlocks = Mapping[int, tuple[int, ...]]


@dataclass
class MuonUnit:
    """Flat tensors, the matrices cut over them, and this rank's exchanges."""

    process_group: dist.ProcessGroup | None
    group_rank: int
    num_ranks: int
    replicated: bool
    flats: list[Tensor] = field(default_factory=list)
    matrices: list[MatrixSlices] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def num_owned(self) -> int:
        return sum(count for chunk in self.chunks for count in chunk.num_owned.values())

    def num_sent_bytes(self, update_dtype: torch.dtype) -> int:
        """Bytes this rank sends a step: slices in float32, updates in the iteration's dtype."""
        slices = sum(chunk.num_sent_slice_elements for chunk in self.chunks)
        updates = sum(chunk.num_sent_update_elements for chunk in self.chunks)
        return torch.float32.itemsize * slices + update_dtype.itemsize * updates


def plan_units(
    partitions: Sequence[FlatPartition],
    row_blocks: RowBlocks,
    chunk_elements: int = MUON_CHUNK_ELEMENTS,
) -> list[MuonUnit]:
    """Returns the units of partitions of Muon parameters, the same order on all ranks of a group.

    The load of owners is carried from unit to unit of a group, so many small partitions balance
    as well as one large one.
    """
    units: list[MuonUnit] = []
    merged: dict[int, MuonUnit] = {}
    for partition in partitions:
        unit = _new_unit(partition)
        if unit.replicated:
            key = id(unit.process_group)
            unit = merged.setdefault(key, unit)
        if not any(unit is known for known in units):
            units.append(unit)
        tensor = len(unit.flats)
        unit.flats.append(partition.flat)
        unit.matrices.extend(_matrices(partition, unit, tensor, row_blocks))
    loads: dict[int, list[int]] = {}
    for unit in units:
        load = loads.setdefault(id(unit.process_group), [0] * unit.num_ranks)
        unit.chunks = plan_exchange(
            unit.matrices, unit.group_rank, unit.num_ranks, load=load, chunk_elements=chunk_elements
        )
    return units


def first_parameter(partition: FlatPartition) -> nn.Parameter:
    """Returns a Parameter of the partition, this rank's or another's: all are of one kind."""
    return next(f.parameter for fragments in partition.fragments_by_rank for f in fragments)


def _new_unit(partition: FlatPartition) -> MuonUnit:
    if partition.process_group is not None:
        num_ranks = len(partition.fragments_by_rank)
        return MuonUnit(partition.process_group, partition.group_rank, num_ranks, replicated=False)
    group = replica_group(first_parameter(partition))
    if group is None:
        return MuonUnit(None, 0, 1, replicated=True)
    return MuonUnit(group, dist.get_rank(group), dist.get_world_size(group), replicated=True)


def _matrices(
    partition: FlatPartition, unit: MuonUnit, tensor: int, row_blocks: RowBlocks
) -> Iterator[MatrixSlices]:
    """Yields each matrix: a 2-D Parameter, one expert of a stack, or a block of their rows."""
    parameters: dict[int, nn.Parameter] = {}
    pieces: dict[int, list[Piece]] = {}
    by_rank = partition.fragments_by_rank * (unit.num_ranks if unit.replicated else 1)
    for rank, fragments in enumerate(by_rank):
        for f in fragments:
            parameters.setdefault(id(f.parameter), f.parameter)
            piece = Piece(rank, f.start, f.num_elements, f.offset, tensor)
            pieces.setdefault(id(f.parameter), []).append(piece)
    for key, parameter in parameters.items():
        ranges = matrix_ranges(full_shape(parameter), row_blocks.get(key))
        for begin, num_rows, num_columns in ranges:
            end = begin + num_rows * num_columns
            cut = tuple(_cut(pieces[key], begin, end))
            yield MatrixSlices(num_rows, num_columns, cut, unit.replicated)


def matrix_ranges(
    shape: Sequence[int], blocks: tuple[int, ...] | None
) -> Iterator[tuple[int, int, int]]:
    """Yields (first element, rows, columns) of each matrix of a 2-D or stacked 3-D Parameter."""
    assert len(shape) in (2, 3), f"Muon got a {len(shape)}-D parameter {tuple(shape)}"
    num_rows, num_columns = shape[-2:]
    blocks = blocks or (num_rows,)
    assert sum(blocks) == num_rows, f"blocks of {sum(blocks)} rows for {num_rows}"
    begin = 0
    for _ in range(shape[0] if len(shape) == 3 else 1):
        for rows in blocks:
            yield begin, rows, num_columns
            begin += rows * num_columns


def _cut(pieces: list[Piece], begin: int, end: int) -> Iterator[Piece]:
    """Yields what of `[begin, end)` of a Parameter its pieces hold, as pieces of that range."""
    for piece in pieces:
        low = max(begin, piece.start)
        high = min(end, piece.start + piece.num_elements)
        if low < high:
            offset = piece.offset + low - piece.start
            yield Piece(piece.rank, low - begin, high - low, offset, piece.tensor)
