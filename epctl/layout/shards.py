"""From shard headers and an index to one tensor table, with every disagreement told.

InputError
`-- CheckpointIndexError       a defect of model.safetensors.index.json or of the set of shards
    |-- UnsafePathError        a shard name that could leave the folder
    |-- MissingShardError      the index names a file that is not there
    |-- MissingTensorError     the index names a tensor that its shard does not hold
    `-- RepeatedTensorError    a tensor in two shards and no index to decide
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from epctl.errors import InputError
from epctl.layout.safetensors import ShardHeader, TensorEntry, check_name, parse_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# One path component that is safe under POSIX and Windows rules alike.
_SAFE_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-=@ ]*\.safetensors")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


class CheckpointIndexError(InputError):
    """A defect of the index or of the set of shards."""


class UnsafePathError(CheckpointIndexError):
    pass


class MissingShardError(CheckpointIndexError):
    pass


class MissingTensorError(CheckpointIndexError):
    pass


class RepeatedTensorError(CheckpointIndexError):
    pass


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """`model.safetensors.index.json`: which shard holds each tensor, and the bytes it claims."""

    weight_map: Mapping[str, str]
    total_size: int | None

    @property
    def shards(self) -> list[str]:
        """Shard file names in order of first use."""
        return list(dict.fromkeys(self.weight_map.values()))


def safe_shard_name(name: Any, *, index: str) -> str:
    """Returns `name` if it is a plain .safetensors file name; raises UnsafePathError otherwise."""
    text = name if isinstance(name, str) else repr(name)
    shown = text.encode("unicode_escape").decode("ascii")[:120]
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise UnsafePathError(
            f"`{index}` names the shard `{shown}`, which is no .safetensors file",
            hint="pickled weights can run code when loaded; use a safetensors checkpoint",
        )
    if not _SAFE_SHARD.fullmatch(name) or ".." in name or _RESERVED.fullmatch(name):
        raise UnsafePathError(
            f"`{index}` names the shard `{shown}`; only plain file names beside the index are read",
            hint="a path, a drive or a device name in an index is an attack or a mistake",
        )
    return name


def parse_index(data: bytes, *, file: str = INDEX_NAME) -> CheckpointIndex:
    """Returns the validated index. Raises HeaderSyntaxError or a CheckpointIndexError."""
    document = parse_json_object(data, file=file, what="index")
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointIndexError(f"`{file}` has no `weight_map` object that names shards")
    for name in dict.fromkeys(map(_hashable, weight_map.values())):
        safe_shard_name(name, index=file)
    for name in weight_map:
        check_name(name, file)
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = int(total) if isinstance(total, int | float) and 0 <= total < 2**63 else None
    return CheckpointIndex(weight_map, size)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) else repr(value)


def merge_shards(
    headers: Iterable[ShardHeader], index: CheckpointIndex | None
) -> tuple[dict[str, TensorEntry], list[str]]:
    """Returns the tensor table and warnings.

    With an index the index decides which shard counts; without one every tensor must be unique.
    Raises MissingShardError, MissingTensorError or RepeatedTensorError.
    """
    by_file = {header.file: header for header in headers}
    if index is None:
        return _merge_unindexed(by_file.values()), []
    table: dict[str, TensorEntry] = {}
    absent: list[tuple[str, str]] = []
    for name, file in index.weight_map.items():
        header = by_file.get(file)
        if header is None:
            raise MissingShardError(
                f"the index names `{file}` (for `{name}`), which is not there",
                hint="the download is incomplete; fetch the missing shard",
            )
        entry = header.tensors.get(name)
        if entry is None:
            absent.append((name, file))
        else:
            table[name] = entry
    if absent:
        name, file = absent[0]
        raise MissingTensorError(
            f"the index says that `{file}` holds `{name}`; its header does not "
            f"({len(absent)} such {'tensor' if len(absent) == 1 else 'tensors'})",
            hint="the index belongs to another upload; loaders would leave these weights random",
        )
    return table, _index_warnings(by_file.values(), index, table)


def _merge_unindexed(headers: Iterable[ShardHeader]) -> dict[str, TensorEntry]:
    table: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if name in table:
                raise RepeatedTensorError(
                    f"tensor `{name}` is in `{table[name].file}` and in `{header.file}`, "
                    f"and there is no `{INDEX_NAME}` to decide",
                    hint="remove the files that do not belong to the checkpoint",
                )
            table[name] = entry
    return table


def _index_warnings(
    headers: Iterable[ShardHeader], index: CheckpointIndex, table: Mapping[str, TensorEntry]
) -> list[str]:
    unlisted: list[str] = []
    repeated: list[str] = []
    for header in headers:
        for name in header.tensors:
            if name not in index.weight_map:
                unlisted.append(f"`{name}` in `{header.file}`")
            elif index.weight_map[name] != header.file:
                repeated.append(f"`{name}` in `{header.file}` (used: `{index.weight_map[name]}`)")
    warnings = []
    if unlisted:
        warnings.append(
            f"{len(unlisted)} tensors stand in shards but not in the index and are ignored, "
            f"first {unlisted[0]}"
        )
    if repeated:
        warnings.append(
            f"{len(repeated)} tensors stand in two shards; the index decides, first {repeated[0]}"
        )
    num_bytes = sum(entry.num_bytes for entry in table.values())
    if index.total_size is not None and index.total_size != num_bytes:
        warnings.append(f"the index claims {index.total_size} bytes, its tensors have {num_bytes}")
    return warnings
