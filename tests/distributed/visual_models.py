"""Tiny vision-language checkpoints with processors and chats of images, written to disk.

The models are those of the sequence-parallel tests, with a vocabulary of bytes and Qwen's special
tokens; the processor cuts patches of 4 x 4 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sequence_models
import torch

PAD = 258  # of the byte tokenizer
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_end|>")
START_ID, END_ID, IMAGE_ID, VIDEO_ID, TURN_END = range(260, 265)
VOCAB = 272
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> Any:
    from epctl.runtime.default_model import byte_tokenizer

    found = byte_tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    assert found.convert_tokens_to_ids("<|image_pad|>") == IMAGE_ID
    assert len(found) == TURN_END + 1
    return found


def write_visual_model(name: str, folder: Path, *, template: bool = True, **changes: Any) -> Path:
    """Writes model, tokenizer and processor of `qwen2_5_vl` or `qwen3_vl_moe`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = sequence_models.CONFIGS[name](vocab_size=VOCAB, pad_token_id=PAD, **changes)
    config.image_token_id, config.video_token_id = IMAGE_ID, VIDEO_ID
    config.vision_start_token_id, config.vision_end_token_id = START_ID, END_ID
    write_weights(config, folder)
    tokenizer().save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=32 * 32
    )
    processor.save_pretrained(folder)
    if template:  # where Qwen2.5-VL's own repository has it
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def write_weights(config: Any, folder: Path) -> None:
    """Writes a model whose weights are larger than usual, so that every path has a gradient."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            center = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.copy_(center + 0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def write_image(path: Path, width: int, height: int, seed: int) -> str:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.name


SIZES = [(24, 16), (40, 24), (8, 8), (16, 30), (64, 64)]


def write_chats(
    folder: Path,
    count: int = 24,
    video: bool = True,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Path:
    """Writes `chats.jsonl` and its images: columns, parts, marks, clips, and chats without any."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        words = "word " * (n % 4 + 1)
        answer = {"role": "assistant", "content": f"it is {n} {words}"}
        images = [
            "images/" + write_image(folder / f"images/{n}-{i}.png", *sizes[(n + i) % 5], n * 9 + i)
            for i in range((1, 2, 0, 1)[n % 4])
        ]
        record: dict[str, Any] = {"images": images}
        if n % 4 == 0:
            content: Any = [{"type": "image"}, {"type": "text", "text": f"what? {words}"}]
        elif n % 4 == 1:
            content = f"compare <image> with <image>, {words}"
        elif n % 4 == 2 and video and n % 8 == 2:
            frames = [
                write_image(folder / f"clips/{n}/{f:03d}.png", 16, 24, n * 7 + f) for f in range(5)
            ]
            assert len(frames) == 5
            clip = {"type": "video", "video": f"clips/{n}", "fps": 4.0}
            content = [clip, {"type": "text", "text": "and this?"}]
        elif n % 4 == 2:
            content = "no picture here " * 6  # fills a sequence by itself
        else:
            content = f"first of all {words}"  # its image comes first
        record["messages"] = [{"role": "user", "content": content}, answer]
        lines.append(json.dumps(record))
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
