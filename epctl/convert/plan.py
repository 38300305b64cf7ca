"""The plan of an output: which file holds which bytes. Values to values; nothing is touched.

A shard folder:

    DIR/manifest.json  config.json  tokenizer files  model.safetensors.index.json
    DIR/rank-00000/model-00001-of-00002.safetensors ...  + its own index
    DIR/shared/...     what every rank needs (with `--replicate` inside each rank's folder)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epctl.convert.recipes import Block, LogicalTensor
from epctl.convert.restate import Restated
from epctl.errors import ConfigError
from epctl.layout.model import MoELayout
from epctl.layout.parallel import ep_sizes
from epctl.layout.safetensors import DTYPE_BITS, format_header
from epctl.layout.shards import INDEX_NAME, SINGLE_NAME

MAX_FILE_BYTES = 4 * 2**30
SHARED_FOLDER = "shared"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of a file: `shape` is what the file holds, a rank's part of a fused one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def num_bytes(self) -> int:
        return sum(block.num_bytes for block in self.blocks)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One safetensors file, its path relative to the output, tensors in order of their bytes."""

    path: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file, header included."""
        return len(self.header()) + sum(tensor.num_bytes for tensor in self.tensors)

    def header(self) -> bytes:
        """Returns the header with its length in front, padded so that data starts aligned."""
        return format_header((t.name, t.dtype, t.shape, t.num_bytes) for t in self.tensors)


@dataclass(frozen=True)
class OutputPlan:
    """Everything an output will hold.

    `indexes` maps the path of an index file to its tensor -> file map, `small_files` texts to
    write, `copied_files` names to take from the source's folder. `options` are what was asked.
    """

    kind: str
    options: Mapping[str, Any]
    files: tuple[PlannedFile, ...]
    indexes: Mapping[str, Mapping[str, str]]
    tensors: tuple[LogicalTensor, ...]
    moe: MoELayout | None
    ranks: tuple[int, ...]
    dropped: tuple[Mapping[str, str], ...]
    changed: tuple[Mapping[str, str], ...]
    origin: Mapping[str, str]
    origin_moe: MoELayout | None
    family: str | None

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def digest(self) -> str:
        """Returns a digest of every decision, so that a resumed run can tell it plans the same."""
        told = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode())
        for file in self.files:
            told.update(file.path.encode() + b"\0" + file.header())
        return told.hexdigest()


def rank_folder(rank: int) -> str:
    """Returns the folder of a rank inside a shard folder."""
    return f"rank-{rank:05d}"


def placement(num_experts: int, ep: int, rank: int) -> tuple[int, int]:
    """Returns the global experts of a rank, first and end: contiguous, equal parts."""
    share = num_experts // ep
    return rank * share, (rank + 1) * share


def require_legal_ep(moe: MoELayout | None, ep: int) -> None:
    """Raises ConfigError unless every layer's experts divide by `ep`."""
    if ep < 1:
        raise ConfigError(f"`--ep` is {ep}; at least 1 is needed")
    if moe is None:
        if ep > 1:
            raise ConfigError(
                f"the model has no routed experts, so they cannot be dealt out to {ep} ranks",
                hint="a dense model needs no sharding; `epctl train` reads it as it is",
            )
        return
    bad = next((n for n in moe.layers if moe.experts_of_layer(n) % ep), None)
    if bad is not None:
        legal = ep_sizes(moe.experts_of_layer(layer) for layer in moe.layers)
        raise ConfigError(
            f"`--ep {ep}` does not divide the {moe.experts_of_layer(bad)} experts of layer {bad}",
            hint=f"legal sizes: {', '.join(map(str, legal))}",
        )


def plan_shards(
    restated: Restated,
    ep: int,
    ranks: Sequence[int],
    *,
    replicate: bool,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> tuple[tuple[PlannedFile, ...], dict[str, dict[str, str]]]:
    """Returns the files of a shard folder and its indexes.

    Raises ConfigError for an expert-parallel size that does not divide the experts.
    """
    require_legal_ep(restated.moe, ep)
    shared = [whole(tensor) for tensor in restated.tensors if tensor.layer is None]
    folders: dict[str, list[PlannedTensor]] = {}
    if shared and not replicate:
        folders[SHARED_FOLDER] = shared
    for rank in ranks:
        experts = list(_rank_tensors(restated, ep, rank))
        mine = [*shared, *experts] if replicate else experts
        if mine:
            folders[rank_folder(rank)] = mine
    files: list[PlannedFile] = []
    for folder, tensors in folders.items():
        files += pack_files(tensors, f"{folder}/", max_file_bytes)
    return tuple(files), _shard_indexes(files, restated, ep, folders)


def whole(tensor: LogicalTensor) -> PlannedTensor:
    """Returns a tensor with all its experts."""
    return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tensor.blocks)


def _rank_tensors(restated: Restated, ep: int, rank: int) -> Iterable[PlannedTensor]:
    assert restated.moe is not None or ep == 1
    for tensor in restated.tensors:
        if tensor.layer is None or restated.moe is None:
            continue
        first, end = placement(restated.moe.experts_of_layer(tensor.layer), ep, rank)
        if tensor.num_experts:
            yield whole(tensor.experts(first, end))
        elif tensor.expert is not None and first <= tensor.expert < end:
            yield whole(tensor)


def pack_files(
    tensors: Sequence[PlannedTensor], prefix: str, max_file_bytes: int
) -> list[PlannedFile]:
    """Returns files of at most `max_file_bytes` of data (more where one tensor is larger)."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1 and not prefix:
        return [planned_file(SINGLE_NAME, groups[0])]
    return [
        planned_file(f"{prefix}model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def planned_file(path: str, tensors: Iterable[PlannedTensor]) -> PlannedFile:
    """Returns a file with its tensors in the order of their bytes.

    Wide dtypes go first: readers that map a file need each tensor at a multiple of its item size.
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    return PlannedFile(path, tuple(ordered))


def _shard_indexes(
    files: Sequence[PlannedFile], restated: Restated, ep: int, folders: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Returns one index a folder, and one over all where no name stands for two ranks' parts."""
    indexes: dict[str, dict[str, str]] = {}
    for folder in folders:
        indexes[f"{folder}/{INDEX_NAME}"] = {
            tensor.name: file.path.removeprefix(f"{folder}/")
            for file in files
            if file.path.startswith(f"{folder}/")
            for tensor in file.tensors
        }
    if ep == 1 or not any(tensor.num_experts for tensor in restated.tensors):
        everything: dict[str, str] = {}
        for file in files:
            for tensor in file.tensors:
                everything.setdefault(tensor.name, file.path)
        indexes[INDEX_NAME] = everything
    return indexes


def plan_model(
    restated: Restated, origin: Mapping[str, str], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[tuple[PlannedFile, ...], dict[str, dict[str, str]]]:
    """Returns the files of a Hugging Face folder and its index (none for a single file).

    Tensors go to the files of `origin`; when any has no file there, all are packed anew.
    """
    tensors = [whole(tensor) for tensor in restated.tensors]
    if all(tensor.name in origin for tensor in tensors):
        by_file: dict[str, list[PlannedTensor]] = {}
        for tensor in tensors:
            by_file.setdefault(origin[tensor.name], []).append(tensor)
        files = [planned_file(path, group) for path, group in by_file.items()]
    else:
        files = pack_files(tensors, "", max_file_bytes)
    if [file.path for file in files] == [SINGLE_NAME]:
        return tuple(files), {}
    weight_map = {tensor.name: file.path for file in files for tensor in file.tensors}
    return tuple(files), {INDEX_NAME: weight_map}
