"""Tiny models whose towers see whole images, and the later packed ones; batches for the former.

Every quirk is on: images of one and of several tiles, one that is resampled, padding inside a tile,
empty places in a batch, samples of two images, clips of several frames, images of all sizes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

IMAGE_ID, VIDEO_ID = 90, 91
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]
# (height, width) in pixels: two tiles, one, four, three; most leave padding to cut away.
ANYRES = [(12, 30), (15, 14), (30, 28), (10, 47), (31, 15)]
# Multiples of two patches of four pixels, one much larger than the others.
NATIVE = [(16, 8), (40, 48), (8, 8), (8, 24), (16, 16)]
PADDED = [(16, 16), (16, 12), (8, 16), (16, 16), (12, 8)]


def llava_next(text: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=16),
        text_config=text,
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        image_grid_pinpoints=PINPOINTS,
    )


def llava_onevision(text: Any) -> Any:
    from transformers import LlavaOnevisionConfig, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        video_token_index=VIDEO_ID,
        video_token_id=VIDEO_ID,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )


def _idefics(vision: Any, config: Any, text: Any) -> Any:
    tower = vision(**TOWER)
    return config(
        vision_config=tower,
        text_config=text,
        image_token_id=IMAGE_ID,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=None,
    )


def idefics3(text: Any) -> Any:
    from transformers import Idefics3Config, Idefics3VisionConfig

    return _idefics(Idefics3VisionConfig, Idefics3Config, text)


def smolvlm(text: Any) -> Any:
    from transformers import SmolVLMConfig, SmolVLMVisionConfig

    return _idefics(SmolVLMVisionConfig, SmolVLMConfig, text)


def mistral3(text: Any) -> Any:
    from transformers import Mistral3Config, PixtralVisionConfig

    tower = PixtralVisionConfig(**(TOWER | {"image_size": 64}))
    return Mistral3Config(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        tie_word_embeddings=False,
    )


def pixtral(text: Any) -> Any:
    """LLaVA around Pixtral's tower, as mistral-community/pixtral-12b is stored."""
    from transformers import LlavaConfig, PixtralVisionConfig

    tower = PixtralVisionConfig(**(TOWER | {"image_size": 64}))
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def glm_vision(hidden: int) -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "image_size": 24,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden,
        "intermediate_size": 40,
    }


IMAGES = (
    "llava_next",
    "llava_onevision",
    "idefics3",
    "smolvlm",
    "mistral3",
    "pixtral",
)


def visual_inputs(
    name: str, generator: torch.Generator, images: int, batch: int, kind: str
) -> dict[str, Any]:
    """Returns a batch's pixels and what belongs to them."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs: dict[str, Any] = {}
    if images and name in ("llava_next", "llava_onevision"):
        inputs["image_sizes"] = torch.tensor([ANYRES[i % 5] for i in range(images)])
        inputs["pixel_values"] = noise(images, 5, 3, 16, 16)
        if kind == "together":
            assert name == "llava_onevision"
            inputs["batch_num_images"] = torch.tensor(_samples(images))
    elif images and name in ("idefics3", "smolvlm"):
        first = images - images // 3
        places = max(first, images - first) if batch > 1 else images
        pixels, mask = torch.zeros(batch, places, 3, 16, 16), torch.zeros(batch, places, 16, 16)
        for image in range(images):
            row, place = (0, image) if image < first or batch == 1 else (1, image - first)
            height, width = PADDED[image % 5]
            pixels[row, place, :, :height, :width] = noise(3, height, width)
            mask[row, place, :height, :width] = 1
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": mask.bool()}
    elif images:
        sizes = [NATIVE[i % 5] for i in range(images)]
        inputs["image_sizes"] = torch.tensor(sizes)
        inputs["pixel_values"] = noise(
            images, 3, max(h for h, _ in sizes), max(w for _, w in sizes)
        )
    if kind == "video":
        assert name == "llava_onevision"
        inputs["pixel_values_videos"] = noise(2, 3, 3, 16, 16)
    return inputs


def _samples(images: int) -> list[int]:
    """One image alone, then the rest together; three together split, as the last of a batch."""
    return [1, images - 1] if images > 1 else [1]


@lru_cache(maxsize=64)
def num_tokens(name: str, images: int, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the visual tokens of each image and of each clip, asked of the model itself."""
    from sequence_models import build

    model: Any = build(name)
    inputs = visual_inputs(name, torch.Generator().manual_seed(0), images, 1, kind)
    clips: tuple[int, ...] = ()
    videos = inputs.pop("pixel_values_videos", None)
    with torch.no_grad():
        if videos is not None:
            clips = tuple(len(clip) for clip in model.get_video_features(videos).pooler_output)
        if not images:
            return (), clips
        pooled = model.get_image_features(**inputs).pooler_output
    if name in ("idefics3", "smolvlm"):
        return (len(pooled[0]) // images,) * images, clips
    return tuple(len(image) for image in pooled), clips
