"""What a run will write, and whether its disk can hold it: asked before training, not after."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from epctl.config import RunConfig
from epctl.errors import ResourceError
from epctl.interval import parse_interval
from epctl.output import format_bytes


def bytes_to_write(config: RunConfig, model_bytes: int, state_bytes: int) -> int:
    """Returns the most bytes a run has on disk at once.

    Args:
        model_bytes: of one Hugging Face folder.
        state_bytes: masters and optimizer state of all ranks, in each checkpoint beside a model.

    Retention removes the oldest checkpoint after the newest is complete: one more than it keeps.
    """
    writes = parse_interval(config.checkpoint.every) is not None
    checkpoints = config.checkpoint.keep + 1 if writes else 0
    return model_bytes * config.run.save + checkpoints * (model_bytes + state_bytes)


def require_disk_space(folder: Path, num_bytes: int) -> None:
    """Raises ResourceError on every rank if rank 0 finds less free than needed, plus a twentieth.

    A collective: disks that ranks see differently must not let some of them go on.
    """
    answer: list[str | None] = [_shortage(folder, num_bytes) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is not None:
        raise ResourceError(
            answer[0],
            hint="choose another disk with `--output`, fewer `checkpoint.keep`, or "
            "`--set run.save=false`",
        )


def _shortage(folder: Path, num_bytes: int) -> str | None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    needed = num_bytes + num_bytes // 20
    if free >= needed:
        return None
    return (
        f"what this run will save needs {format_bytes(needed)}, "
        f"`{existing}` has {format_bytes(free)} free"
    )


def sum_over_ranks(num_bytes: int, device: torch.device) -> int:
    """Returns the sum of every rank's bytes; a collective."""
    total = torch.tensor(num_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)
