"""Training text of the embedded default: the Python sources that every machine here has.

Samples are drawn by index alone, so order depends on seed and batch layout, never on ranks' speed.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epctl.errors import InputError
from epctl.runtime.data_batch import Batch

# One file in ten is held out, chosen by its name, so the split is the same everywhere.
HELD_OUT_SHARE = 10
MAX_BYTES = 16 * 2**20
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib"})


@dataclass(frozen=True)
class ByteCorpus:
    """Two byte arrays: what is trained on and what is held out."""

    train: np.ndarray[tuple[int], np.dtype[np.uint8]]
    held_out: np.ndarray[tuple[int], np.dtype[np.uint8]]


def standard_library_corpus(folder: Path | None = None) -> ByteCorpus:
    """Reads this Python's standard library sources, at most 16 MiB.

    Raises InputError if there is too little text (a stripped Python installation).
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    total = 0
    for path in sorted(_sources(root)):
        if total >= MAX_BYTES:
            break
        text = path.read_bytes()
        total += len(text)
        digest = hashlib.sha256(path.name.encode()).digest()
        parts[digest[0] % HELD_OUT_SHARE == 0].append(text)
    if not parts[True] or not parts[False]:
        raise InputError(f"found only {total} bytes of Python sources under `{root}`")
    return ByteCorpus(_joined(parts[False]), _joined(parts[True]))


def _sources(root: Path) -> Iterator[Path]:
    """Gives Python files; site-packages, tens of thousands of them, are not walked through."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _joined(texts: list[bytes]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(b"\n".join(texts), dtype=np.uint8)


def sample_batch(
    text: np.ndarray[tuple[int], np.dtype[np.uint8]],
    first_index: int,
    batch_size: int,
    sequence_length: int,
    seed: int,
) -> Tensor:
    """Returns token ids [batch_size, sequence_length] of samples `first_index` and following."""
    rows = []
    for index in range(first_index, first_index + batch_size):
        digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % (len(text) - sequence_length)
        rows.append(text[start : start + sequence_length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


class ByteData:
    """The embedded default's training data: samples of a corpus, drawn without end."""

    def __init__(self, corpus: ByteCorpus, sequence_length: int, seed: int) -> None:
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_train_rows: int | None = None

    def train_batch(self, first: int, count: int) -> Batch:
        return Batch.of_ids(
            sample_batch(self.corpus.train, first, count, self.sequence_length, self.seed)
        )

    def held_out_batch(self, first: int, count: int) -> Batch:
        return Batch.of_ids(
            sample_batch(self.corpus.held_out, first, count, self.sequence_length, seed=0)
        )

    def prompt(self, num_tokens: int) -> list[int]:
        return [int(byte) for byte in self.corpus.held_out[:num_tokens]]

    def prompt_inputs(self, num_tokens: int) -> dict[str, Any]:
        return {}
