"""A shard folder as a ModelSource, for those who read a checkpoint tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from epctl.convert.manifest import read_manifest
from epctl.convert.open import view_of_output
from epctl.errors import InputError
from epctl.layout.safetensors import TensorEntry
from epctl.layout.source import ModelSource


def shard_source(folder: Path) -> ModelSource | None:
    """Returns a shard folder as one checkpoint, None if `folder` is no shard folder.

    Files are named relative to the folder (`rank-00001/model-00001-of-00001.safetensors`), so a
    rank that reads its own experts opens its own files only.

    Raises InputError when a file is missing or damaged, and where one tensor's experts lie in
    several ranks' files, which a table of one place a tensor cannot say.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest["kind"] != "shard":
        return None
    view = view_of_output(folder, manifest)
    tensors: dict[str, TensorEntry] = {}
    for name, tensor in view.tensors.items():
        if len(tensor.extents) != 1:
            raise InputError(
                f"`{name}` lies in {len(tensor.extents)} ranks' files of `{folder}`, each with its "
                "own experts",
                hint=f"merge them first: `epctl convert merge {folder} -o MODEL`",
            )
        extent = tensor.extents[0]
        tensors[name] = TensorEntry(
            tensor.dtype, tensor.shape, extent.file, extent.start, extent.end
        )
    return ModelSource(
        id=str(folder),
        kind="folder",
        config=view.config,
        tensors=tensors,
        revision=view.record.get("revision"),
        folder=folder,
        file_sizes=view.file_sizes,
    )
