"""Where ranks begin: at the newest checkpoint whose every byte is what was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from epctl.errors import InputError
from epctl.runtime.checkpoint_manifest import find_damage, read_manifest
from epctl.runtime.run_checkpoints import (
    committed_checkpoints,
    latest_defect,
    list_checkpoints,
    put_aside,
    sweep,
)


@dataclass
class Beginning:
    """The checkpoint to begin from (None: step 0), and what was found wrong on the way."""

    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)


def find_beginning(run_folder: Path, *, required: bool) -> Beginning:
    """Returns where to begin; a collective, in which ranks share the reading of bytes.

    A checkpoint that is damaged is put aside under another name and the one before is tried.

    Args:
        required: a run that was asked to go on must not begin again.

    Raises InputError, with every reason, if there are checkpoints and none is sound, or if
    `required` and there is none.
    """
    beginning = Beginning()
    candidates, beginning.notes, unfinished = _candidates(run_folder)
    for folder in reversed(candidates):
        reason = _damage(folder)
        if reason is None:
            beginning.checkpoint = folder
            return beginning
        beginning.rejected.append({"folder": str(folder), "reason": reason})
    if candidates or unfinished or required:
        reasons = [rejected["reason"] for rejected in beginning.rejected] + unfinished
        raise InputError(
            f"run `{run_folder}` has no sound checkpoint to go on from"
            + "".join(f"\n  {reason}" for reason in reasons),
            hint="`epctl checkpoints` shows what is there; to begin again, start a new run with "
            "another `--output`",
        )
    return beginning


def _candidates(run_folder: Path) -> tuple[list[Path], list[str], list[str]]:
    """Rank 0 looks for all, so that a node which sees a shared disk late decides alike."""
    answer: list[tuple[list[Path], list[str], list[str]] | None] = [None]
    if dist.get_rank() == 0:
        sweep(run_folder)
        listed = list_checkpoints(run_folder)
        defect = latest_defect(run_folder)
        unfinished = [found.reason for found in listed if found.reason is not None]
        notes = [*unfinished, *([defect] if defect is not None else [])]
        answer = [(committed_checkpoints(run_folder), notes, unfinished)]
    dist.broadcast_object_list(answer, src=0)
    assert answer[0] is not None
    return answer[0]


def _damage(folder: Path) -> str | None:
    """Returns why a checkpoint cannot be used; a collective: each rank reads some of its files."""
    reason: str | None = None
    try:
        names = sorted(read_manifest(folder).files)
        mine = names[dist.get_rank() :: dist.get_world_size()]
        reason = find_damage(folder, read_manifest(folder), mine)
    except InputError as error:
        reason = error.message
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((r for r in reasons if r is not None), None)


def put_rejected_aside(beginning: Beginning) -> None:
    """Renames the damaged checkpoints on rank 0, once a sound one is loaded."""
    if dist.get_rank() == 0:
        for rejected in beginning.rejected:
            rejected["moved_to"] = str(put_aside(Path(rejected["folder"])))
    dist.barrier()
