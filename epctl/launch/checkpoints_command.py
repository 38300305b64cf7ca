"""The bodies of `epctl checkpoints RUN list|verify|diff|prune`; only diff needs torch."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl.errors import ConfigError, GateError, InputError
from epctl.launch.run_folder import run_lock
from epctl.output import Output, format_bytes, format_seconds
from epctl.runtime.checkpoint_manifest import Manifest, find_damage
from epctl.runtime.run_checkpoints import (
    Listed,
    checkpoints_folder,
    latest_defect,
    list_checkpoints,
    remove_checkpoint,
)

if TYPE_CHECKING:
    from rich.table import Table

NUM_READERS = 4
# Differences that a person is shown; `--json` has all.
NUM_SHOWN = 12


def show_list(run: Path, output: Output) -> None:
    """Shows every `step-N` folder: what it is, or why it does not count."""
    listed = _require_run(run)
    defect = latest_defect(run)
    output.document({"run": str(run), "latest": defect, "checkpoints": [*map(_record, listed)]})
    output.data(_table(listed))
    if defect is not None:
        output.warning(f"{defect}; resuming looks at the folders themselves")


def _require_run(run: Path) -> list[Listed]:
    if not (run / "config.json").is_file() and not checkpoints_folder(run).is_dir():
        raise InputError(
            f"`{run}` is no run folder", hint="`epctl train` names the folder at its end"
        )
    return list_checkpoints(run)


def _record(found: Listed) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": found.step,
        "folder": str(found.folder),
        "committed": found.manifest is not None,
        "reason": found.reason,
    }
    if found.manifest is not None:
        document = found.manifest.document
        keys = ("time", "topology", "optimizer", "model", "versions", "digest")
        record |= {"num_bytes": found.manifest.num_bytes}
        record |= {key: document.get(key) for key in keys}
    return record


def _table(listed: list[Listed]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("step", "written", "size", "by", "optimizer", "state"):
        table.add_column(name, justify="right" if name in ("step", "size") else "left")
    for found in listed:
        manifest = found.manifest
        if manifest is None:
            table.add_row(str(found.step), "", "", "", "", f"does not count: {found.reason}")
            continue
        document = manifest.document
        size, optimizer = format_bytes(manifest.num_bytes), str(document.get("optimizer"))
        when = str(document.get("time", ""))
        table.add_row(str(found.step), when, size, str(manifest.topology), optimizer, "committed")
    return table


def verify(run: Path, steps: list[int], output: Output) -> None:
    """Reads every byte of the checkpoints (all, or those of `steps`) against their manifests.

    Raises GateError if one is damaged or unfinished, InputError for a step there is none of.
    """
    chosen = _chosen(_require_run(run), steps) if steps else _require_run(run)
    results = []
    for found in chosen:
        started = time.perf_counter()
        reason = found.reason if found.manifest is None else _damage(found.folder, found.manifest)
        results.append({"step": found.step, "sound": reason is None, "reason": reason})
        if reason is None and found.manifest is not None:
            size = format_bytes(found.manifest.num_bytes)
            seconds = format_seconds(time.perf_counter() - started)
            output.text(f"step {found.step}: sound, {size} read in {seconds}")
        else:
            output.text(f"step {found.step}: {reason}")
    output.document({"run": str(run), "checkpoints": results})
    damaged = [str(result["step"]) for result in results if not result["sound"]]
    if damaged:
        raise GateError(
            f"{len(damaged)} of {len(results)} checkpoints are not sound: step "
            f"{', '.join(damaged)}",
            hint="`--resume` puts a damaged one aside by itself and goes on from the one before",
        )


def _chosen(listed: list[Listed], steps: Iterable[int]) -> list[Listed]:
    by_step = {found.step: found for found in listed}
    missing = [step for step in steps if step not in by_step]
    if missing:
        raise InputError(
            f"there is no checkpoint of step {missing[0]}",
            hint=f"there are: {', '.join(map(str, by_step)) or 'none'}",
        )
    return [by_step[step] for step in steps]


def _damage(folder: Path, manifest: Manifest) -> str | None:
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = pool.map(lambda name: find_damage(folder, manifest, [name]), manifest.files)
        return next((reason for reason in found if reason is not None), None)


def diff(run: Path, steps: list[int], output: Output) -> None:
    """Compares two checkpoints tensor by tensor, weights and state, whatever layouts they have.

    Raises ConfigError unless two steps are given, InputError for one that does not count.
    """
    if len(steps) != 2:
        raise ConfigError(f"diff compares two steps, {len(steps)} given", hint="diff 500 1000")
    pair = _chosen(_require_run(run), steps)
    for found in pair:
        if found.reason is not None:
            raise InputError(found.reason)
    from epctl.runtime.checkpoint_diff import compare

    rows = compare(pair[0].folder, pair[1].folder)
    changed = [row for row in rows if row.kind != "equal"]
    output.document(
        {
            "run": str(run),
            "steps": steps,
            "num_equal": len(rows) - len(changed),
            "changed": [vars(row) for row in changed],
        }
    )
    output.text(f"{len(rows) - len(changed)} of {len(rows)} tensors are equal, bit for bit")
    for row in changed[:NUM_SHOWN]:
        output.text(f"  {row.text}")
    if len(changed) > NUM_SHOWN:
        output.text(f"  and {len(changed) - NUM_SHOWN} more, all in `--json`")


def prune(run: Path, keep: int, output: Output, *, remove: bool) -> None:
    """Removes committed checkpoints but the newest `keep`; without `remove` shows them only.

    Raises ConfigError while a job has the run.
    """
    listed = _require_run(run)
    committed = [found for found in listed if found.manifest is not None]
    doomed = committed[:-keep]
    freed = sum(found.manifest.num_bytes for found in doomed if found.manifest is not None)
    if remove and doomed:
        with run_lock(run):
            for found in doomed:
                remove_checkpoint(found.folder)
    output.document(
        {
            "run": str(run),
            "removed": remove,
            "steps": [found.step for found in doomed],
            "num_bytes": freed,
        }
    )
    names = ", ".join(str(found.step) for found in doomed) or "none"
    output.text(f"{'removed' if remove else 'would remove'}: {names} ({format_bytes(freed)})")
    if doomed and not remove:
        output.note("add `--yes` to remove them")
