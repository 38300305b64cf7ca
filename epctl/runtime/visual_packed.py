"""Towers of packed patches: rows, placeholders and positions of images and clips.

Shape suffixes: R patch rows of one image or clip, F values of a row, S tokens, B sequences.

transformers' combined processors need torchvision for their video half. Here a clip goes through
the image half, frame by frame, and its rows are woven from those of its frames; what a class knows
of placeholders and positions is borrowed from it (`_Borrowed`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epctl.errors import InputError, LayoutError
from epctl.runtime.sequence.detect import accepted
from epctl.runtime.sequence.vision import GRIDS, PIXELS
from epctl.runtime.visual_processor import (
    Document,
    Opened,
    Place,
    VisualLimits,
    VisualProcessor,
    combined_class,
)
from epctl.runtime.visual_records import MODALITIES, Grid, StoredVisual

IMAGE, VIDEO = 1, 2  # what transformers calls the kinds of tokens in `mm_token_type_ids`


class Pixels(NamedTuple):
    """The patch rows of one image or clip, as the tower takes them."""

    rows_RF: Tensor
    grid: Grid


class _Borrowed:
    """Methods of a transformers class that need no more of `self` than the attributes given."""

    def __init__(self, owner: type, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner, name).__get__(self)


@dataclass(eq=False)
class PackedProcessor(VisualProcessor):
    """Images and clips as patch rows; `image_id` stands once for each visual token."""

    image_processor: Any

    grid_unit = "patches"

    @property
    def merge_size(self) -> int:
        return int(self.image_processor.merge_size)

    @property
    def frames_per_row(self) -> int:
        """Frames of a clip that one row holds."""
        return int(self.image_processor.temporal_patch_size)

    def image_place(self, size: tuple[int, int], num_images: int, limits: VisualLimits) -> Place:
        grid = self.image_grid(*size, limits.max_pixels)
        return Place([self.image_id] * self._num_tokens(grid), grid)

    def clip_place(
        self, num_frames: int, fps: float, size: tuple[int, int], limits: VisualLimits
    ) -> Place:
        _, rows, columns = self.image_grid(*size, limits.max_frame_pixels)
        grid = (-(-num_frames // self.frames_per_row), rows, columns)
        return Place(self._clip_ids(grid, num_frames, fps), grid)

    def document(self, opened: Sequence[Opened], limits: VisualLimits) -> Document:
        pixels = [
            self.image(o.images[0], limits.max_pixels)
            if o.modality == "image"
            else self.clip(o.images, limits.max_frame_pixels)
            for o in opened
        ]
        inputs = {}
        for modality in MODALITIES:
            own = [p for p, o in zip(pixels, opened, strict=True) if o.modality == modality]
            if own:
                inputs[PIXELS[modality]] = torch.cat([p.rows_RF for p in own])
                inputs[GRIDS[modality]] = torch.tensor([p.grid for p in own])
        return Document([p.grid for p in pixels], inputs)

    def image(self, image: Any, max_pixels: int | None = None) -> Pixels:
        """Returns the rows of a PIL image, scaled down to `max_pixels` if it is larger.

        Raises InputError, with the size, for an image that the processor refuses.
        """
        try:
            found = self.image_processor(
                images=[image], size=self._size(max_pixels), return_tensors="pt"
            )
        except ValueError as error:
            raise InputError(
                f"an image of {image.width} x {image.height} pixels: {error}"
            ) from None
        frames, height, width = found["image_grid_thw"][0].tolist()
        return Pixels(found["pixel_values"], (frames, height, width))

    def clip(self, frames: Sequence[Any], max_pixels: int | None = None) -> Pixels:
        """Returns the rows of PIL images that follow each other in time; the last is repeated."""
        pixels = [self.image(frame, max_pixels) for frame in frames]
        _, height, width = pixels[0].grid
        together, patch = self.frames_per_row, int(self.image_processor.patch_size)
        pixels += [pixels[-1]] * (-len(pixels) % together)
        woven = []
        for first in range(0, len(pixels), together):
            # An image's rows hold its patch once for each frame: [R, channels, frames, pixels].
            views = [
                p.rows_RF.view(height * width, -1, together, patch**2)
                for p in pixels[first : first + together]
            ]
            row = torch.stack([view[:, :, n] for n, view in enumerate(views)], dim=2)
            woven.append(row.flatten(1))
        return Pixels(torch.cat(woven), (len(woven), height, width))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one processor lives as long as the run
    def image_grid(self, width: int, height: int, max_pixels: int | None) -> Grid:
        """Returns the grid of any image of this size: processors look at nothing else."""
        from PIL import Image

        return self.image(Image.new("RGB", (width, height)), max_pixels).grid

    def _clip_ids(self, grid: Grid, num_frames: int, fps: float) -> list[int]:
        """Returns the tokens that stand for a clip, its timestamps if the model has them."""
        assert self.video_id is not None
        replace = getattr(self._class, "replace_video_token", None)
        if replace is None:
            return [self.video_id] * self._num_tokens(grid)
        from types import SimpleNamespace

        sizes = SimpleNamespace(merge_size=self.merge_size, temporal_patch_size=self.frames_per_row)
        word = self.tokenizer.convert_ids_to_tokens
        start, end = (getattr(self.config, f"vision_{side}_token_id", None) for side in _SIDES)
        borrowed = _Borrowed(
            self._class,
            video_processor=sizes,
            video_token=word(self.video_id),
            vision_start_token=None if start is None else word(start),
            vision_end_token=None if end is None else word(end),
        )
        metadata = SimpleNamespace(fps=fps, frames_indices=list(range(num_frames)))
        inputs = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
        try:
            text = borrowed.replace_video_token(inputs, 0)
        except AttributeError:
            text = ""
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if ids.count(self.video_id) != self._num_tokens(grid):
            raise LayoutError(
                f"`{self.config.model_type}`: {self._class.__name__} does not write a clip as "
                f"{self._num_tokens(grid)} video tokens; epctl trains this model on images only"
            )
        return ids

    def kinds(self, ids_S: Tensor) -> Tensor:
        """Returns what each token stands for: 0 text, 1 an image, 2 a clip."""
        kinds_S = IMAGE * (ids_S == self.image_id).int()
        if self.video_id is not None:
            kinds_S += VIDEO * (ids_S == self.video_id).int()
        return kinds_S

    def positions(self, ids_S: Tensor, visuals: Sequence[StoredVisual]) -> Tensor | None:
        model = self._model_class
        if not hasattr(model, "get_rope_index"):
            return None
        clips = [v for v in visuals if v.modality == "video"]
        # Between two grid frames of each clip.
        seconds = [self.frames_per_row / v.fps for v in clips]
        given = {
            "mm_token_type_ids": self.kinds(ids_S)[None],
            "image_grid_thw": _grids([v.grid for v in visuals if v.modality == "image"]),
            "video_grid_thw": _grids([v.grid for v in clips]),
            "second_per_grid_ts": torch.tensor(seconds) if seconds else None,
        }
        known = accepted(model, "get_rope_index")
        borrowed = _Borrowed(model, config=self.config)
        positions_3BS, _ = borrowed.get_rope_index(
            ids_S[None], **{key: value for key, value in given.items() if key in known}
        )
        positions_3S: Tensor = positions_3BS[:, 0]
        return positions_3S

    def prompt_inputs(self, ids_S: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": self.kinds(ids_S)[None]}

    def _num_tokens(self, grid: Grid) -> int:
        frames, height, width = grid
        return frames * height * width // self.merge_size**2

    def _size(self, max_pixels: int | None) -> dict[str, int]:
        """Returns the processor's limits on the pixels of an image, the upper one lowered."""
        size = self.image_processor.size
        lowest, highest = int(size["shortest_edge"]), int(size["longest_edge"])
        if max_pixels is not None:
            highest = max(min(highest, max_pixels), lowest)
        return {"shortest_edge": lowest, "longest_edge": highest}

    @functools.cached_property
    def _class(self) -> Any:
        return combined_class(self.config)

    @functools.cached_property
    def _model_class(self) -> Any:
        from transformers import AutoModel

        return AutoModel._model_mapping[type(self.config)]


_SIDES = ("start", "end")


def _grids(grids: list[Grid]) -> Tensor | None:
    return torch.tensor(grids) if grids else None
