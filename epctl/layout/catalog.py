"""The bundled catalog: sourced facts of well-known public models, for answers without a network.

A file holds the published config and the folded tensor table of the published checkpoint, so that
a catalog entry goes through the same detection as files do. tests/layout/build_catalog.py makes it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from epctl.layout.names import unfold_name
from epctl.layout.safetensors import TensorEntry
from epctl.layout.source import ModelSource


def _folder() -> Any:
    return resources.files(__package__) / "catalog"


@functools.cache
def catalog_files() -> Mapping[str, str]:
    """Returns the file of each model id in the catalog, aliases included."""
    table: dict[str, str] = {}
    for file in sorted(_folder().iterdir(), key=lambda item: str(item.name)):
        if file.name.endswith(".json"):
            table[file.name.removesuffix(".json").replace("--", "/", 1)] = file.name
    # Only aliases need the files opened; ids are in the names, so that a hit opens one file.
    return table


@functools.cache
def read_entry(file: str) -> Mapping[str, Any]:
    """Returns a catalog file as it stands."""
    document: Mapping[str, Any] = json.loads((_folder() / file).read_text(encoding="utf-8"))
    return document


def find_entry(model_id: str) -> Mapping[str, Any] | None:
    """Returns the entry of a hub id or of one of its aliases, None when there is none.

    Upper and lower case are the same, as they are on the hub.
    """
    files = {name.lower(): file for name, file in catalog_files().items()}
    wanted = model_id.lower()
    if wanted in files:
        return read_entry(files[wanted])
    for file in files.values():
        entry = read_entry(file)
        if wanted in map(str.lower, entry["aliases"]):
            return entry
    return None


def catalog_source(model_id: str, *, notes: tuple[str, ...] = ()) -> ModelSource | None:
    """Returns a ModelSource of the catalog, None when the id is not in it.

    Offsets are zero and `revision` is None: the catalog describes a model, not files of a commit.
    """
    entry = find_entry(model_id)
    if entry is None:
        return None
    tensors = {
        name: TensorEntry(dtype, tuple(shape), "", 0, 0)
        for folded, dtype, shape in entry["tensors"]
        for name in unfold_name(folded)
    }
    if entry["id"].lower() != model_id.lower():
        notes = (*notes, f"`{model_id}` is described by its sibling `{entry['id']}`")
    return ModelSource(
        id=model_id, kind="catalog", config=entry["config"], tensors=tensors, notes=notes
    )
