"""Packs tokenised documents into rows of one length and keeps their boundaries. Pure numpy.

Shape suffixes: S tokens of a row. A *span* is a piece of one document inside a row. Positions
restart at every span, from which transformers builds a block-diagonal causal mask, and the first
token of a span is no target: what stands before it belongs to another document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

Integers = np.ndarray[Any, np.dtype[Any]]

IGNORED = -100


class Documents(Protocol):
    """Tokenised documents in a fixed order; they may live on disk."""

    lengths: Integers

    def tokens(self, document: int, start: int, stop: int) -> tuple[Integers, Integers]:
        """Returns (token ids, whether each is trained on) of a piece of a document."""


class Span(NamedTuple):
    """Tokens `[start, stop)` of a document."""

    document: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Row:
    """One training row; `labels_S` is `IGNORED` where nothing is learned."""

    ids_S: Integers
    labels_S: Integers
    positions_S: Integers


def stream_spans(lengths: Integers, length: int) -> list[list[Span]]:
    """Returns the rows of all documents laid end to end and cut every `length` tokens.

    The rest that fills no row is dropped, unless it is all there is.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    num_rows = total // length or int(total > 0)
    return [
        list(_between(lengths, ends, row * length, min(total, (row + 1) * length)))
        for row in range(num_rows)
    ]


def _between(lengths: Integers, ends: Integers, begin: int, stop: int) -> Iterator[Span]:
    document = int(np.searchsorted(ends, begin, side="right"))
    while begin < stop:
        first = int(ends[document] - lengths[document])
        last = min(stop, int(ends[document]))
        if last > begin:
            yield Span(document, begin - first, last - first)
        begin = last
        document += 1


def whole_spans(lengths: Integers, length: int, *, packing: bool) -> list[list[Span]]:
    """Returns rows that hold whole documents, several a row with `packing`.

    Documents are taken in order, a row is closed when the next one does not fit; what is longer
    than a row loses its end.
    """
    rows: list[list[Span]] = []
    room = 0
    for document, size in enumerate(lengths.tolist()):
        span = Span(document, 0, min(size, length))
        if packing and rows and span.num_tokens <= room:
            rows[-1].append(span)
        else:
            rows.append([span])
            room = length
        room -= span.num_tokens
    return rows


def chopped_spans(lengths: Integers, length: int) -> list[list[Span]]:
    """Returns rows of one document each; long documents take several rows."""
    return [
        [Span(document, start, min(size, start + length))]
        for document, size in enumerate(lengths.tolist())
        for start in range(0, size, length)
    ]


class PackedRows:
    """Rows over documents, built when asked for; `len` is their number."""

    def __init__(
        self, documents: Documents, spans: Sequence[list[Span]], length: int, pad_id: int
    ) -> None:
        self.documents = documents
        self.spans = spans
        self.length = length
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> Row:
        ids = np.full(self.length, self.pad_id, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        positions = np.empty(self.length, dtype=np.int64)
        place = 0
        for span in self.spans[row]:
            tokens, trained = self.documents.tokens(*span)
            here = slice(place, place + span.num_tokens)
            ids[here] = tokens
            labels[here] = np.where(trained, tokens, IGNORED)
            labels[place] = IGNORED
            positions[here] = np.arange(span.num_tokens)
            place += span.num_tokens
        # Padding is a document of its own, so no real token attends to it.
        positions[place:] = np.arange(self.length - place)
        return Row(ids, labels, positions)

    def first(self, count: int) -> PackedRows:
        """Returns the first `count` rows."""
        return self._part(slice(0, count))

    def split_tail(self, share: float) -> tuple[PackedRows, PackedRows]:
        """Returns (all rows but the last, the last `share` of rows, at least one)."""
        count = max(1, round(len(self) * share))
        return self._part(slice(0, len(self) - count)), self._part(slice(len(self) - count, None))

    def _part(self, rows: slice) -> PackedRows:
        return PackedRows(self.documents, self.spans[rows], self.length, self.pad_id)


class RowOrder:
    """Which row stands at a global position: a pure function of seed and position.

    Each pass over the rows is a permutation of its own, so a run resumes at any position without
    replaying what came before. With `window` rows are permuted within windows of so many: the
    order of the first windows is then the same whatever follows them.
    """

    def __init__(
        self, num_rows: int, seed: int, *, shuffle: bool, window: int | None = None
    ) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.window = window or num_rows
        self._permutations: dict[tuple[int, int], Integers] = {}

    def row_at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if not self.shuffle:
            return place
        part, place = divmod(place, self.window)
        first = part * self.window
        return first + int(self._permutation(epoch, part)[place])

    def _permutation(self, epoch: int, part: int) -> Integers:
        if (epoch, part) not in self._permutations:
            # The first window is seeded as the whole is without windows.
            seed = [self.seed, epoch, part] if part else [self.seed, epoch]
            size = min(self.window, self.num_rows - part * self.window)
            # The one before is kept: ranks' positions straddle the seam.
            kept = dict(list(self._permutations.items())[-1:])
            drawn = np.random.Generator(np.random.PCG64(seed)).permutation(size)
            self._permutations = kept | {(epoch, part): drawn}
        return self._permutations[epoch, part]
