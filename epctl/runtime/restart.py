"""Where ranks begin, also when their launcher has started them again."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from epctl.runtime.run_checkpoints import committed_checkpoints


def first_checkpoint(run_folder: Path, resume: Path | None) -> Path | None:
    """Returns the checkpoint to begin from: the run's own newest, else what it resumes. Collective.

    A fresh run has none of its own. Rank 0 decides for all, so that a node which sees a shared
    disk late does not begin elsewhere.
    """
    own = committed_checkpoints(run_folder)
    chosen: list[Path | None] = [own[-1] if own else resume]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]
