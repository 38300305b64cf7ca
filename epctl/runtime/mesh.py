"""The mesh: how the ranks of a job divide into expert-parallel and data-parallel axes.

Ranks of one expert-parallel (ep) group are consecutive and hold different experts. Ranks at the
same place of different ep groups form an expert-data-parallel (edp) group and hold the same
experts. For gradients every rank is on the data-parallel axis; `sp_size` consecutive ranks share
one sample, so data is dealt out to `num_data_ranks` places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from epctl.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist


def validate_expert_parallel(ep_size: int, num_ranks: int, num_experts: int | None = None) -> None:
    """Raises ConfigError, with the numbers, if `ep_size` divides not the ranks or the experts."""
    if num_ranks % ep_size:
        legal = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
        raise ConfigError(
            f"expert parallel size {ep_size} does not divide the {num_ranks} ranks",
            hint=f"use `--ep` {' or '.join(map(str, legal))}, or change `--num-ranks`",
        )
    if num_experts is not None and num_experts % ep_size:
        legal = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        raise ConfigError(
            f"expert parallel size {ep_size} does not divide the {num_experts} routed experts",
            hint=f"legal sizes for this model: {', '.join(map(str, legal))}",
        )


def validate_sequence_parallel(sp_size: int, num_ranks: int) -> None:
    """Raises ConfigError, with the numbers, if `sp_size` does not divide the ranks."""
    if num_ranks % sp_size:
        legal = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
        raise ConfigError(
            f"sequence parallel size {sp_size} does not divide the {num_ranks} ranks",
            hint=f"use `--sp {' or '.join(map(str, legal))}`, or change `--num-ranks`",
        )


@dataclass(frozen=True)
class Mesh:
    """This rank's place; the groups are None only in a process without torch.distributed."""

    rank: int
    num_ranks: int
    ep_size: int
    ep_rank: int
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None
    sp_size: int = 1

    def __post_init__(self) -> None:
        assert self.num_ranks % self.ep_size == 0
        assert 0 <= self.ep_rank < self.ep_size
        assert self.num_ranks % self.sp_size == 0

    @property
    def edp_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.num_ranks // self.ep_size

    @property
    def edp_rank(self) -> int:
        return self.rank // self.ep_size

    @property
    def num_data_ranks(self) -> int:
        """Places with different samples."""
        return self.num_ranks // self.sp_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.sp_size

    def num_local_experts(self, num_experts: int) -> int:
        return num_experts // self.ep_size

    def local_experts(self, num_experts: int) -> range:
        """Global ids of this rank's experts: contiguous blocks in the order of ep ranks."""
        count = self.num_local_experts(num_experts)
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)
