"""The flat tensors that a ZeRO optimizer steps on, and what of which Parameter they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Elements `[start, start + num_elements)` of a Parameter, at `offset` of a flat partition."""

    parameter: nn.Parameter
    start: int
    num_elements: int
    offset: int


@dataclass(frozen=True)
class FlatPartition:
    """A float32 tensor the optimizer steps on, and what every rank of its group holds in theirs.

    `fragments_by_rank[k]` lists what rank k of `process_group` holds; the group is None where
    nothing is partitioned (ZeRO-0) and every rank holds all.
    """

    flat: Tensor
    process_group: dist.ProcessGroup | None
    group_rank: int
    fragments_by_rank: tuple[tuple[Fragment, ...], ...]


def end_to_end(
    flat: Tensor, group: dist.ProcessGroup, placed: list[tuple[nn.Parameter, int]], length: int
) -> FlatPartition:
    """Returns the layout of Parameters at their positions, cut into pieces of `length`."""
    by_rank = tuple(
        tuple(_overlaps(placed, rank * length, (rank + 1) * length))
        for rank in range(dist.get_world_size(group))
    )
    return FlatPartition(flat, group, dist.get_rank(group), by_rank)


def _overlaps(placed: list[tuple[nn.Parameter, int]], begin: int, end: int) -> Iterator[Fragment]:
    """Yields what of each Parameter falls into `[begin, end)` of the concatenation."""
    for parameter, position in placed:
        low = max(begin, position)
        high = min(end, position + parameter.numel())
        if low < high:
            yield Fragment(parameter, low - position, high - low, low - begin)
