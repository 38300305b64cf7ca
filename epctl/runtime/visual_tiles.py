"""Towers of whole images and tiles: transformers' own processor of the model does the work.

Shape suffixes: S tokens.

The combined processor is called with one placeholder an image, as a user of transformers calls it,
so tiles and tokens are the model's own for whatever it makes of an image: one square, a canvas of
tiles, rows with marks between them. Its video half, which needs torchvision, is left out: a clip is
trained where its frames are images that are not cut (InternVL).
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epctl.errors import InputError, LayoutError
from epctl.runtime.native_config import auto_class
from epctl.runtime.sequence.detect import accepted
from epctl.runtime.visual_processor import (
    Document,
    Opened,
    Place,
    VisualLimits,
    VisualProcessor,
    combined_class,
)

# What `sequence/units.py` knows to cut among ranks.
KNOWN = frozenset({"pixel_values", "image_sizes", "batch_num_images", "pixel_attention_mask"})
_OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
MASK = "pixel_attention_mask"
_PROBE = (64, 48)
_UNCUT = "crop_to_patches"  # the setting by which InternVL's images become tiles, its frames not


@dataclass(eq=False)
class TileProcessor(VisualProcessor):
    """Images as the model's own processor cuts them; a grid is (frames, height, width) in pixels.

    Attributes:
        combined: transformers' processor of the model, without its video half.
        takes: what the model's forward takes beside tokens.
    """

    combined: Any
    takes: frozenset[str]

    grid_unit = "pixels"

    @property
    def together(self) -> bool:  # type: ignore[override]
        """LLaVA-OneVision divides an image that is alone, and none of several."""
        return "batch_num_images" in self.takes

    def image_place(self, size: tuple[int, int], num_images: int, limits: VisualLimits) -> Place:
        width, height = size
        count = num_images if self.together else 1
        return Place(list(self._ids(size, count, limits.max_pixels)), (1, height, width))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one processor lives as long as the run
    def _ids(self, size: tuple[int, int], count: int, max_pixels: int | None) -> tuple[int, ...]:
        """Returns the tokens of any image of this size: processors look at nothing else."""
        from PIL import Image

        ids = self._processed([Image.new("RGB", size)] * count, max_pixels)["input_ids"][0].tolist()
        return tuple(ids[: len(ids) // count])

    def clip_place(
        self, num_frames: int, fps: float, size: tuple[int, int], limits: VisualLimits
    ) -> Place:
        width, height = size
        clip = {"pixel_values_videos": [torch.empty(num_frames, 1)]}  # its length is asked for
        text = self.combined.replace_video_token(clip, video_idx=0)
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        each = self._frame_tokens
        if ids.count(self.image_id) != num_frames * each:
            raise LayoutError(
                f"`{self.config.model_type}`: {type(self.combined).__name__} writes a clip of "
                f"{num_frames} frames with {ids.count(self.image_id)} image tokens, an image that "
                f"is not cut has {each}; epctl trains this model on images only"
            )
        return Place(ids, (num_frames, height, width))

    @functools.cached_property
    def _frame_tokens(self) -> int:
        from PIL import Image

        found = self._processed([Image.new("RGB", _PROBE)], None, cut=False)
        return int((found["input_ids"] == self.image_id).sum())

    def document(self, opened: Sequence[Opened], limits: VisualLimits) -> Document:
        """Clips are images among the others, in the order of their tokens."""
        images = [o.images[0] for o in opened if o.modality == "image"]
        if len(images) == len(opened):  # in one call: the number of images may decide
            inputs = self._inputs(self._processed(images, limits.max_pixels))
        else:
            apart = [
                self._processed(o.images, limits.max_pixels)
                if o.modality == "image"
                else self._processed(o.images, limits.max_frame_pixels, cut=False)
                for o in opened
            ]
            inputs = super().join([Document([], self._inputs(found)) for found in apart])
        sizes = [o.images[0].size for o in opened]
        grids = [(len(o.images), h, w) for o, (w, h) in zip(opened, sizes, strict=True)]
        return Document(grids, inputs)

    @staticmethod
    def _inputs(found: Any) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {name: found[name] for name in KNOWN & found.keys()}
        # With a mask they are a batch of one sample.
        return {k: v[0] for k, v in inputs.items()} if MASK in inputs else inputs

    def join(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        inputs = super().join(documents)
        return {k: v[None] for k, v in inputs.items()} if MASK in inputs else inputs

    def _processed(self, images: Sequence[Any], max_pixels: int | None, *, cut: bool = True) -> Any:
        """Returns what the model's processor makes of the images of one document.

        Args:
            cut: false for frames, which are not divided into tiles.

        Raises InputError, with their sizes, for images that it refuses.
        """
        fitting = [_within(image, max_pixels) for image in images]
        text = self.combined.image_token * len(images)
        try:
            return self.combined(
                images=[fitting],
                text=[text],
                add_special_tokens=False,
                return_tensors="pt",
                **({} if cut else {_UNCUT: False}),
            )
        except ValueError as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise InputError(f"images of {sizes} pixels: {error}") from None

    def check(self) -> None:
        """Raises LayoutError for a processor that makes of an image what is not known here."""
        from PIL import Image

        found = self._processed([Image.new("RGB", _PROBE)], None)
        name, model_type = type(self.combined).__name__, self.config.model_type
        unknown = sorted((found.keys() & self.takes) - KNOWN - _OF_TEXT)
        if unknown:
            raise LayoutError(
                f"`{model_type}`: {name} gives `{unknown[0]}` beside the pixels, which `epctl "
                "train` does not know how to share among ranks"
            )
        if int((found["input_ids"] == self.image_id).sum()) == 0:
            raise LayoutError(
                f"`{model_type}`: {name} writes an image of {_PROBE[0]} x {_PROBE[1]} pixels "
                f"without the token {self.image_id}, which its config says stands for images"
            )


def _within(image: Any, max_pixels: int | None) -> Any:
    """Returns an image of Pillow, scaled down if it has more than `max_pixels`."""
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = (max_pixels / (width * height)) ** 0.5
    return image.resize((max(1, int(width * scale)), max(1, int(height * scale))))


def load_tiles(
    folder: Path, config: Any, tokenizer: Any, image_id: int, image_processor: Any
) -> TileProcessor:
    """Returns the processor of a model whose tower takes whole images or tiles.

    Raises LayoutError if transformers has no processor for the model or it is of an unknown kind,
    InputError if the processor's settings are not complete.
    """
    model = auto_class(config)._model_mapping[type(config)]
    combined = _combined(folder, config, copy.deepcopy(tokenizer), image_processor)
    takes = accepted(model)
    video_id = _video_id(combined, takes, tokenizer)
    found = TileProcessor(tokenizer, config, image_id, video_id, combined, takes)
    try:
        found.check()
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"`{folder}`: {type(combined).__name__} cannot say how an image is written: "
            f"{type(error).__name__}: {error}",
            hint="a setting is missing: copy processor_config.json, preprocessor_config.json and "
            "tokenizer_config.json from the model's page",
        ) from None
    return found


def _video_id(combined: Any, takes: frozenset[str], tokenizer: Any) -> int | None:
    """Returns the token that the template writes for a clip; None if its frames are no images."""
    token = getattr(combined, "video_token", None)
    as_images = hasattr(combined.image_processor, _UNCUT) and "pixel_values_videos" not in takes
    # By the vocabulary: asked for a token it lacks, a tokenizer answers with that of unknown words.
    return tokenizer.get_vocab().get(token) if token and as_images else None


def _combined(folder: Path, config: Any, tokenizer: Any, image_processor: Any) -> Any:
    """Returns transformers' combined processor with its settings in `folder`."""
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    kind = combined_class(config)
    if kind is None:
        raise LayoutError(
            f"`{config.model_type}`: transformers has no processor that says how its images are "
            "written"
        )
    try:
        without_video: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": _any})
        given = [parts.get(name) for name in kind.get_attributes()]
        return without_video.from_args_and_dict(given, settings)
    except ImportError as error:
        raise InputError(
            f"`{config.model_type}`: its processor needs a package that is not installed: "
            f"{' '.join(str(error).split())[:160]}"
        ) from None
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"`{folder}` holds no whole processor: {error}",
            hint="copy tokenizer_config.json and processor_config.json from the model's page",
        ) from None


def _any(self: Any, name: str, part: Any) -> None:
    """Takes None for the video half in place of a class that needs torchvision."""
