"""Reading a checkpoint's state by name and slice. Needs torch, not the engine."""

from __future__ import annotations

import bisect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epctl.errors import InputError
from epctl.layout.source import read_shard_header
from epctl.runtime.checkpoint_files import DTYPES

STAGING_BYTES = 64 * 2**20


def slice_name(name: str, key: str, start: int) -> str:
    """Returns what a stored slice is called: elements from `start` on of `key` of a tensor."""
    return f"{name}.{key}[{start}]"


@dataclass(frozen=True)
class _Stored:
    """Elements `[start, end)` of one tensor and key, at a byte of a file."""

    start: int
    end: int
    path: Path
    dtype: torch.dtype
    position: int


class StateReader:
    """Finds and reads slices of a checkpoint's state; holds 64 MiB of it at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_bytes = 0
        self._stored: dict[tuple[str, str], list[_Stored]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, entry in read_shard_header(path).tensors.items():
                base, _, start = name.removesuffix("]").rpartition("[")
                tensor, _, key = base.rpartition(".")
                dtype = DTYPES[entry.dtype]
                begin = int(start)
                length = (entry.end - entry.start) // dtype.itemsize
                stored = _Stored(begin, begin + length, path, dtype, entry.start)
                self._stored.setdefault((tensor, key), []).append(stored)
        for found in self._stored.values():
            found.sort(key=lambda s: s.start)
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def tensors(self) -> set[tuple[str, str]]:
        """Returns (tensor, key) of everything that is stored."""
        return set(self._stored)

    def has(self, name: str, key: str) -> bool:
        return (name, key) in self._stored

    def read_into(self, name: str, key: str, start: int, destination: Tensor) -> None:
        """Fills a 1-D tensor with elements from `start` on, converting their dtype.

        Raises InputError if the checkpoint does not hold all of them.
        """
        end = start + destination.numel()
        position = start
        found = self._stored.get((name, key), [])
        first = max(0, bisect.bisect_right([s.start for s in found], start) - 1)
        for stored in found[first:]:
            low, high = max(position, stored.start), min(end, stored.end)
            if low == position and low < high:
                self._copy(stored, low, destination.narrow(0, low - start, high - low))
                position = high
        if position < end:
            raise InputError(
                f"`{self.folder}` lacks `{key}` of `{name}` from element {position} on",
                hint="it was written with another optimizer or another `--train`; `epctl train "
                f"{self.folder.parent / 'model'}` starts a new run from its weights",
            )

    def read(self, name: str, key: str) -> Tensor:
        """Returns a whole stored tensor, 1-D."""
        found = self._stored.get((name, key))
        if not found:
            raise InputError(f"`{self.folder}` holds no `{slice_name(name, key, 0)}`")
        result = torch.empty(found[-1].end, dtype=found[0].dtype)
        self.read_into(name, key, 0, result)
        return result

    def _copy(self, stored: _Stored, start: int, destination: Tensor) -> None:
        if stored.path not in self._descriptors:
            self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
        size = stored.dtype.itemsize
        position = stored.position + (start - stored.start) * size
        step = STAGING_BYTES // size
        for begin in range(0, destination.numel(), step):
            part = destination[begin : begin + step]
            raw = torch.empty(part.numel() * size, dtype=torch.uint8)
            self._fill(raw, stored.path, position + begin * size)
            part.copy_(raw.view(stored.dtype))

    def _fill(self, raw: Tensor, path: Path, position: int) -> None:
        view: Any = memoryview(raw.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptors[path], [view[done:]], position + done)
            if count == 0:
                raise InputError(f"`{path}` ends early")
            done += count
        self.num_bytes += len(view)
