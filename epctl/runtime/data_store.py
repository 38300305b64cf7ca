"""Tokenised documents on disk: every rank writes a share, every rank reads all of them.

Documents stand in the order of their numbers (data_reading.py), which do not depend on the number
of ranks. Files hold plain numbers; memory stays at the page cache's mercy however large the data
is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epctl.errors import InputError
from epctl.runtime.data_encode import Encoded, Encoder
from epctl.runtime.data_files import Record
from epctl.runtime.data_packing import Integers
from epctl.runtime.visual_records import StoredVisual

ID_TYPE = np.int32
# Fibonacci hashing spreads record numbers evenly, so held-out documents come from all over.
SPREAD = 0x9E3779B97F4A7C15


@dataclass
class StoredCounts:
    """What was written, by one rank or by all of them."""

    documents: int = 0
    tokens: int = 0
    targets: int = 0
    without_target: int = 0
    images: int = 0
    videos: int = 0

    def __add__(self, other: StoredCounts) -> StoredCounts:
        mine, theirs = vars(self), vars(other)
        return StoredCounts(**{name: mine[name] + theirs[name] for name in mine})


class DocumentWriter:
    """Appends documents to `<stem>.ids`, `.trained`, `.visuals` and, at the end, `.npy`.

    Of images their names and places are stored, as JSON; a row of the table has the record's
    number, its tokens and the bytes of that JSON.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.counts = StoredCounts()
        self._ids = stem.with_suffix(".ids").open("wb")
        self._trained = stem.with_suffix(".trained").open("wb")
        self._visuals = stem.with_suffix(".visuals").open("wb")
        self._rows: list[tuple[int, int, int]] = []

    def add(self, number: int, document: Encoded) -> int:
        """Adds the document of record `number`; returns its tokens, 0 for one without a target."""
        ids = np.asarray(document.ids, dtype=ID_TYPE)
        trained = np.ones(len(ids), dtype=np.uint8)
        if document.trained is not None:
            trained = np.asarray(document.trained, dtype=np.uint8)
        if not trained[1:].any():
            self.counts.without_target += 1
            return 0
        self._ids.write(ids.tobytes())
        self._trained.write(trained.tobytes())
        visuals = b""
        if document.visuals:
            visuals = json.dumps([v.to_document() for v in document.visuals]).encode()
            self._visuals.write(visuals)
        self._rows.append((number, len(ids), len(visuals)))
        self.counts.images += sum(v.modality == "image" for v in document.visuals)
        self.counts.videos += sum(v.modality == "video" for v in document.visuals)
        self.counts.documents += 1
        self.counts.tokens += len(ids)
        self.counts.targets += int(trained[1:].sum())
        return len(ids)

    def close(self) -> StoredCounts:
        self._ids.close()
        self._trained.close()
        self._visuals.close()
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, 3)
        np.save(self.stem.with_suffix(".npy"), rows, allow_pickle=False)
        return self.counts


class StoredDocuments:
    """The documents of all ranks' files, in the order of the source."""

    def __init__(self, stems: Iterable[Path]) -> None:
        parts = [_Part(stem) for stem in stems]
        index = np.concatenate([part.rows[:, 0] for part in parts])
        order = np.argsort(index, kind="stable")
        self._parts = parts
        self._part = np.repeat(np.arange(len(parts)), [len(p.rows) for p in parts])[order]
        self._row = np.concatenate([np.arange(len(p.rows)) for p in parts])[order]
        self._start = np.concatenate([part.starts for part in parts])[order]
        self.lengths: Integers = np.concatenate([part.rows[:, 1] for part in parts])[order]

    def tokens(self, document: int, start: int, stop: int) -> tuple[Integers, Integers]:
        part = self._parts[int(self._part[document])]
        first = int(self._start[document])
        piece = slice(first + start, first + stop)
        return part.ids[piece], part.trained[piece].astype(bool)

    def visuals(self, document: int) -> tuple[StoredVisual, ...]:
        """Returns the images and clips of a document, in the order of its tokens."""
        part = self._parts[int(self._part[document])]
        return part.visuals_of(int(self._row[document]))


class _Part:
    def __init__(self, stem: Path) -> None:
        self.rows = np.load(stem.with_suffix(".npy"), allow_pickle=False)
        self.starts = np.cumsum(self.rows[:, 1]) - self.rows[:, 1]
        self.ids = _memory_map(stem.with_suffix(".ids"), ID_TYPE)
        self.trained = _memory_map(stem.with_suffix(".trained"), np.uint8)
        has_visuals = self.rows.shape[1] > 2  # older runs stored none
        sizes = self.rows[:, 2] if has_visuals else np.zeros(len(self.rows), dtype=np.int64)
        self._ends = np.cumsum(sizes)
        self._sizes = sizes
        self._visuals = stem.with_suffix(".visuals")

    def visuals_of(self, row: int) -> tuple[StoredVisual, ...]:
        size = int(self._sizes[row])
        if not size:
            return ()
        with self._visuals.open("rb") as file:
            file.seek(int(self._ends[row]) - size)
            return tuple(map(StoredVisual.from_document, json.loads(file.read(size))))


def _memory_map(path: Path, dtype: Any) -> Integers:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def is_held_out(index: int, share: float) -> bool:
    """True for about `share` of all record numbers, the same ones everywhere."""
    return (index * SPREAD) % 2**64 < share * 2**64


def encode(record: Record, encoder: Encoder, vocab_size: int) -> Encoded:
    """Returns the document of a record.

    Raises InputError for a record that is none, or a token id that the model has no row for.
    """
    where = record.where
    document = encoder(record.values, where, record.folder)
    highest = max(document.ids, default=0)
    if highest >= vocab_size:
        raise InputError(
            f"{where}: token id {highest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}: the tokenizer belongs to another model",
            hint="give the model's own tokenizer with `--tokenizer PATH|ID`",
        )
    return document
