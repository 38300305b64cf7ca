"""The workloads of `epctl bench multimodal-sp`: models of five families and what they look at.

Sizes are those of the device: on a CPU a step takes about half a second; on a GPU patches are those
of real samples and widths those of 7B models, with fewer layers. Attention is real everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epctl.bench.multimodal_sp_modes import MODES, Mode

IMAGE_ID, VIDEO_ID, START_ID = 5, 6, 7
FIRST_WORD = 16
WORDS = (4, 2, 33)  # before the images, after each, and an odd tail
PATCH = 4  # pixels; the arithmetic of a patch's embedding does not matter here


@dataclass(frozen=True)
class Size:
    """Widths and depths of tower and decoder, and how many patches the workloads have."""

    width: int
    heads: int
    layers: int
    hidden: int
    text_heads: int
    kv_heads: int
    text_layers: int
    vocab: int
    frame: int  # patches a side of a video frame
    image: int  # patches a side of the one large image
    median: int  # patches of the median of the mixed images
    tile: int  # patches a side of an InternVL tile
    clip: int  # patches a side of a LLaVA image
    long_image: int  # patches a side of each of the long text's images
    long_tokens: int  # of the long text, those of its images among them


CPU = Size(96, 4, 4, 128, 4, 2, 2, 512, 8, 48, 160, 8, 12, 24, 1024)
# Real head counts at small widths: 28 query and 4 key heads, 16 in the tower.
GPU_GATE = Size(128, 16, 4, 448, 28, 4, 2, 512, 8, 48, 160, 8, 12, 24, 1024)
GPU = Size(1280, 16, 8, 3584, 28, 4, 4, 32768, 32, 256, 1500, 32, 24, 256, 2**17)


@dataclass(frozen=True)
class Workload:
    """A sample, the family of the model that sees it, and the ways of sharing it."""

    name: str
    family: str
    build: Callable[[Size], tuple[Any, dict[str, Tensor], int]]  # config, inputs, patches
    modes: tuple[Mode, ...] = MODES


def build_model(config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns a randomly initialised model, the same on every rank."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForImageTextToText.from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    return model.train()


def _text(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 2**18,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _rope(size: Size) -> dict[str, Any]:
    half = size.hidden // size.text_heads // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


def _qwen(size: Size, family: str) -> Any:
    import transformers

    vision: dict[str, Any] = {
        "depth": size.layers,
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_heads": size.heads,
        "out_hidden_size": size.hidden,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    ids = {
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": START_ID,
        "vision_end_token_id": START_ID + 1,
    }
    text = _text(size) | {"rope_parameters": _rope(size)}
    if family == "Qwen2.5-VL":
        # One layer in eight attends to whole images, as in the real 32; one in four of four.
        step = min(8, size.layers)
        whole = list(range(step - 1, size.layers, step))
        vision |= {"window_size": 8 * PATCH, "fullatt_block_indexes": whole}
        return transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    deep = {"deepstack_visual_indexes": [0, size.layers // 2], "num_position_embeddings": 2304}
    text |= {"head_dim": size.hidden // size.text_heads}
    return transformers.Qwen3VLConfig(vision_config=vision | deep, text_config=text, **ids)


def _words(count: int, size: Size) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_WORD, size.vocab, (count,), generator=generator).tolist()


def _inputs(
    visual: list[list[int]], size: Size, words: tuple[int, int, int] = WORDS
) -> dict[str, Tensor]:
    """Returns ids and labels: some words, each image's tokens and words, and a tail of words."""
    before, after_each, tail = words
    ids = _words(before, size)
    for tokens in visual:
        ids += [*tokens, *_words(after_each, size)]
    ids_BS = torch.tensor([ids + _words(tail, size)])
    return {"input_ids": ids_BS, "labels": ids_BS.masked_fill(ids_BS < FIRST_WORD, -100)}


def _packed(
    size: Size,
    family: str,
    grids: list[tuple[int, int, int]],
    *,
    video: bool,
    words: tuple[int, int, int] = WORDS,
) -> tuple[Any, dict[str, Tensor], int]:
    token = VIDEO_ID if video else IMAGE_ID
    visual = [[START_ID] + [token] * (t * h * w // 4) for t, h, w in grids]
    inputs = _inputs(visual, size, words)
    rows = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(rows, 3 * 2 * PATCH**2, generator=generator)
    names = (
        ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    )
    inputs |= {names[0]: pixels, names[1]: torch.tensor(grids)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int() * (2 if video else 1)
    return _qwen(size, family), inputs, rows


def _video(size: Size) -> tuple[Any, dict[str, Tensor], int]:
    return _packed(size, "Qwen2.5-VL", [(64, size.frame, size.frame)], video=True)


def _large_image(size: Size) -> tuple[Any, dict[str, Tensor], int]:
    return _packed(size, "Qwen2.5-VL", [(1, size.image, size.image)], video=False)


def _mixed_images(size: Size) -> tuple[Any, dict[str, Tensor], int]:
    """Sixteen native-resolution images: lognormal sizes, sigma 0.8, all aspect ratios near one."""
    generator = random.Random(16)
    grids = []
    for _ in range(16):
        patches = size.median * generator.lognormvariate(0.0, 0.8)
        height = max(2, 2 * round(patches**0.5 / 2))
        width = max(2, 2 * round(patches / height / 2))
        grids.append((1, height, width))
    return _packed(size, "Qwen3-VL", grids, video=False)


def _long_text(size: Size) -> tuple[Any, dict[str, Tensor], int]:
    """Exactly `long_tokens`: two images, and words before, between and after them in thirds."""
    side = size.long_image
    num_words = size.long_tokens - 2 * (1 + side**2 // 4)  # an image begins with one more token
    third, rest = divmod(num_words, 3)
    grids = [(1, side, side)] * 2
    return _packed(size, "Qwen2.5-VL", grids, video=False, words=(third, third, rest))


def _tower(size: Size, side: int) -> dict[str, Any]:
    return {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "image_size": side * PATCH,
        "patch_size": PATCH,
    }


def _tiles(size: Size, count: int, side: int, tokens: int) -> tuple[dict[str, Tensor], int]:
    inputs = _inputs([[IMAGE_ID] * tokens] * count, size)
    generator = torch.Generator().manual_seed(2)
    shape = (count, 3, side * PATCH, side * PATCH)
    inputs["pixel_values"] = torch.randn(shape, generator=generator)
    return inputs, count * (side**2 + 1)


def _internvl(size: Size) -> tuple[Any, dict[str, Tensor], int]:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    tower = _tower(size, size.tile)
    squares: dict[str, Any] = {key: [tower[key]] * 2 for key in ("image_size", "patch_size")}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**(tower | squares)),
        text_config=Qwen2Config(**_text(size)),
        image_token_id=IMAGE_ID,
    )
    inputs, rows = _tiles(size, 64, size.tile, size.tile**2 // 4)
    return config, inputs, rows


def _llava(size: Size) -> tuple[Any, dict[str, Tensor], int]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    # The last layer but one is used, so the tower has one more.
    tower = _tower(size, size.clip) | {"num_hidden_layers": size.layers + 1}
    text = _text(size) | {"num_key_value_heads": size.text_heads}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**text),
        image_token_id=IMAGE_ID,
    )
    inputs, rows = _tiles(size, 8, size.clip, size.clip**2)
    return config, inputs, rows


WORKLOADS = (
    Workload("video, 64 frames", "Qwen2.5-VL", _video),
    Workload("one large image", "Qwen2.5-VL", _large_image),
    Workload("16 mixed images", "Qwen3-VL", _mixed_images),
    Workload("64 tiles", "InternVL", _internvl),
    Workload("8 images", "LLaVA-1.5", _llava),
    # Too long for one GPU. One mode only: with the whole tower on every rank two run out of memory
    # as well, and a rank of a group that does leaves the others waiting for it in a collective.
    Workload("long text, 2 images", "Qwen2.5-VL", _long_text, ("aligned",)),
)
