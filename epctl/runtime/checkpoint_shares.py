"""Which rank writes which tensor of a model's folder: all in one place, and evenly.

Every rank derives the same answer without talking: a dense tensor is known to all, and experts of
other ep ranks have the sizes of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from epctl.runtime.checkpoint_files import Entry
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import HubTensor, hub_tensors
from epctl.runtime.stored_tensors import StoredTensor, join_shared

Unit = list[HubTensor | StoredTensor]


def units_of(model: nn.Module) -> list[Unit]:
    """Groups a model's checkpoint tensors by the live tensor they lie in: gathered one by one.

    A tensor that all experts of a layer share is a unit of its own.
    """
    return list(_units(model))


def _units(model: nn.Module) -> Iterator[Unit]:
    unit: Unit = []
    for tensor in join_shared(list(hub_tensors(model))):
        if unit and tensor.tensor is not unit[0].tensor:
            yield unit
            unit = []
        unit.append(tensor)
    if unit:
        yield unit


def gathered_parameters(unit: Unit) -> list[nn.Parameter]:
    """Returns what must be whole while the unit is read: nothing for a buffer."""
    first = unit[0]
    tensors = first.live_tensors if isinstance(first, StoredTensor) else [first.tensor]
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def entries_of(unit: Unit) -> list[Entry]:
    return [Entry(t.name, t.tensor.dtype, t.shape) for t in unit]


def unit_bytes(unit: Unit) -> int:
    return sum(entry.num_bytes for entry in entries_of(unit))


def assign_writers(units: Sequence[Unit], mesh: Mesh) -> list[int]:
    """Returns, for each unit of this rank's model, the rank that writes it.

    Experts go to one of the ranks that hold them, largest load last; dense tensors, and those
    with experts of all ranks in them, then fill up whoever has least.
    """
    loads = [0] * mesh.num_ranks
    writers = [-1] * len(units)
    for index, unit in enumerate(units):
        if unit[0].is_expert and not isinstance(unit[0], StoredTensor):
            copies = range(mesh.edp_size)
            edp_rank = min(copies, key=lambda copy: (loads[copy * mesh.ep_size], copy))
            for ep_rank in range(mesh.ep_size):
                loads[edp_rank * mesh.ep_size + ep_rank] += unit_bytes(unit)
            writers[index] = edp_rank * mesh.ep_size + mesh.ep_rank
    for index, unit in enumerate(units):
        if writers[index] < 0:
            writers[index] = min(range(mesh.num_ranks), key=lambda rank: (loads[rank], rank))
            loads[writers[index]] += unit_bytes(unit)
    return writers


def share_of(units: Sequence[Unit], writers: Sequence[int], rank: int) -> list[Entry]:
    """Returns what `rank` writes, in order."""
    mine = (unit for unit, writer in zip(units, writers, strict=True) if writer == rank)
    return [entry for unit in mine for entry in entries_of(unit)]
