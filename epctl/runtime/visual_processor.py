"""What turns images and clips into tokens, inputs and positions: one interface for all models.

Shape suffixes: S tokens.

`visual_packed.py` is for towers of packed patches, `visual_tiles.py` for those of whole images and
tiles; `visual_load.py` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from epctl.runtime.visual_records import Grid, Modality, StoredVisual


@dataclass(frozen=True)
class VisualLimits:
    """How large images and clips may become."""

    sequence_length: int
    max_pixels: int | None = None
    max_frame_pixels: int | None = None
    fps: float = 2.0
    max_frames: int = 64


class Place(NamedTuple):
    """The tokens that stand for an image or clip, and by what it is known again when it is read."""

    ids: list[int]
    grid: Grid


class Opened(NamedTuple):
    """An image, or the frames of a clip, as RGB images of Pillow."""

    modality: Modality
    images: Sequence[Any]


class Document(NamedTuple):
    """The images of one document as the model is given them, and the grid of each."""

    grids: list[Grid]
    inputs: dict[str, Tensor]


@dataclass(eq=False)
class VisualProcessor(ABC):
    """What turns images and clips into tokens and inputs of one model.

    Attributes:
        tokenizer: the model's, with the chat template that knows images.
        image_id, video_id: the token that the template writes for an image or a clip, and that
            stands for its visual tokens; None for a model without clips.
        grid_unit: what height and width of a grid are counted in.
        together: how an image is cut depends on whether its document has others.
    """

    tokenizer: Any
    config: Any
    image_id: int
    video_id: int | None

    grid_unit: ClassVar[str]
    together = False

    @abstractmethod
    def image_place(self, size: tuple[int, int], num_images: int, limits: VisualLimits) -> Place:
        """Returns what stands for any image of this (width, height) among so many of a document.

        Raises InputError, with the size, for an image that the model's processor refuses.
        """

    @abstractmethod
    def clip_place(
        self, num_frames: int, fps: float, size: tuple[int, int], limits: VisualLimits
    ) -> Place:
        """Returns what stands for a clip of frames of this (width, height).

        Raises LayoutError if transformers does not tell how the model writes a clip.
        """

    @abstractmethod
    def document(self, opened: Sequence[Opened], limits: VisualLimits) -> Document:
        """Returns the pixels of a document's images, float32, and what comes with them."""

    def join(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """Returns the inputs of several documents as one batch, smaller images padded by zeros."""
        names = dict.fromkeys(name for document in documents for name in document.inputs)
        return {
            name: joined([d.inputs[name] for d in documents if name in d.inputs]) for name in names
        }

    def positions(self, ids_S: Tensor, visuals: Sequence[StoredVisual]) -> Tensor | None:
        """Returns rotary positions [3, S] of one document; None where a plain count does."""
        return None

    def prompt_inputs(self, ids_S: Tensor) -> dict[str, Tensor]:
        """Returns what a prompt's forward needs beside pixels, where the model asks for it."""
        return {}


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Returns tensors end to end along the first dim, the others padded at their ends."""
    most = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [size - own for size, own in zip(most, part.shape[1:], strict=True)]
        ends = [end for size in reversed(missing) for end in (0, size)]
        padded.append(functional.pad(part, ends) if any(missing) else part)
    return torch.cat(padded)


def combined_class(config: Any) -> Any:
    """Returns transformers' combined processor of this model type, None without one."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    return None if name is None else getattr(transformers, name, None)
