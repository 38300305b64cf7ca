"""Writes a committed checkpoint folder without any rank: what the launcher's side needs to see."""

from __future__ import annotations

import shutil
from pathlib import Path

from epctl.runtime.checkpoint_manifest import (
    MANIFEST_NAME,
    Topology,
    manifest_document,
    manifest_text,
    record_of,
)
from epctl.runtime.run_checkpoints import checkpoint_folder, point_latest


def write_checkpoint(
    run: Path,
    step: int,
    *,
    model: Path | None = None,
    topology: Topology = Topology(2, 2, 3),
) -> Path:
    """Returns `RUN/checkpoints/step-N` with a manifest of what is in it."""
    folder = checkpoint_folder(run, step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "run.json").write_text(f'{{"step": {step}}}')
    if model is not None:
        shutil.copytree(model, folder / "model")
    files = {
        str(path.relative_to(folder)): record_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    document = manifest_document(step, topology, {"name": "tiny"}, files)
    (folder / MANIFEST_NAME).write_bytes(manifest_text(document))
    point_latest(folder)
    return folder
