"""CheckpointView: a checkpoint as named runs of bytes, whether one folder or many ranks hold it.

A tensor is a list of *extents*, byte ranges of files that follow each other. In a Hugging Face
folder each tensor has one; in a shard folder a fused tensor has one a rank, in expert order: dim 0
counts the experts, so the ranks' bytes laid end to end are the whole tensor. Merging and
re-sharding are therefore sharding read from another view.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from epctl.errors import InputError
from epctl.layout.detect import detect
from epctl.layout.model import MoELayout
from epctl.layout.parameters import is_stale
from epctl.layout.safetensors import DTYPE_BITS
from epctl.layout.source import ModelSource


class Extent(NamedTuple):
    """Bytes `start` to `end` of a file, named relative to the view's folder."""

    file: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def cut(extents: tuple[Extent, ...], start: int, end: int) -> tuple[Extent, ...]:
    """Returns bytes `start` to `end` of extents laid end to end."""
    found: list[Extent] = []
    position = 0
    for extent in extents:
        first, last = max(start, position), min(end, position + extent.num_bytes)
        if first < last:
            offset = extent.start - position
            found.append(Extent(extent.file, first + offset, last + offset))
        position += extent.num_bytes
    return tuple(found)


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor: dtype as safetensors names it, whole shape, where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a tensor."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint that can be planned on.

    `record` says where the weights come from first of all (a shard folder repeats its source's).
    `origin` maps the names of the checkpoint that a merge restores to their files. `dropped` and
    `changed` are what earlier conversions left out or widened.
    """

    id: str
    folder: Path | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorView]
    moe: MoELayout | None
    origin_moe: MoELayout | None
    family: str | None
    origin: Mapping[str, str]
    record: Mapping[str, Any]
    file_sizes: Mapping[str, int]
    dropped: tuple[Mapping[str, str], ...] = ()
    changed: tuple[Mapping[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    correction_biases: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    manifest: Mapping[str, Any] | None = None

    def path(self, file: str) -> Path:
        """Returns where a file of the view lies. Raises InputError for one that is elsewhere."""
        if self.folder is None:
            raise InputError(
                f"`{self.id}` is not on this disk, only its description was read",
                hint=f"download it first: `hf download {self.id}`",
            )
        return self.folder / file

    def identity(self) -> str:
        """Returns a digest that changes when a file of the view is replaced or written to."""
        state = []
        for file in sorted(self.file_sizes):
            path = self.path(file)
            try:
                status = path.stat()
            except OSError as error:
                raise InputError(f"`{path}` cannot be read: {error.strerror}") from None
            state.append([file, status.st_size, status.st_mtime_ns, status.st_ino])
        return hashlib.sha256(json.dumps([state, self.record]).encode()).hexdigest()


def view_of_model(source: ModelSource) -> CheckpointView:
    """Returns the view of a hub snapshot or folder; detects its experts.

    Raises LayoutError for tensors that contradict each other or the config.
    """
    layout = detect(source)
    shards = list(source.file_sizes) or sorted({e.file for e in source.tensors.values()})
    rank_of_file = {file: position for position, file in enumerate(shards)}
    ordered = sorted(
        source.tensors.items(), key=lambda item: (rank_of_file[item[1].file], item[1].start)
    )
    # The catalog knows dtypes and shapes only; its offsets are all 0.
    tensors = {
        name: TensorView(
            entry.dtype,
            entry.shape,
            (Extent(entry.file, entry.start, entry.start + num_bytes(entry.dtype, entry.shape)),),
        )
        for name, entry in ordered
    }
    biases: set[str] = set()
    if layout.moe is not None:
        for layer in layout.moe.layers:
            bias = layout.moe.router_tensors(layer).get("correction_bias")
            biases |= {bias} if bias else set()
    return CheckpointView(
        id=source.id,
        folder=source.folder,
        config=source.config,
        tensors=tensors,
        moe=layout.moe,
        origin_moe=layout.moe,
        family=layout.family,
        origin={name: source.tensors[name].file for name in tensors},
        record=_record(source),
        file_sizes=source.file_sizes,
        correction_biases=frozenset(biases),
        warnings=tuple(source.warnings),
    )


def _record(source: ModelSource) -> dict[str, Any]:
    """Returns what a manifest says of the source; equal for equal headers, wherever they lie."""
    table = [
        [name, entry.dtype, list(entry.shape), entry.file, entry.start]
        for name, entry in sorted(source.tensors.items())
    ]
    text = json.dumps([source.config, dict(sorted(source.file_sizes.items())), table])
    in_folder = source.kind == "folder" and source.folder is not None
    return {
        "id": source.folder.resolve().name if in_folder and source.folder else source.id,
        "revision": source.revision,
        "headers_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def stale_reason(name: str) -> str | None:
    """Returns why a tensor is left out of every output, None when it is kept."""
    if is_stale(name):
        return "stale: the model computes it itself"
    return None
