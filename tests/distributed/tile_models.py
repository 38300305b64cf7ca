"""Tiny checkpoints whose towers see whole images and tiles, with processors, written to disk.

The models are those of the sequence-parallel tests with a vocabulary of bytes. A tile is 16 x 16
pixels. Special tokens, templates and how many tokens an image has are those of the hub's models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sequence_image_models as images_of
import sequence_models
import torch
import visual_models

IMAGE_ID = 260  # the first token after the byte tokenizer's own, whatever it is called
TILE = {"height": 16, "width": 16}
# transformers' Mistral3 cannot split off an image of a single token, so none is of 8 x 8.
SIZES = [(24, 16), (40, 24), (12, 10), (16, 30), (64, 64)]
_TEMPLATE = (
    "{%% for m in messages %%}<{{ m.role }}>"
    "{%% if m.content is string %%}{{ m.content }}{%% else %%}{%% for c in m.content %%}"
    "{%% if c.type == 'image' %%}%s{%% elif c.type == 'video' %%}<video>\n"
    "{%% else %%}{{ c.text }}{%% endif %%}{%% endfor %%}{%% endif %%}"
    "<|im_end|>{%% endfor %%}{%% if add_generation_prompt %%}<assistant>{%% endif %%}"
)


class Kind(NamedTuple):
    """What a model's repository holds beside the weights.

    Attributes:
        tokens: special tokens by the tokenizer's attributes, the image's first.
        image: what the template writes for an image.
        settings: of processor_config.json, its class aside.
        plain: what the combined processor hands to the image processor.
        needs: a package without which transformers makes no such processor.
    """

    config: Callable[..., Any]
    processor: Callable[[], Any]
    tokens: dict[str, str]
    image: str
    settings: dict[str, Any]
    plain: dict[str, Any]
    needs: str = "PIL"

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def _clip() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=TILE)


def _got_ocr() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size=TILE, max_patches=4)


def _llava_next() -> Any:
    from transformers.models.llava_next import image_processing_pil_llava_next as module

    return module.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=TILE, image_grid_pinpoints=images_of.PINPOINTS
    )


def _llava_onevision() -> Any:
    from transformers.models.llava_onevision import image_processing_pil_llava_onevision as module

    return module.LlavaOnevisionImageProcessorPil(
        size=TILE, image_grid_pinpoints=images_of.PINPOINTS
    )


def _idefics3() -> Any:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})


def _smolvlm() -> Any:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})


def _pixtral() -> Any:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    return PixtralImageProcessorPil(size={"longest_edge": 40}, patch_size={"height": 4, "width": 4})


def internvl_moe(**changes: Any) -> Any:
    """InternVL3.5-30B-A3B is a tower of tiles before Qwen3's experts."""
    from transformers import Qwen3MoeConfig

    config = sequence_models.internvl()
    config.text_config = Qwen3MoeConfig(
        **sequence_models.TEXT | {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 24, "decoder_sparse_step": 1} | changes,
    )  # fmt: skip
    return config


_LLAVA = {"image_token": "<image>"}
_INTERNVL = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
_IDEFICS = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
_IDEFICS |= {"end_of_utterance_token": "<end_of_utterance>", "global_token": "<global-img>"}
_IDEFICS |= {f"tile_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)}
_PIXTRAL = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}
# The tower's class token is counted and taken away again, or there is none.
_CLASS = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_OF_INTERNVL = (_got_ocr, _INTERNVL, "<IMG_CONTEXT>\n", {"image_seq_length": 4},
                {"crop_to_patches": True})  # fmt: skip
KINDS = {
    "llava": Kind(
        sequence_models.llava, _clip, _LLAVA, "<image>\n", {"patch_size": 8, **_CLASS}, {},
    ),
    "internvl": Kind(sequence_models.internvl, *_OF_INTERNVL),
    "internvl_moe": Kind(internvl_moe, *_OF_INTERNVL),
    "llava_next": Kind(
        sequence_models.CONFIGS["llava_next"], _llava_next, _LLAVA, "<image>\n",
        {"patch_size": 4, **_CLASS}, {"do_pad": True},
    ),
    "llava_onevision": Kind(
        sequence_models.CONFIGS["llava_onevision"], _llava_onevision,
        {"image_token": "<image>", "video_token": "<video>"}, "<image>\n",
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full",
         "vision_aspect_ratio": "anyres_max_2"}, {},
    ),
    "idefics3": Kind(
        sequence_models.CONFIGS["idefics3"], _idefics3, _IDEFICS, "<image>",
        {"image_seq_len": 4}, {},
    ),
    "smolvlm": Kind(
        sequence_models.CONFIGS["smolvlm"], _smolvlm, _IDEFICS, "<image>",
        {"image_seq_len": 4}, {}, "num2words",
    ),
    "pixtral": Kind(
        sequence_models.CONFIGS["pixtral"], _pixtral, _PIXTRAL, "[IMG]",
        {"patch_size": 4, "spatial_merge_size": 1}, {}, "torchvision",
    ),
    "mistral3": Kind(
        sequence_models.CONFIGS["mistral3"], _pixtral, _PIXTRAL, "[IMG]",
        {"patch_size": 4, "spatial_merge_size": 2}, {"patch_size": 8}, "torchvision",
    ),
}  # fmt: skip


HERE = [name for name, kind in KINDS.items() if kind.is_here]


def tokenizer(kind: Kind) -> Any:
    from transformers import PreTrainedTokenizerFast

    from epctl.runtime.default_model import byte_tokenizer

    tokens = byte_tokenizer()
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokens.backend_tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=kind.tokens | {"turn_end": "<|im_end|>"},
    )
    found.chat_template = _TEMPLATE % kind.image
    return found


def write_tile_model(name: str, folder: Path) -> Path:
    """Writes model, tokenizer and processor of one of `KINDS`."""
    import json

    kind = KINDS[name]
    words = tokenizer(kind)
    image_id = words.convert_tokens_to_ids(next(iter(kind.tokens.values())))
    assert len(words) <= visual_models.VOCAB
    config = kind.config(vocab_size=visual_models.VOCAB, pad_token_id=visual_models.PAD)
    config.image_token_id = image_id
    if "video_token" in kind.tokens and hasattr(config, "video_token_id"):
        config.video_token_id = words.convert_tokens_to_ids("<video>")
    visual_models.write_weights(config, folder)
    words.save_pretrained(folder)
    kind.processor().save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(kind.settings))
    return folder


def plain_images(name: str, images: list[Any], **settings: Any) -> dict[str, torch.Tensor]:
    """What the model's own image processor makes of the images of one document."""
    kind = KINDS[name]
    given = kind.plain | settings
    found = dict(kind.processor()(images=[images], return_tensors="pt", **given))
    return {k: v for k, v in found.items() if k not in ("num_patches", "rows", "cols")}
