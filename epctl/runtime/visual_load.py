"""Loads the image processor that lies beside a model, and copies it beside saved weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from epctl.errors import InputError, LayoutError
from epctl.launch.model_reference import PROCESSOR_FILES, require_processor
from epctl.runtime.visual_packed import PackedProcessor
from epctl.runtime.visual_processor import VisualProcessor
from epctl.runtime.visual_tiles import load_tiles

_OF_PATCHES = ("patch_size", "merge_size", "temporal_patch_size")


def load_visual_processor(folder: Path, config: Any, tokenizer: Any) -> VisualProcessor:
    """Returns the image processor of the model in `folder`.

    Raises InputError if the folder has none or Pillow is missing, LayoutError for a kind of
    processor whose images epctl does not train on.
    """
    require_processor(folder)
    image_processor = _image_processor(folder)
    tokenizer = _with_template(tokenizer, folder)
    image_id = _token_id(config, "image")
    if all(isinstance(getattr(image_processor, name, None), int) for name in _OF_PATCHES):
        video_id = getattr(config, "video_token_id", None)
        return PackedProcessor(tokenizer, config, image_id, video_id, image_processor)
    return load_tiles(folder, config, tokenizer, image_id, image_processor)


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
