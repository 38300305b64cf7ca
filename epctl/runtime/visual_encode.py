"""From a chat with images to token ids: placeholders written out, images kept for later.

An image is opened once here, so that a missing or damaged one is found before training, and its
pixels are let go again: only its size decides how many tokens stand for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epctl.errors import InputError
from epctl.runtime.data_encode import ChatEncoder, Encoded
from epctl.runtime.visual_files import VisualFiles
from epctl.runtime.visual_processor import VisualLimits, VisualProcessor
from epctl.runtime.visual_records import Columns, Modality, Source, StoredVisual, read_visuals


@dataclass(frozen=True)
class _Placed:
    """An image or clip before its place among the tokens is known."""

    ids: list[int]
    visual: StoredVisual
    what: str


class VisualChatEncoder(ChatEncoder):
    """`messages` records with images and videos; what is learned is as without them.

    The template writes one placeholder an image; it is replaced by as many as the image has
    tokens, and none of them is a target.
    """

    def __init__(
        self,
        processor: VisualProcessor,
        files: VisualFiles,
        limits: VisualLimits,
        key: str,
        columns: Columns,
    ) -> None:
        super().__init__(processor.tokenizer, key)
        self.processor = processor
        self.files = files
        self.limits = limits
        self.columns = columns

    def __call__(
        self, record: Mapping[str, Any], where: str, folder: Path | None = None
    ) -> Encoded:
        messages = self.messages(record, where)
        messages, sources = read_visuals(record, messages, self.columns, where)
        text = super().__call__({**record, self.key: messages}, where)
        placed: dict[Modality, list[_Placed]] = {
            "image": self._images([s for s in sources if s.modality == "image"], where, folder),
            "video": [self._clip(s, where, folder) for s in sources if s.modality == "video"],
        }
        return self._with_visuals(text, placed, where)

    def _images(self, sources: list[Source], where: str, folder: Path | None) -> list[_Placed]:
        """Returns the images of one document."""
        placed = []
        for source in sources:
            name = self.files.keep(source.value, folder, where)
            size = self.files.open(name).size
            ids, grid = self.processor.image_place(size, len(sources), self.limits)
            what = f"the image `{name}` of {size[0]} x {size[1]} pixels"
            self._require_room(ids, what, "data.max_pixels", where)
            placed.append(_Placed(ids, StoredVisual("image", (name,), (), grid, 0, 0), what))
        return placed

    def _clip(self, source: Source, where: str, folder: Path | None) -> _Placed:
        limits, processor = self.limits, self.processor
        if processor.video_id is None:
            raise InputError(f"{where}: the model (`{processor.config.model_type}`) takes no video")
        facts = self.files.clip(
            source.value, folder, where,
            own_fps=source.fps, fps=limits.fps, max_frames=limits.max_frames,
        )  # fmt: skip
        ids, grid = processor.clip_place(facts.num_frames, facts.fps, facts.size, limits)
        width, height = facts.size
        what = f"the clip `{facts.files[0]}` of {facts.num_frames} frames of {width} x {height}"
        self._require_room(ids, what, "data.max_frames", where)
        visual = StoredVisual("video", facts.files, facts.frames, grid, 0, 0, facts.fps)
        return _Placed(ids, visual, what)

    def _require_room(self, ids: list[int], what: str, setting: str, where: str) -> None:
        if len(ids) >= self.limits.sequence_length:
            raise InputError(
                f"{where}: {what} takes {len(ids):,} tokens, a sequence has "
                f"{self.limits.sequence_length:,}",
                hint=f"use `--set train.sequence_length=N`, or `--set {setting}=N` for less of it",
            )

    def _with_visuals(
        self, text: Encoded, placed: Mapping[Modality, list[_Placed]], where: str
    ) -> Encoded:
        """Returns the document with every placeholder written out."""
        kinds: dict[int | None, Modality] = {
            self.processor.image_id: "image",
            self.processor.video_id: "video",
        }
        self._require_places(text, placed, where)
        queues: dict[Modality, Iterator[_Placed]] = {m: iter(v) for m, v in placed.items()}
        trained = text.trained or [True] * len(text.ids)
        ids: list[int] = []
        learned: list[bool] = []
        visuals = []
        for token, mark in zip(text.ids, trained, strict=True):
            modality = kinds.get(token)
            if modality is None:
                ids.append(token)
                learned.append(mark)
                continue
            one = next(queues[modality])
            stop = len(ids) + len(one.ids)
            document = {**one.visual.to_document(), "start": len(ids), "stop": stop}
            visuals.append(StoredVisual.from_document(document))
            ids += one.ids
            learned += [False] * len(one.ids)
        return Encoded(ids, learned, tuple(visuals))

    def _require_places(
        self, text: Encoded, placed: Mapping[Modality, list[_Placed]], where: str
    ) -> None:
        """Raises InputError unless the template wrote one placeholder for each image."""
        token_of = {"image": self.processor.image_id, "video": self.processor.video_id}
        for modality, items in placed.items():
            found = text.ids.count(token_of[modality]) if token_of[modality] is not None else 0  # type: ignore[arg-type]
            if found != len(items):
                raise InputError(
                    f"{where}: the chat template wrote {found} {modality} placeholders for "
                    f"{len(items)} {modality}s",
                    hint="a message's text may not hold the placeholder token itself; otherwise "
                    "the template is not the one of this model",
                )
