"""The pause of a save: everything a checkpoint holds, copied to host memory of this rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.checkpoint_files import Entry
from epctl.runtime.checkpoint_reader import slice_name
from epctl.runtime.checkpoint_shares import (
    assign_writers,
    entries_of,
    gathered_parameters,
    units_of,
)
from epctl.runtime.checkpoint_state import named_ranges, own_slices
from epctl.runtime.host_copy import HostCopy
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import hub_tensors, join
from epctl.runtime.random_state import random_state
from epctl.runtime.stored_tensors import values_of

COUNTER = "tokens_per_expert"  # of a router, see `moe.count_tokens`


@dataclass
class Snapshot:
    """What this rank writes: entries in order, and their bytes in host memory."""

    model: list[tuple[Entry, list[memoryview]]] = field(default_factory=list)
    state: list[tuple[Entry, list[memoryview]]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry, _ in (*self.model, *self.state))


@torch.no_grad()
def take_snapshot(
    engine: Any, optimizer: torch.optim.Optimizer, mesh: Mesh, host: HostCopy
) -> Snapshot:
    """Copies this rank's share of the model and its slices of the state. A collective.

    At ZeRO-3 one live tensor at a time is gathered on the device; nothing of it stays there.
    """
    host.clear()
    snapshot = Snapshot()
    units = units_of(engine.module)
    for unit, writer in zip(units, assign_writers(units, mesh), strict=True):
        with seams.full_parameters(gathered_parameters(unit)):
            for tensor, entry in zip(unit, entries_of(unit), strict=True):
                values = values_of(tensor, mesh, writer)
                if writer == mesh.rank:
                    pieces = [piece for value in values for piece in host.add(value)]
                    snapshot.model.append((entry, pieces))
    for entry, part in _state_tensors(engine, optimizer, mesh):
        snapshot.state.append((entry, host.add(part)))
    host.synchronize()
    return snapshot


def _state_tensors(
    engine: Any, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> Iterator[tuple[Entry, Tensor]]:
    ranges = named_ranges(engine.module)
    yield from own_slices(seams.flat_partitions(engine), optimizer, ranges, mesh)
    for key, tensor in random_state(engine.device):
        yield _whole(random_name(mesh.rank), key, tensor), tensor
    counted = list(counters(engine.module))
    for name, counter in counted:
        total = counter.clone()
        dist.all_reduce(total)
        if mesh.rank == 0:
            yield _whole(name, "count", total), total
    if mesh.rank == 0:
        for name, buffer in buffers(engine.module):
            yield _whole(name, "buffer", buffer), buffer


def _whole(name: str, key: str, tensor: Tensor) -> Entry:
    return Entry(slice_name(name, key, 0), tensor.dtype, (tensor.numel(),))


def random_name(rank: int) -> str:
    return f"random.rank-{rank}"


def counters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields what ranks count apart, the tokens an expert.

    A checkpoint holds their sum, which one rank gets back. By name: a vision tower's `position_ids`
    are whole numbers outside of the checkpoint, too, and their sum is of no use to any rank.
    """
    for path, child in module.named_modules():
        counter = child._buffers.get(COUNTER)
        if counter is not None and counter.dtype == torch.int64:
            yield join(path, COUNTER), counter


def buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's buffers that every rank holds alike, such as the router's bias."""
    for tensor in hub_tensors(module):
        if not isinstance(tensor.tensor, nn.Parameter):
            yield tensor.name, tensor.tensor
