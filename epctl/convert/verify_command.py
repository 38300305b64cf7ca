"""The body of `epctl convert verify`: open, compare, show, fail if anything differs."""

from __future__ import annotations

from pathlib import Path

from epctl.convert.open import open_checkpoint, open_shards, with_weights
from epctl.convert.verify import Verdict, check_digests, compare
from epctl.convert.view import CheckpointView
from epctl.errors import GateError, InputError
from epctl.output import format_bytes, out
from epctl.progress import ByteProgress

MAX_SHOWN = 10


def verify(one: str, other: str | None, tolerance: float | None) -> None:
    """Shows whether two checkpoints agree, or whether one agrees with its own manifest.

    Raises GateError naming the first differing tensors, and what opening raises.
    """
    if other is None and tolerance is not None:
        raise InputError(
            "`--tolerance` needs two checkpoints; digests agree or they do not",
            hint="`epctl convert verify A B --tolerance 1e-3`",
        )
    view = with_weights(open_checkpoint(one))
    against = _whole(other, with_weights(open_checkpoint(other))) if other is not None else None
    total = max(_num_bytes(view), _num_bytes(against) if against is not None else 0)
    with ByteProgress(out, "verify", total) as progress:
        if against is None:
            verdict = check_digests(view, progress.advance)
        else:
            verdict = compare(_whole(one, view), against, tolerance, progress.advance)
    for note in verdict.notes:
        out.note(f"note: {note}")
    _show(verdict, one, other, tolerance)


def _num_bytes(view: CheckpointView) -> int:
    return sum(tensor.num_bytes for tensor in view.tensors.values())


def _whole(reference: str, view: CheckpointView) -> CheckpointView:
    """Refuses a folder of some ranks: what is missing there is no difference."""
    if view.manifest is not None and view.manifest["kind"] == "shard":
        return open_shards(reference)
    return view


def _show(verdict: Verdict, one: str, other: str | None, tolerance: float | None) -> None:
    how = "bit by bit" if tolerance is None else f"within {tolerance:g} of the largest value"
    against = "its manifest" if other is None else f"`{Path(other)}`"
    out.document(
        {
            "equal": not verdict.differences,
            "num_tensors": verdict.num_tensors,
            "num_bytes": verdict.num_bytes,
            "tolerance": tolerance,
            "notes": list(verdict.notes),
            "differences": [
                {"name": d.name, "expert": d.expert, "what": d.what} for d in verdict.differences
            ],
        }
    )
    if not verdict.differences:
        out.text(
            f"`{one}` equals {against} {how}: {verdict.num_tensors} tensors, "
            f"{format_bytes(verdict.num_bytes)}"
        )
        return
    shown = [difference.text for difference in verdict.differences[:MAX_SHOWN]]
    more = len(verdict.differences) - len(shown)
    raise GateError(
        f"`{one}` differs from {against} in {len(verdict.differences)} places:\n  "
        + "\n  ".join(shown)
        + (f"\n  ... and {more} more" if more else ""),
        hint="convert again from the source; a file that changes on disk means a failing disk",
    )
