"""Checkpoint tensors that all experts of a layer share, put together from the ranks that hold them.

The inverse of the slices that load.py reads: gate and up beside each other, interleaved, turned or
flattened, as the layout says the checkpoint stores them. One expert's block is contiguous in every
such tensor, so ranks send block by block and nobody holds two tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.layout.model import ExpertTensor
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import HubTensor


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor with all experts of a layer in it.

    `slices` holds, for each projection in the tensor, this rank's experts in order; `places` where
    that projection's part lies.
    """

    name: str
    num_experts: int
    slices: tuple[tuple[HubTensor, ...], ...]
    places: tuple[ExpertTensor, ...]

    @property
    def tensor(self) -> Tensor:
        """A live tensor that is part of it: its dtype is that of the stored one."""
        return self.slices[0][0].tensor

    @property
    def is_expert(self) -> bool:
        return True

    @property
    def live_tensors(self) -> list[Tensor]:
        """The live tensors that must be whole while a block is read."""
        return [tensors[0].tensor for tensors in self.slices]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint, also where ZeRO-3 holds only slices of the live tensors."""
        place, first = self.places[0], list(self.slices[0][0].shape)
        block = first[::-1] if place.transposed else first
        if place.part != "all":
            block[place.part_dim] *= len(self.slices)
        if place.rows is not None:
            return (self.num_experts * block[0], *block[1:])
        return (self.num_experts, *block)

    def block(self, local_expert: int) -> Tensor:
        """Returns what the tensor holds of one of this rank's experts, contiguous."""
        values = [
            tensors[local_expert].local().t() if place.transposed else tensors[local_expert].local()
            for tensors, place in zip(self.slices, self.places, strict=True)
        ]
        place = self.places[0]
        if place.part == "all":
            return values[0].contiguous()
        if place.part in ("even", "odd"):
            dim = place.part_dim
            return torch.stack(values, dim=dim + 1).flatten(dim, dim + 1).contiguous()
        return torch.cat(values, dim=place.part_dim)


def join_shared(tensors: Sequence[HubTensor]) -> list[HubTensor | StoredTensor]:
    """Returns the tensors as a checkpoint stores them, in order: shared ones put together."""
    shared: dict[str, list[HubTensor]] = {}
    order: list[HubTensor | str] = []
    for tensor in tensors:
        place = tensor.shared_place()
        if place is None:
            order.append(tensor)
            continue
        if place.name not in shared:
            order.append(place.name)
        shared.setdefault(place.name, []).append(tensor)
    return [_stored(item, shared[item]) if isinstance(item, str) else item for item in order]


def _stored(name: str, tensors: list[HubTensor]) -> StoredTensor:
    """Returns a shared tensor; its projections come in the order in which their parts lie."""
    by_projection: dict[str, list[HubTensor]] = {}
    for tensor in tensors:
        assert tensor.source is not None
        by_projection.setdefault(tensor.source.projection, []).append(tensor)
    slices = [tuple(by_projection[key]) for key in ("gate", "up", "down") if key in by_projection]
    source = tensors[0].source
    assert source is not None
    num_experts = source.stored.moe.experts_of_layer(source.stored.layer)
    places = [part[0].shared_place() for part in slices]
    return StoredTensor(
        name, num_experts, tuple(slices), tuple(place for place in places if place is not None)
    )


def values_of(tensor: HubTensor | StoredTensor, mesh: Mesh, writer: int) -> list[Tensor]:
    """Returns a stored tensor's values on the rank that writes it, in the order of its bytes.

    A collective over the writer's ep group for a tensor that experts of several ranks share; the
    live tensors are whole (`seams.full_parameters`).
    """
    if isinstance(tensor, HubTensor):
        return [tensor.local()] if mesh.rank == writer else []
    if mesh.edp_rank != writer // mesh.ep_size:
        return []
    blocks = (tensor.block(local) for local in range(len(tensor.slices[0])))
    if mesh.ep_size == 1:
        return list(blocks)
    by_rank: list[list[Tensor]] = [[] for _ in range(mesh.ep_size)]
    for block in blocks:
        received = [torch.empty_like(block) for _ in by_rank] if mesh.rank == writer else None
        dist.gather(block.detach(), received, dst=writer, group=mesh.ep_group)
        for rank, value in enumerate(received or ()):
            by_rank[rank].append(value)
    return [block for of_rank in by_rank for block in of_rank]
