"""ModelSource: what is known of a model before anything is interpreted, and the local reader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epctl.errors import InputError
from epctl.layout.safetensors import (
    LENGTH_BYTES,
    ShardHeader,
    TensorEntry,
    header_size,
    parse_header,
    parse_json_object,
)
from epctl.layout.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointIndex,
    MissingShardError,
    UnsafePathError,
    merge_shards,
    parse_index,
)

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 32_000_000
MAX_INDEX_BYTES = 200_000_000
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as its files describe it: config and tensor table, nothing interpreted.

    `kind` is hub, cache (hub files on this disk), folder or catalog; `revision` the 40-hex commit
    when the hub knows one; `folder` where the shards lie when they are on this disk; `tensors`
    maps each name to dtype, shape, file and byte offsets (in the catalog the offsets are 0).
    """

    id: str
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    revision: str | None = None
    folder: Path | None = None
    file_sizes: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def shard_path(self, file: str) -> Path:
        """Returns where a shard lies on this disk. Raises InputError when it does not."""
        if self.folder is None:
            raise InputError(
                f"`{self.id}` was read from the {self.kind}; `{file}` is not on this disk",
                hint=f"download it first: `hf download {self.id}`",
            )
        return self.folder / file


def is_pickle(file: str) -> bool:
    """True for file names of pickled weights."""
    return file.lower().endswith(_PICKLES)


def choose_weights(files: list[str], where: str) -> str | list[str]:
    """Returns the index's name, or the shards to read when there is no index.

    `files` are names in the model's folder, `where` names it for messages. Raises InputError when
    there are no safetensors, saying what is there instead.
    """
    if INDEX_NAME in files:
        return INDEX_NAME
    if SINGLE_NAME in files:
        return [SINGLE_NAME]
    shards = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    if shards:
        return shards
    gguf = [file for file in files if file.lower().endswith(".gguf")]
    if gguf:
        raise InputError(
            f"{where} holds GGUF (`{gguf[0]}`): weights re-quantised for inference, "
            "which cannot be trained or sharded",
            hint="use the safetensors repository that it was made from",
        )
    pickles = [file for file in files if is_pickle(file)]
    if pickles:
        raise InputError(
            f"{where} holds only pickled weights (`{pickles[0]}`), which can run code when opened",
            hint="convert them once, in a sandbox, with safetensors' `convert.py`",
        )
    raise InputError(
        f"{where} holds no .safetensors file", hint="is this the folder of a model checkpoint?"
    )


def parse_config(data: bytes, *, file: str = CONFIG_NAME) -> dict[str, Any]:
    """Returns config.json as a plain dict; nothing it names is imported or run."""
    return parse_json_object(data, file=file, what="config", constants=True)


def read_folder(
    folder: Path, *, id: str | None = None, kind: str = "folder", revision: str | None = None
) -> ModelSource:
    """Reads config, index and shard headers of a local folder.

    Raises InputError or one of its subclasses for whatever is missing, damaged or unsafe.
    """
    where = f"`{folder}`"
    files = sorted(entry.name for entry in folder.iterdir())
    weights = choose_weights(files, where)
    config = parse_config(_read_small(folder, CONFIG_NAME, MAX_CONFIG_BYTES, where))
    index: CheckpointIndex | None = None
    shards = weights if isinstance(weights, list) else []
    if isinstance(weights, str):
        index = parse_index(_read_small(folder, weights, MAX_INDEX_BYTES, where))
        shards = index.shards
    _check_shard_paths(folder, shards, files)
    headers = [read_shard_header(folder / shard) for shard in shards]
    tensors, warnings = merge_shards(headers, index)
    return ModelSource(
        id=id or str(folder),
        kind=kind,
        config=config,
        tensors=tensors,
        revision=revision,
        folder=folder,
        file_sizes={header.file: header.file_size for header in headers},
        warnings=tuple(warnings),
    )


def _read_small(folder: Path, name: str, limit: int, where: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise InputError(f"{where} has no `{name}`", hint="is this the folder of a model?")
    size = path.stat().st_size
    if size > limit:
        raise InputError(f"`{path}` has {size} bytes; at most {limit} are read")
    return path.read_bytes()


def _check_shard_paths(folder: Path, shards: list[str], files: list[str]) -> None:
    present = set(files)
    roots = _allowed_roots(folder)
    for shard in shards:
        if shard not in present:
            raise MissingShardError(
                f"the index names `{shard}`, which is not in `{folder}`",
                hint="the download is incomplete; fetch the missing shard",
            )
        target = os.path.realpath(folder / shard)
        if os.path.dirname(target) not in roots:
            raise UnsafePathError(
                f"`{folder / shard}` is a link that leaves its folder, to `{target}`",
                hint="copy or hard-link the shard into the folder, or inspect the folder "
                "that it points to",
            )


def _allowed_roots(folder: Path) -> set[str]:
    real = os.path.realpath(folder)
    roots = {real}
    # The hub's cache keeps `snapshots/<sha>/file` as links into the same repository's `blobs`.
    snapshots = os.path.dirname(real)
    if os.path.basename(snapshots) == "snapshots":
        roots.add(os.path.join(os.path.dirname(snapshots), "blobs"))
    return roots


def read_shard_header(path: Path) -> ShardHeader:
    """Returns the validated header of a local shard, reading the header's bytes only.

    Raises HeaderError for a defect, InputError when the file cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file_size = os.fstat(file.fileno()).st_size
            start = file.read(LENGTH_BYTES)
            size = header_size(start, file=path.name, file_size=file_size)
            data = b""
            while len(data) < size:
                more = file.read(size - len(data))
                if not more:
                    break
                data += more
    except OSError as error:
        raise InputError(f"`{path}` cannot be read: {error.strerror}") from None
    return parse_header(data, file=path.name, file_size=file_size)
