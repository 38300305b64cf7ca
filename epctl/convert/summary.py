"""What a person sees before and after a conversion: the plan's table, the closing table."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl.convert.plan import OutputPlan
from epctl.convert.view import CheckpointView
from epctl.layout.names import fold_table
from epctl.output import format_bytes, format_seconds, out

if TYPE_CHECKING:
    from rich.table import Table

MAX_FOLDERS = 8


def folder_sizes(plan: OutputPlan) -> dict[str, tuple[int, int, int]]:
    """Returns (files, tensors, bytes) of each folder of an output, `.` for its top."""
    sizes: dict[str, tuple[int, int, int]] = {}
    for file in plan.files:
        folder = file.path.rpartition("/")[0] or "."
        files, tensors, num_bytes = sizes.get(folder, (0, 0, 0))
        sizes[folder] = (files + 1, tensors + len(file.tensors), num_bytes + file.num_bytes)
    return sizes


def plan_document(view: CheckpointView, plan: OutputPlan, output: Path) -> dict[str, Any]:
    """Returns the plan for `--dry-run --json`."""
    return {
        "source": dict(view.record),
        "output": str(output),
        "kind": plan.kind,
        "options": dict(plan.options),
        "num_bytes": plan.num_bytes,
        "free_bytes": _free_bytes(output),
        "folders": {
            folder: {"num_files": files, "num_tensors": tensors, "num_bytes": num_bytes}
            for folder, (files, tensors, num_bytes) in folder_sizes(plan).items()
        },
        "dropped": [dict(entry) for entry in plan.dropped],
        "changed": [dict(entry) for entry in plan.changed],
        "has_whole_index": "model.safetensors.index.json" in plan.indexes or plan.kind == "model",
    }


def _free_bytes(output: Path) -> int:
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def show_plan(title: str, view: CheckpointView, plan: OutputPlan, output: Path) -> None:
    """Shows what would be written; nothing is touched."""
    table = _table(f"{title} `{view.id}` -> `{output}` (dry run)")
    for column in ("folder", "files", "tensors", "bytes"):
        table.add_column(column, justify="left" if column == "folder" else "right")
    sizes = list(folder_sizes(plan).items())
    for folder, (files, tensors, num_bytes) in sizes[:MAX_FOLDERS]:
        table.add_row(folder, str(files), str(tensors), format_bytes(num_bytes))
    if len(sizes) > MAX_FOLDERS:
        table.add_row(f"... {len(sizes) - MAX_FOLDERS} more", "", "", "")
    table.add_row("all", str(len(plan.files)), str(len(plan.tensors)), format_bytes(plan.num_bytes))
    out.data(table)
    if view.moe is not None and plan.moe is not None:
        out.text(f"experts: {view.moe.storage.label} -> {plan.moe.storage.label}")
    out.text(
        f"space: {format_bytes(plan.num_bytes)} needed, {format_bytes(_free_bytes(output))} free"
    )
    _show_lists(fold(plan.dropped, "reason"), fold_changes(plan.changed))


def show_result(title: str, manifest: Mapping[str, Any], output: Path, seconds: float) -> None:
    """Shows the closing table: tensors, bytes, what was dropped or changed, the whole's digest."""
    table = _table(f"{title} -> `{output}`")
    table.add_column("")
    table.add_column("", overflow="fold")
    rate = manifest["num_bytes"] / max(seconds, 1e-9) / 1e9
    table.add_row("tensors", str(manifest["num_tensors"]))
    table.add_row("bytes", f"{manifest['num_bytes']} ({format_bytes(manifest['num_bytes'])})")
    table.add_row("files", str(len(manifest["files"])))
    table.add_row("time", f"{format_seconds(seconds)}, {rate:.2f} GB/s")
    table.add_row("dropped", f"{_count(manifest['dropped'])} tensors")
    table.add_row("dtype changed", f"{_count(manifest['changed'])} tensors")
    out.data(table)
    out.text(f"digest: {manifest['digest']}")  # a table would fold it
    _show_lists(
        [(entry["name"], entry["reason"]) for entry in manifest["dropped"]],
        [(e["name"], f"{e['from']} -> {e['to']}") for e in manifest["changed"]],
    )


def _count(folded: Iterable[Mapping[str, str]]) -> int:
    from epctl.layout.names import unfold_name

    return sum(1 for entry in folded for _ in unfold_name(entry["name"]))


def fold(entries: Iterable[Mapping[str, str]], key: str) -> list[tuple[str, str]]:
    """Returns (folded name, value of `key`) of entries."""
    return [(n, str(v)) for n, v in fold_table((e["name"], e[key]) for e in entries)]


def fold_changes(entries: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Returns (folded name, `F32 -> BF16`) of entries."""
    return fold([{"name": e["name"], "to": f"{e['from']} -> {e['to']}"} for e in entries], "to")


def _show_lists(dropped: list[tuple[str, str]], changed: list[tuple[str, str]]) -> None:
    for title, entries in (("dropped", dropped), ("dtype changed", changed)):
        for name, why in entries:
            out.text(f"{title}: {name} ({why})")


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
