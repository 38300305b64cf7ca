"""safetensors files of a checkpoint, written as bytes come, digested on the way and synced."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from epctl.convert.writer import WRITEBACK_BYTES, start_writeback, write_all
from epctl.layout.safetensors import format_header
from epctl.runtime.checkpoint_manifest import READ_BYTES, FileRecord
from epctl.runtime.faults import reached

SHARD_BYTES = 4 * 2**30
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: name, torch dtype, shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        num_elements = 1
        for size in self.shape:
            num_elements *= size
        return num_elements * self.dtype.itemsize


def group_entries(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Returns the entries in order, in files of `shard_bytes` and the tensor that goes over it."""
    files: list[list[Entry]] = []
    held = shard_bytes
    for entry in entries:
        if held >= shard_bytes:
            files.append([])
            held = 0
        files[-1].append(entry)
        held += entry.num_bytes
    return files


class TensorWriter:
    """Writes tensors, announced beforehand, in their order into one or more files.

    Holds none of their bytes: the header of each file is known before its first tensor comes.
    """

    def __init__(
        self, folder: Path, stem: str, entries: Sequence[Entry], shard_bytes: int | None = None
    ) -> None:
        self.folder = folder
        self.stem = stem
        self.files = group_entries(entries, SHARD_BYTES if shard_bytes is None else shard_bytes)
        self.records: dict[str, FileRecord] = {}
        self.index: dict[str, str] = {}
        self.num_tensor_bytes = sum(entry.num_bytes for entry in entries)
        self._waiting = [
            (number, entry) for number, file in enumerate(self.files) for entry in file
        ]
        self._current: _OpenFile | None = None
        self._current_number = -1

    def add(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Writes the next tensor; raises OSError if the disk does not take it."""
        number, entry = self._waiting.pop(0)
        assert entry.name == name, f"{name} comes where {entry.name} was announced"
        if number != self._current_number:
            self._finish_file()
            self._open_file(number)
        assert self._current is not None
        before = self._current.num_bytes
        for piece in pieces:
            self._current.write(piece)
        written = self._current.num_bytes - before
        assert written == entry.num_bytes, f"{name}: {written} bytes for {entry}"
        self.index[name] = self._current.path.name
        reached("mid file")

    def close(self) -> None:
        """Syncs the last file; every announced tensor must have come."""
        assert not self._waiting, f"{len(self._waiting)} tensors were announced and did not come"
        self._finish_file()

    def _open_file(self, number: int) -> None:
        path = self.folder / f"{self.stem}-{number + 1:05d}.safetensors"
        self._current = _OpenFile(path)
        self._current_number = number
        entries = ((e.name, DTYPE_NAMES[e.dtype], e.shape, e.num_bytes) for e in self.files[number])
        self._current.write(memoryview(format_header(entries)))

    def _finish_file(self) -> None:
        if self._current is not None:
            self.records[self._current.path.name] = self._current.close()
            self._current = None


class _OpenFile:
    """A file being written: what went into it so far, and its digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._flushed = 0
        self._digest = hashlib.sha256()
        self._file = path.open("wb", buffering=0)

    def write(self, data: memoryview) -> None:
        for begin in range(0, len(data), READ_BYTES):
            piece = data[begin : begin + READ_BYTES]
            self._digest.update(piece)
            self.num_bytes += write_all(self._file.fileno(), piece)
        if self.num_bytes - self._flushed >= WRITEBACK_BYTES:
            start_writeback(self._file.fileno(), self._flushed, self.num_bytes - self._flushed)
            self._flushed = self.num_bytes

    def close(self) -> FileRecord:
        with self._file:
            os.fsync(self._file.fileno())
        return FileRecord(self.num_bytes, self._digest.hexdigest())
