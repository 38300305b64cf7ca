"""The model's own image processor: pixels, placeholders and positions of images and clips.

Shape suffixes: R patch rows of one image or clip, F values of a row, S tokens, G images.

transformers' combined processors need torchvision for their video half. Here a clip goes through
the image half, frame by frame, and its rows are woven from those of its frames; what a class knows
of placeholders and positions is borrowed from it (`_Borrowed`).
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epctl.errors import InputError, LayoutError
from epctl.launch.model_reference import PROCESSOR_FILES, require_processor

Grid = tuple[int, int, int]  # frames, height and width in patches

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
class VisualProcessor:
    """What turns images and clips into rows, tokens and positions for one model.

    Attributes:
        tokenizer: the model's, with the chat template that knows images.
        image_id, video_id: the placeholder token that stands once for each visual token; None for
            a model without such a kind.
    """

    image_processor: Any
    tokenizer: Any
    config: Any
    image_id: int
    video_id: int | None

    @property
    def merge_size(self) -> int:
        return int(self.image_processor.merge_size)

    @property
    def frames_per_row(self) -> int:
        """Frames of a clip that one row holds."""
        return int(self.image_processor.temporal_patch_size)

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

    def clip_grid(self, num_frames: int, width: int, height: int, max_pixels: int | None) -> Grid:
        """Returns the grid of a clip of such frames."""
        _, rows, columns = self.image_grid(width, height, max_pixels)
        return -(-num_frames // self.frames_per_row), rows, columns

    def image_ids(self, grid: Grid) -> list[int]:
        """Returns the tokens that stand for an image."""
        return [self.image_id] * self._num_tokens(grid)

    def clip_ids(self, grid: Grid, num_frames: int, fps: float) -> list[int]:
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

    def positions(
        self, ids_S: Tensor, image_grids: list[Grid], video_grids: list[Grid], seconds: list[float]
    ) -> Tensor | None:
        """Returns rotary positions [3, S] of one document; None where a plain count does.

        Args:
            seconds: between two grid frames of each clip.
        """
        model = self._model_class
        if not hasattr(model, "get_rope_index"):
            return None
        given = {
            "mm_token_type_ids": self.kinds(ids_S)[None],
            "image_grid_thw": _grids(image_grids),
            "video_grid_thw": _grids(video_grids),
            "second_per_grid_ts": torch.tensor(seconds) if seconds else None,
        }
        known = _parameters(model.get_rope_index)
        borrowed = _Borrowed(model, config=self.config)
        positions_3BS, _ = borrowed.get_rope_index(
            ids_S[None], **{key: value for key, value in given.items() if key in known}
        )
        positions_3S: Tensor = positions_3BS[:, 0]
        return positions_3S

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
        """transformers' combined processor of this model type, None without one."""
        import transformers
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

        name = PROCESSOR_MAPPING_NAMES.get(self.config.model_type)
        return None if name is None else getattr(transformers, name, None)

    @functools.cached_property
    def _model_class(self) -> Any:
        from transformers import AutoModel

        return AutoModel._model_mapping[type(self.config)]


_SIDES = ("start", "end")


def _grids(grids: list[Grid]) -> Tensor | None:
    return torch.tensor(grids) if grids else None


def _parameters(function: Any) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(function).parameters)


def load_visual_processor(folder: Path, config: Any, tokenizer: Any) -> VisualProcessor:
    """Returns the image processor of the model in `folder`.

    Raises InputError if the folder has none or Pillow is missing, LayoutError for a kind of
    processor whose images epctl does not train on.
    """
    require_processor(folder)
    image_processor = _image_processor(folder)
    for needed in ("patch_size", "merge_size", "temporal_patch_size"):
        if not isinstance(getattr(image_processor, needed, None), int):
            raise LayoutError(
                f"`{config.model_type}`: {type(image_processor).__name__} states no `{needed}`; "
                "`epctl train` takes images of models whose tower is given packed patches (the "
                "Qwen-VL and GLM-V kind)",
                hint="the library trains others: docs/sequence-parallel.md",
            )
    return VisualProcessor(
        image_processor,
        _with_template(tokenizer, folder),
        config,
        _token_id(config, "image"),
        getattr(config, "video_token_id", None),
    )


def _image_processor(folder: Path) -> Any:
    """Loads by Pillow even where torchvision is: the two round differently."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except Exception as error:  # JSON, import and value errors have no common base
        first_line = str(error).strip().splitlines()[:1]
        raise InputError(
            f"the image processor in `{folder}` cannot be loaded: {type(error).__name__}: "
            f"{''.join(first_line)}"
        ) from None


def _token_id(config: Any, kind: str) -> int:
    found = getattr(config, f"{kind}_token_id", None)
    if found is None:
        raise LayoutError(
            f"`{config.model_type}`: the config states no `{kind}_token_id`, so the places of "
            "images in the text are not known"
        )
    return int(found)


def _with_template(tokenizer: Any, folder: Path) -> Any:
    """Returns the tokenizer with the processor's chat template where that is in a file of its own.

    What is saved with a checkpoint stays as it was: the copy is ours.
    """
    path = folder / "chat_template.json"
    if not path.is_file():
        return tokenizer
    try:
        template = json.loads(path.read_text("utf-8"))["chat_template"]
    except (ValueError, KeyError) as error:
        raise InputError(f"`{path}` holds no chat template: {error}") from None
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def copy_processor(source: Path, folder: Path) -> None:
    """Copies the image processor's files, byte for byte, beside saved weights."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
