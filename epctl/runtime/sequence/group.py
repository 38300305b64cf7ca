"""The ranks that share a sample: epctl's own process group, DeepSpeed is not told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.runtime.dispatch import RowSplits, start_exchange
from epctl.runtime.mesh import validate_sequence_parallel


@dataclass
class Traffic:
    """Bytes this rank sent to others, counted where they are sent; backward mirrors forward.

    `by_part` has those of the decoder's and the tower's attention, of pixels and of features.
    """

    by_part: dict[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self.by_part.values())

    def reset(self) -> None:
        self.by_part.clear()

    def count(self, rows: Tensor, sent: list[int], rank: int, part: str) -> None:
        width = rows[0].numel() if len(rows) else 0
        elsewhere = sum(sent) - sent[rank]
        passes = 2 if rows.requires_grad else 1
        num_bytes = passes * elsewhere * width * rows.element_size()
        self.by_part[part] = self.by_part.get(part, 0) + num_bytes


@dataclass
class SequenceGroup:
    """This rank's place among the ranks of one sample; `group` is None for a group of one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)
    part: str = "decoder"

    def of(self, part: str) -> SequenceGroup:
        """Returns the same ranks, their bytes counted under `part`."""
        return replace(self, part=part)

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends `sent[r]` leading rows to each rank r in turn; differentiable.

        Returns the rows received, in the order of their source ranks.
        """
        return self.start(rows, sent, received)()

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> Callable[[], Tensor]:
        """Sends as `exchange` does; what it returns waits for the rows received."""
        assert self.group is not None
        self.traffic.count(rows, sent, self.rank, self.part)
        return start_exchange(rows, RowSplits(sent, received, self.group))

    def gather_counts(self, count: int, device: torch.device) -> list[int]:
        """Returns every rank's number. A collective with a host synchronisation."""
        if self.size == 1:
            return [count]
        own = torch.tensor([count], device=device)
        every = own.new_empty(self.size)
        dist.all_gather_into_tensor(every, own, group=self.group)
        return [int(number) for number in every.tolist()]

    def gather_objects(self, value: Any) -> list[Any]:
        """Returns every rank's small value, pickled on the way. A collective."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self.group)
        return every


def create_sequence_group(size: int) -> SequenceGroup:
    """Returns this rank's group of `size` consecutive ranks. A collective over all ranks.

    Raises ConfigError if `size` does not divide the ranks.
    """
    if size == 1:
        return SequenceGroup()
    num_ranks = dist.get_world_size()
    validate_sequence_parallel(size, num_ranks)
    group, _ = dist.new_subgroups(group_size=size)  # type: ignore[no-untyped-call]
    return SequenceGroup(dist.get_rank() % size, size, group)
