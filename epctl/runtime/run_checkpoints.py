"""The checkpoints of a run folder: which are committed, which is newest, how one is published.

    checkpoints/latest          the name of the newest, for people and scripts
    checkpoints/step-0000500/   manifest.json, model/ (a Hugging Face model), state/
    checkpoints/step-0001000.tmp  being written, or left by a kill; never read

A folder counts by its own manifest, never by `latest`. No torch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from epctl.convert.writer import sync_folder, write_synced
from epctl.errors import InputError
from epctl.runtime.checkpoint_manifest import MANIFEST_NAME, Manifest, read_manifest
from epctl.runtime.faults import reached

STATE_FOLDER = "state"
MODEL_FOLDER = "model"
LATEST_NAME = "latest"
# What a kill may leave behind, in `checkpoints/` and in the run folder itself.
LEFTOVERS = ("*.tmp", "*.old", "*.purge")
_STEP = re.compile(r"step-(\d+)")


def checkpoints_folder(run_folder: Path) -> Path:
    return run_folder / "checkpoints"


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return checkpoints_folder(run_folder) / f"step-{step:07d}"


@dataclass(frozen=True)
class Listed:
    """A `step-N` folder: its manifest, or why it does not count."""

    folder: Path
    step: int
    manifest: Manifest | None
    reason: str | None


def list_checkpoints(run_folder: Path) -> list[Listed]:
    """Returns every `step-N` folder of a run, oldest first, finished or not."""
    return [_listed(folder, step) for step, folder in sorted(_step_folders(run_folder))]


def _step_folders(run_folder: Path) -> Iterator[tuple[int, Path]]:
    for folder in checkpoints_folder(run_folder).glob("step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            yield int(match[1]), folder


def _listed(folder: Path, step: int) -> Listed:
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        return Listed(folder, step, None, error.message)
    if manifest.step != step:
        reason = f"`{folder}` holds a checkpoint of step {manifest.step}"
        return Listed(folder, step, None, reason)
    return Listed(folder, step, manifest, None)


def committed_checkpoints(run_folder: Path) -> list[Path]:
    """Returns the finished checkpoints of a run, oldest first; their bytes are not read."""
    return [found.folder for found in list_checkpoints(run_folder) if found.manifest is not None]


def newest_checkpoint(run_folder: Path) -> Path:
    """Returns the newest committed checkpoint; raises InputError if there is none."""
    if not (run_folder / "config.json").is_file():
        raise InputError(
            f"`{run_folder}` is no run folder: it has no config.json",
            hint="`--resume` takes the folder that an earlier `epctl train` wrote",
        )
    listed = list_checkpoints(run_folder)
    committed = [found.folder for found in listed if found.manifest is not None]
    if committed:
        return committed[-1]
    reasons = "".join(f"\n  {found.reason}" for found in listed)
    raise InputError(
        f"run `{run_folder}` has no checkpoint to resume from{reasons}",
        hint="train with `--set checkpoint.every=30min` to write them",
    )


def latest_defect(run_folder: Path) -> str | None:
    """Returns what is wrong with `latest`, None if it names the newest committed checkpoint."""
    path = checkpoints_folder(run_folder) / LATEST_NAME
    committed = [folder.name for folder in committed_checkpoints(run_folder)]
    try:
        named = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return f"`{path}` is missing" if committed else None
    except (OSError, UnicodeDecodeError) as error:
        return f"`{path}` cannot be read: {error}"
    if not named:
        return f"`{path}` is empty"
    if not committed or named != committed[-1]:
        newest = f"; the newest is `{committed[-1]}`" if committed else ""
        return f"`{path}` names `{named}`{newest}"
    return None


# --- publishing, on one rank -------------------------------------------------------------------


def publish(staging: Path, folder: Path, manifest_bytes: bytes) -> None:
    """Commits a written and synced folder: manifest, rename, parent, `latest`.

    Killed anywhere, either the folder counts whole or it has no name that counts.
    """
    write_synced(staging / MANIFEST_NAME, manifest_bytes)
    sync_folder(staging)
    reached("before rename")
    replace_folder(staging, folder)
    reached("before latest")
    point_latest(folder)


def point_latest(folder: Path) -> None:
    write_synced(folder.parent / LATEST_NAME, f"{folder.name}\n".encode())
    sync_folder(folder.parent)


def replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; what stood there goes only when the new one has its place.

    A kill in between leaves the earlier folder as `<name>.old`.
    """
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def purge(run_folder: Path, keep: int) -> list[str]:
    """Removes committed checkpoints older than the newest `keep`; returns what went wrong.

    Each is renamed first, so that a half-removed folder has no name that counts.
    """
    assert keep >= 2, "the newest two committed checkpoints are never removed"
    failures = []
    for folder in committed_checkpoints(run_folder)[:-keep]:
        try:
            remove_checkpoint(folder)
        except OSError as error:
            failures.append(f"`{folder}` was not removed: {error.strerror or error}")
    return failures


def remove_checkpoint(folder: Path) -> None:
    """Removes one checkpoint; raises OSError if it cannot be."""
    doomed = folder.with_name(folder.name + ".purge")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def put_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint so that it counts no more; returns its new name."""
    number = 0
    while (target := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    folder.rename(target)
    sync_folder(folder.parent)
    return target


def sweep(run_folder: Path) -> None:
    """Removes what a kill left half-written; only for whoever owns the run.

    A checkpoint whose replacement was killed between two renames gets its name back.
    """
    checkpoints = checkpoints_folder(run_folder)
    for old in checkpoints.glob("step-*.old"):
        original = old.with_suffix("")
        if not original.exists():
            os.rename(old, original)
    for folder in (run_folder, checkpoints):
        for pattern in LEFTOVERS:
            for path in folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
