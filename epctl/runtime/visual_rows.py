"""Packed rows of documents with images: rotary positions by document, pixels when drawn.

Shape suffixes: B sequences, S tokens. Positions of a row are
[S], or [4, S] where the model has rotary positions of its own: a count that restarts at each
document, by which attention is kept apart, above time, height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from epctl.errors import InputError
from epctl.runtime.data_batch import Batch, PackedData
from epctl.runtime.data_packing import IGNORED, Documents, Integers, PackedRows, Span
from epctl.runtime.visual_files import VisualFiles
from epctl.runtime.visual_processor import Document, Opened, VisualLimits, VisualProcessor
from epctl.runtime.visual_records import StoredVisual


class VisualDocuments(Documents, Protocol):
    """Documents that know their images."""

    def visuals(self, document: int) -> Sequence[StoredVisual]:
        """Returns the images and clips of a document, in the order of its tokens."""


def usable_lengths(documents: VisualDocuments, length: int, *, together: bool = False) -> Integers:
    """Returns how many tokens of each document a row of `length` takes.

    What is longer loses its end. A document of which nothing is left to learn has length 0.

    Args:
        together: of the model's processor; see `whole_stop`.
    """
    lengths = documents.lengths.copy()
    for document in np.flatnonzero(lengths > length).tolist():
        stop = whole_stop(documents.visuals(document), length, together=together)
        _, trained = documents.tokens(document, 0, stop)
        lengths[document] = stop if trained[1:].any() else 0
    return lengths


def whole_stop(visuals: Sequence[StoredVisual], stop: int, *, together: bool) -> int:
    """Returns where a document that must end before `stop` ends: no image is cut apart.

    Args:
        together: images that are cut as the others of their document let them go as one.
    """
    for visual in visuals:
        if visual.start < stop < visual.stop:
            stop = visual.start
    lost = [visual for visual in visuals if visual.stop > stop]
    return min(stop, visuals[0].start) if together and lost else stop


def without_empty(rows: Iterable[list[Span]]) -> list[list[Span]]:
    """Returns the rows without spans of no token."""
    kept = [[span for span in row if span.num_tokens] for row in rows]
    return [row for row in kept if row]


@dataclass(frozen=True)
class VisualReader:
    """What opens images and says where their tokens stand."""

    processor: VisualProcessor
    files: VisualFiles
    limits: VisualLimits

    def document(self, visuals: Sequence[StoredVisual]) -> Document:
        """Returns a document's images as the model is given them, read from the disk now.

        Raises InputError if a file is not what it was when its tokens were counted.
        """
        opened = [Opened(v.modality, self._open(v)) for v in visuals]
        found = self.processor.document(opened, self.limits)
        for visual, grid in zip(visuals, found.grids, strict=True):
            if grid != visual.grid:
                raise InputError(
                    f"`{visual.files[0]}` has changed: {grid} {self.processor.grid_unit} now "
                    f"(frames, height, width), {visual.grid} when its tokens were counted",
                    hint="put the old file back, or start a new run",
                )
        return found

    def _open(self, visual: StoredVisual) -> list[Any]:
        if visual.modality == "image":
            return [self.files.open(visual.files[0])]
        return self.files.frames(visual.files, visual.frames)

    def inputs(self, documents: Iterable[Sequence[StoredVisual]]) -> dict[str, Tensor]:
        """Returns the images of several documents as one batch; nothing of documents without."""
        return self.processor.join([self.document(visuals) for visuals in documents if visuals])


class VisualData(PackedData):
    """Training data from packed rows with images."""

    reader: VisualReader

    @classmethod
    def of(cls, packed: PackedData, reader: VisualReader) -> VisualData:
        """Returns the same rows in the same order, their images read by `reader`."""
        data = cls.__new__(cls)
        data.__dict__.update(vars(packed))
        data.reader = reader
        return data

    def batch_of(self, rows: PackedRows, indices: list[int]) -> Batch:
        batch = super().batch_of(rows, indices)
        spans = [rows.spans[index] for index in indices]
        positions = [
            self._positions(rows, row, ids_S, text_S)
            for row, ids_S, text_S in zip(
                spans, batch.ids_BS, batch.positions_BS, strict=True  # type: ignore[arg-type]
            )
        ]  # fmt: skip
        visuals = [visuals_of(rows.documents, span) for row in spans for span in row]
        return Batch(
            batch.ids_BS,
            batch.labels_BS,
            torch.stack(positions, dim=-2),
            self.reader.inputs(visuals),
        )

    def _positions(
        self, rows: PackedRows, spans: list[Span], ids_S: Tensor, text_S: Tensor
    ) -> Tensor:
        """Returns a row's positions; what is padded counts on as text does."""
        rotary = text_S.expand(3, -1).clone()
        place = 0
        for span in spans:
            here = slice(place, place + span.num_tokens)
            visuals = visuals_of(rows.documents, span)
            found = self.reader.processor.positions(ids_S[here], visuals)
            if found is None:
                return text_S
            rotary[:, here] = found
            place = here.stop
        return torch.cat((text_S[None], rotary))

    def prompt(self, num_tokens: int) -> list[int]:
        """Returns a held-out document up to where the model begins to speak."""
        ids, stop = self._first_turn(num_tokens)
        return ids[:stop]

    def prompt_inputs(self, num_tokens: int) -> dict[str, Any]:
        ids, stop = self._first_turn(num_tokens)
        span = self.held_out.spans[0][0]
        visuals = [v for v in visuals_of(self.held_out.documents, span) if v.stop <= stop]
        if not visuals:
            return {}
        beside = self.reader.processor.prompt_inputs(torch.tensor(ids[:stop]))
        return {**self.reader.inputs([visuals]), **beside}

    def _first_turn(self, num_tokens: int) -> tuple[list[int], int]:
        """Returns a held-out row's ids and where its prompt ends, no image cut apart."""
        row = self.held_out[0]
        ids = [int(i) for i in row.ids_S]
        learned = np.flatnonzero(row.labels_S != IGNORED)
        span = self.held_out.spans[0][0]
        stop = int(learned[0]) if len(learned) else min(num_tokens, span.num_tokens)
        visuals = visuals_of(self.held_out.documents, span)
        together = self.reader.processor.together
        return ids, max(1, whole_stop(visuals, stop, together=together))


def visuals_of(documents: Any, span: Span) -> list[StoredVisual]:
    """Returns the images that lie whole in a span."""
    assert span.start == 0, "documents with images are not cut into several rows"
    return [v for v in documents.visuals(span.document) if v.stop <= span.stop]
