"""Packed rows of documents with images: rotary positions by document, pixels when drawn.

Shape suffixes: B sequences, S tokens, R patch rows, F values of a row. Positions of a row are
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
from epctl.runtime.visual_encode import VisualLimits
from epctl.runtime.visual_files import VisualFiles
from epctl.runtime.visual_processor import Grid, Pixels, VisualProcessor
from epctl.runtime.visual_records import MODALITIES, Modality, StoredVisual

PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS: dict[Modality, str] = {"image": "image_grid_thw", "video": "video_grid_thw"}


class VisualDocuments(Documents, Protocol):
    """Documents that know their images."""

    def visuals(self, document: int) -> Sequence[StoredVisual]:
        """Returns the images and clips of a document, in the order of its tokens."""


def usable_lengths(documents: VisualDocuments, length: int) -> Integers:
    """Returns how many tokens of each document a row of `length` takes.

    What is longer loses its end, and an image that the cut would go through goes whole. A document
    of which nothing is left to learn has length 0.
    """
    lengths = documents.lengths.copy()
    for document in np.flatnonzero(lengths > length).tolist():
        stop = length
        for visual in documents.visuals(document):
            if visual.start < stop < visual.stop:
                stop = visual.start
        _, trained = documents.tokens(document, 0, stop)
        lengths[document] = stop if trained[1:].any() else 0
    return lengths


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

    def pixels(self, visual: StoredVisual) -> Pixels:
        """Returns the rows of an image or clip, read from the disk now.

        Raises InputError if the file is not what it was when its tokens were counted.
        """
        if visual.modality == "image":
            image = self.files.open(visual.files[0])
            found = self.processor.image(image, self.limits.max_pixels)
        else:
            frames = self.files.frames(visual.files, visual.frames)
            found = self.processor.clip(frames, self.limits.max_frame_pixels)
        if found.grid != visual.grid:
            raise InputError(
                f"`{visual.files[0]}` has changed: {found.grid} patches now (frames, height, "
                f"width), {visual.grid} when its tokens were counted",
                hint="put the old file back, or start a new run",
            )
        return found

    def positions(self, ids_S: Tensor, visuals: Sequence[StoredVisual]) -> Tensor | None:
        """Returns rotary positions [3, S] of a document, None where the model has none."""
        grids: dict[Modality, list[Grid]] = {
            m: [v.grid for v in visuals if v.modality == m] for m in MODALITIES
        }
        apart = self.processor.frames_per_row
        seconds = [apart / v.fps for v in visuals if v.modality == "video"]
        return self.processor.positions(ids_S, grids["image"], grids["video"], seconds)


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
        visuals = [v for row in spans for span in row for v in visuals_of(rows.documents, span)]
        return Batch(
            batch.ids_BS, batch.labels_BS, torch.stack(positions, dim=-2), self._inputs(visuals)
        )

    def _positions(
        self, rows: PackedRows, spans: list[Span], ids_S: Tensor, text_S: Tensor
    ) -> Tensor:
        """Returns a row's positions; what is padded counts on as text does."""
        rotary = text_S.expand(3, -1).clone()
        place = 0
        for span in spans:
            here = slice(place, place + span.num_tokens)
            found = self.reader.positions(ids_S[here], visuals_of(rows.documents, span))
            if found is None:
                return text_S
            rotary[:, here] = found
            place = here.stop
        return torch.cat((text_S[None], rotary))

    def _inputs(self, visuals: list[StoredVisual]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for modality in MODALITIES:
            own = [v for v in visuals if v.modality == modality]
            if own:
                pixels = [self.reader.pixels(visual) for visual in own]
                inputs[PIXELS[modality]] = torch.cat([p.rows_RF for p in pixels])
                inputs[GRIDS[modality]] = torch.tensor([p.grid for p in pixels])
        return inputs

    def prompt(self, num_tokens: int) -> list[int]:
        """Returns a held-out document up to where the model begins to speak."""
        ids, stop = self._first_turn(num_tokens)
        return ids[:stop]

    def prompt_inputs(self, num_tokens: int) -> dict[str, Any]:
        ids, stop = self._first_turn(num_tokens)
        span = self.held_out.spans[0][0]
        visuals = [v for v in visuals_of(self.held_out.documents, span) if v.stop <= stop]
        ids_S = torch.tensor(ids[:stop])
        kinds = {"mm_token_type_ids": self.reader.processor.kinds(ids_S)[None]} if visuals else {}
        return {**self._inputs(visuals), **kinds}

    def _first_turn(self, num_tokens: int) -> tuple[list[int], int]:
        """Returns a held-out row's ids and where its prompt ends, no image cut apart."""
        row = self.held_out[0]
        ids = [int(i) for i in row.ids_S]
        learned = np.flatnonzero(row.labels_S != IGNORED)
        span = self.held_out.spans[0][0]
        stop = int(learned[0]) if len(learned) else min(num_tokens, span.num_tokens)
        return ids, max(1, stop)


def visuals_of(documents: Any, span: Span) -> list[StoredVisual]:
    """Returns the images that lie whole in a span."""
    assert span.start == 0, "documents with images are not cut into several rows"
    return [v for v in documents.visuals(span.document) if v.stop <= span.stop]
