"""The bodies of `epctl convert shard|merge|reshard` and `epctl export`: plan, show, write, show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epctl.convert.companions import small_files
from epctl.convert.jobs import (
    ShardOptions,
    plan_folder,
    plan_reshard,
    plan_shard_folder,
)
from epctl.convert.lock import output_lock
from epctl.convert.manifest import read_manifest
from epctl.convert.open import open_checkpoint, open_shards, resolve_run, with_weights
from epctl.convert.plan import OutputPlan
from epctl.convert.summary import plan_document, show_plan, show_result
from epctl.convert.targets import DtypeChoice, StorageChoice
from epctl.convert.view import CheckpointView
from epctl.convert.writer import Writer, check_disk_space
from epctl.errors import ConfigError, InputError
from epctl.output import out
from epctl.progress import ByteProgress


def shard(
    model: str, output: Path, options: ShardOptions, *, dry_run: bool, overwrite: bool
) -> None:
    """Writes MODEL's experts rank by rank. Raises what opening, planning and writing raise."""
    view = open_checkpoint(model)
    _convert("shard", view, plan_shard_folder(view, options), output, dry_run, overwrite)


def merge(folder: str, output: Path, *, dry_run: bool, overwrite: bool) -> None:
    """Writes a shard folder back as the Hugging Face folder that it was made from."""
    view = open_shards(folder)
    _convert("merge", view, plan_folder(view, "origin", "keep"), output, dry_run, overwrite)


def reshard(folder: str, ep: int, output: Path | None, *, dry_run: bool, overwrite: bool) -> None:
    """Writes a shard folder at another expert-parallel size, without a merged copy between."""
    view = open_shards(folder)
    if output is None:
        source = Path(folder).expanduser()
        output = source.with_name(f"{source.name}-ep{ep}")
    _convert("reshard", view, plan_reshard(view, ep), output, dry_run, overwrite)


def export(
    checkpoint: str,
    output: Path,
    storage: StorageChoice,
    dtype: DtypeChoice,
    *,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Writes a run, a checkpoint, a shard folder or a model as one Hugging Face folder."""
    reference = resolve_run(checkpoint)
    if reference != checkpoint:
        out.note(f"`{checkpoint}` is a run; exporting `{reference}`")
    view = open_checkpoint(reference)
    if view.manifest is not None and view.manifest["kind"] == "shard":
        view = open_shards(reference)
    chosen: StorageChoice = "origin" if storage == "checkpoint" else storage
    _convert("export", view, plan_folder(view, chosen, dtype), output, dry_run, overwrite)


def _convert(
    title: str,
    view: CheckpointView,
    plan: OutputPlan,
    output: Path,
    dry_run: bool,
    overwrite: bool,
) -> None:
    output = output.expanduser()
    for warning in view.warnings:
        out.warning(warning)
    if dry_run:
        show_plan(title, view, plan, output)
        out.document({"dry_run": True, **plan_document(view, plan, output)})
        return
    view = with_weights(view, output, plan.num_bytes)
    _refuse_inside(view, output)
    manifest, seconds = write(title, view, plan, output, overwrite=overwrite)
    out.document(_result_document(manifest, output, seconds))
    show_result(title, manifest, output, seconds)


def write(
    title: str, view: CheckpointView, plan: OutputPlan, output: Path, *, overwrite: bool = False
) -> tuple[dict[str, Any], float]:
    """Writes and publishes a plan; returns its manifest and the seconds it took.

    Raises ConfigError when `output` is in use or in the way, ResourceError when the disk is full.
    """
    view.path("")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot create `{output.parent}`: {error.strerror}", hint="choose another `--output`"
        ) from None
    with output_lock(output) as note, ByteProgress(out, title, plan.num_bytes) as progress:
        if note:
            out.note(f"note: {note}")
        writer = Writer(view, plan, output, progress.advance)
        if not overwrite and writer.finish_published():
            out.note("note: an earlier run had published everything; cleaned up after it")
            return read_manifest(output) or {}, progress.seconds
        _refuse_existing(output, overwrite)
        done = sum(path.stat().st_size for path in writer.staged.rglob("*") if path.is_file())
        needed, free = check_disk_space(output, plan, done)
        out.note(
            f"{title}: {len(plan.files)} files, {needed / 1e9:.2f} GB to write, "
            f"{free / 1e9:.2f} GB free"
        )
        manifest = writer.run(small_files(view, plan))
        if writer.resumed:
            out.note("note: resumed an interrupted run")
        return manifest, progress.seconds


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(
            f"`{output}` exists", hint="choose another `--output`, or `--overwrite` to replace it"
        )
    if not output.is_dir() or read_manifest(output) is None:
        raise ConfigError(
            f"`{output}` was not written by `epctl convert`; it is not replaced",
            hint="remove it yourself, or choose another `--output`",
        )


def _refuse_inside(view: CheckpointView, output: Path) -> None:
    source = view.path("").resolve()
    target = output.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise InputError(
            f"output `{output}` and source `{source}` lie inside each other",
            hint="choose an `--output` beside the source",
        )


def _result_document(manifest: dict[str, Any], output: Path, seconds: float) -> dict[str, Any]:
    keys = ("kind", "source", "options", "digest", "num_tensors", "num_bytes", "dropped", "changed")
    return {
        "output": str(output),
        "seconds": round(seconds, 3),
        **{key: manifest[key] for key in keys},
        "num_files": len(manifest["files"]),
    }
