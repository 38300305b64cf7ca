"""Optimizer state by global tensor name and slice, whatever ZeRO stage and EP size hold it.

A stored tensor is `NAME.KEY[START]`: elements from START on of hub tensor NAME (one expert's
projection is a tensor of its own), KEY being `master`, `exp_avg`, `momentum_buffer` and so on.
Nothing in it depends on ranks, so any other layout finds its slices by name.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epctl.errors import InputError
from epctl.layout.source import read_shard_header
from epctl.runtime.checkpoint_files import DTYPES, Entry
from epctl.runtime.deepspeed_seams import FlatPartition, Fragment, full_shape, is_expert_parameter
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import hub_tensors

MASTER = "master"
STEP = "step"
STAGING_BYTES = 64 * 2**20


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


def slice_name(name: str, key: str, start: int) -> str:
    return f"{name}.{key}[{start}]"


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


@dataclass(frozen=True)
class _Stored:
    """Elements `[start, end)` of one tensor and key, at a byte of a file."""

    start: int
    end: int
    path: Path
    dtype: torch.dtype
    position: int


class StateReader:
    """Finds and reads slices of a checkpoint's state; holds 64 MiB of it at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_bytes = 0
        self._stored: dict[tuple[str, str], list[_Stored]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, entry in read_shard_header(path).tensors.items():
                base, _, start = name.removesuffix("]").rpartition("[")
                tensor, _, key = base.rpartition(".")
                dtype = DTYPES[entry.dtype]
                begin = int(start)
                length = (entry.end - entry.start) // dtype.itemsize
                stored = _Stored(begin, begin + length, path, dtype, entry.start)
                self._stored.setdefault((tensor, key), []).append(stored)
        for found in self._stored.values():
            found.sort(key=lambda s: s.start)
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def has(self, name: str, key: str) -> bool:
        return (name, key) in self._stored

    def read_into(self, name: str, key: str, start: int, destination: Tensor) -> None:
        """Fills a 1-D tensor with elements from `start` on, converting their dtype.

        Raises InputError if the checkpoint does not hold all of them.
        """
        end = start + destination.numel()
        position = start
        found = self._stored.get((name, key), [])
        first = max(0, bisect.bisect_right([s.start for s in found], start) - 1)
        for stored in found[first:]:
            low, high = max(position, stored.start), min(end, stored.end)
            if low == position and low < high:
                self._copy(stored, low, destination.narrow(0, low - start, high - low))
                position = high
        if position < end:
            raise InputError(
                f"`{self.folder}` lacks `{key}` of `{name}` from element {position} on",
                hint="it was written with another optimizer or another `--train`; `epctl train "
                f"{self.folder.parent / 'model'}` starts a new run from its weights",
            )

    def read(self, name: str, key: str) -> Tensor:
        """Returns a whole stored tensor, 1-D."""
        found = self._stored.get((name, key))
        if not found:
            raise InputError(f"`{self.folder}` holds no `{slice_name(name, key, 0)}`")
        result = torch.empty(found[-1].end, dtype=found[0].dtype)
        self.read_into(name, key, 0, result)
        return result

    def _copy(self, stored: _Stored, start: int, destination: Tensor) -> None:
        if stored.path not in self._descriptors:
            self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
        size = stored.dtype.itemsize
        position = stored.position + (start - stored.start) * size
        step = STAGING_BYTES // size
        for begin in range(0, destination.numel(), step):
            part = destination[begin : begin + step]
            raw = torch.empty(part.numel() * size, dtype=torch.uint8)
            self._fill(raw, stored.path, position + begin * size)
            part.copy_(raw.view(stored.dtype))

    def _fill(self, raw: Tensor, path: Path, position: int) -> None:
        view: Any = memoryview(raw.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptors[path], [view[done:]], position + done)
            if count == 0:
                raise InputError(f"`{path}` ends early")
            done += count
        self.num_bytes += len(view)


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
