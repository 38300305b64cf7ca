"""Optimizer state by global tensor name and slice, whatever ZeRO stage and EP size hold it.

A stored tensor is `NAME.KEY[START]`: elements from START on of hub tensor NAME (one expert's
projection is a tensor of its own), KEY being `master`, `exp_avg`, `momentum_buffer` and so on.
Nothing in it depends on ranks, so any other layout finds its slices by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epctl.runtime.checkpoint_files import Entry
from epctl.runtime.checkpoint_reader import StateReader, slice_name
from epctl.runtime.deepspeed_seams import FlatPartition, Fragment, full_shape, is_expert_parameter
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import hub_tensors

MASTER = "master"
STEP = "step"


@dataclass(frozen=True)
class NamedRange:
    """Elements `[begin, end)` of a flattened Parameter are the whole of hub tensor `name`."""

    begin: int
    end: int
    name: str


@dataclass(frozen=True)
class Piece:
    """Elements from `start` on of hub tensor `name`, at `offset` of a flat partition."""

    name: str
    start: int
    num_elements: int
    offset: int


def named_ranges(model: nn.Module) -> dict[int, list[NamedRange]]:
    """Returns, by a Parameter's id, where each hub tensor lies in it; together they are all of it.

    An expert's gate and up rows in one live tensor are two hub tensors. Where they are woven into
    each other, the expert is one range under the first one's name.
    """
    ranges: dict[int, list[NamedRange]] = {}
    for tensor in hub_tensors(model):
        if not isinstance(tensor.tensor, nn.Parameter):
            continue
        woven = tensor.num_parts > 1 and (tensor.transposed or tensor.interleaved)
        if woven and tensor.part > 0:
            continue
        length = tensor.num_elements * (tensor.num_parts if woven else 1)
        experts = (tensor.local_expert or 0) * (1 if woven else tensor.num_parts)
        begin = (experts + tensor.part) * length
        found = ranges.setdefault(id(tensor.tensor), [])
        found.append(NamedRange(begin, begin + length, tensor.name))
    for parameter in model.parameters():
        found = ranges[id(parameter)]
        found.sort(key=lambda r: r.begin)
        ends = [0, *(r.end for r in found)]
        whole = full_shape(parameter).numel()
        assert [*(r.begin for r in found), whole] == ends, found
    return ranges


def pieces_of(
    fragments: Sequence[Fragment], ranges: Mapping[int, list[NamedRange]]
) -> Iterator[Piece]:
    """Yields what a rank's fragments are by name, cut where one expert ends and the next begins."""
    for fragment in fragments:
        end = fragment.start + fragment.num_elements
        for named in ranges[id(fragment.parameter)]:
            low, high = max(fragment.start, named.begin), min(end, named.end)
            if low < high:
                offset = fragment.offset + low - fragment.start
                yield Piece(named.name, low - named.begin, high - low, offset)


def own_slices(
    partitions: Sequence[FlatPartition],
    optimizer: torch.optim.Optimizer,
    ranges: Mapping[int, list[NamedRange]],
    mesh: Mesh,
) -> Iterator[tuple[Entry, Tensor]]:
    """Yields what this rank stores of masters and state: each element once over all ranks.

    Where nothing is partitioned, replicas take turns.
    """
    for index, partition in enumerate(partitions):
        if partition.process_group is None and not _is_my_turn(index, partition, mesh):
            continue
        tensors = flat_tensors(partition, optimizer)
        step = optimizer.state[partition.flat].get(STEP)
        for piece in pieces_of(partition.fragments_by_rank[partition.group_rank], ranges):
            for key, flat in tensors.items():
                part = flat.reshape(-1).narrow(0, piece.offset, piece.num_elements)
                name = slice_name(piece.name, key, piece.start)
                yield Entry(name, part.dtype, (piece.num_elements,)), part
            if isinstance(step, Tensor) and piece.start == 0:
                name = slice_name(piece.name, STEP, 0)
                yield Entry(name, step.dtype, (1,)), step.reshape(1)


def _is_my_turn(index: int, partition: FlatPartition, mesh: Mesh) -> bool:
    parameter = partition.fragments_by_rank[0][0].parameter
    if is_expert_parameter(parameter):
        return index % mesh.edp_size == mesh.edp_rank
    return index % mesh.num_ranks == mesh.rank


def flat_tensors(partition: FlatPartition, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the partition's tensors of one value an element: the master and each moment."""
    state = optimizer.state[partition.flat]
    moments = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.numel() == partition.flat.numel() and key != STEP
    }
    return {MASTER: partition.flat, **moments}


def restore_slices(
    reader: StateReader,
    partitions: Sequence[FlatPartition],
    optimizer: torch.optim.Optimizer,
    ranges: Mapping[int, list[NamedRange]],
) -> None:
    """Overwrites every master and moment that this rank holds with what is stored under its name.

    Raises InputError for state that the checkpoint does not have.
    """
    for partition in partitions:
        tensors = flat_tensors(partition, optimizer)
        step = optimizer.state[partition.flat].get(STEP)
        if isinstance(step, Tensor):
            step.fill_(_stored_step(reader, partition, ranges))
        for piece in pieces_of(partition.fragments_by_rank[partition.group_rank], ranges):
            for key, flat in tensors.items():
                part = flat.view(-1).narrow(0, piece.offset, piece.num_elements)
                reader.read_into(piece.name, key, piece.start, part)


def _stored_step(
    reader: StateReader, partition: FlatPartition, ranges: Mapping[int, list[NamedRange]]
) -> float:
    """Returns Adam's count: one a partition, so the largest where tensors skipped other steps.

    Asked of every rank's fragments: one that holds padding alone counts with the others.
    """
    fragments = [f for by_rank in partition.fragments_by_rank for f in by_rank]
    names = {piece.name for piece in pieces_of(fragments, ranges)}
    return max(float(reader.read(name, STEP)[0]) for name in names)
