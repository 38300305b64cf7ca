"""Tiny random models of every family of the sequence-parallel tests, and batches for them.

Every quirk is on: fewer key/value heads than ranks, odd lengths, padding, packed documents, mRoPE,
windows, deepstack, images of different sizes, sequences with and without images.
"""

from __future__ import annotations

from typing import Any

import sequence_image_models as images_of
import torch
from sequence_image_models import IMAGES, num_tokens, visual_inputs
from torch import Tensor, nn

VOCAB = 96
IMAGE_ID, VIDEO_ID, START_ID = 90, 91, 92
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PATCH = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
# (frames, height, width) in patches: odd sizes, one much larger, more than one window each.
GRIDS = [(1, 4, 6), (1, 8, 10), (1, 2, 2), (1, 6, 4), (1, 4, 4)]
CLIP = (3, 4, 4)


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**(TEXT | changes))


def qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**(TEXT | {"head_dim": 12} | changes))


def qwen2_window(**changes: Any) -> Any:
    """Seven heads, sliding windows in one layer of two: nothing divides."""
    from transformers import Qwen2Config

    values = {
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    }
    return Qwen2Config(**(TEXT | values | changes))


def six_heads(**changes: Any) -> Any:
    """Six query and three key heads: uneven shares of unaligned groups on four ranks."""
    return llama(
        **({"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3} | changes)
    )


def deepseek_v3(**changes: Any) -> Any:
    from parity_ranks import tiny_config

    return tiny_config(
        **({"vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 4} | changes)
    )


def llava(**changes: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=llama(**changes),
        image_token_index=IMAGE_ID,
        image_token_id=IMAGE_ID,
    )


def internvl(**changes: Any) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=[16, 16],
        patch_size=[4, 4],
        layer_scale_init_value=0.5,
        use_qk_norm=True,
    )
    text = Qwen2Config(**(TEXT | changes))
    return InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID)


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": START_ID,
        "vision_end_token_id": 93,
    }


def qwen2_vl(**changes: Any) -> Any:
    from transformers import Qwen2VLConfig

    vision = {
        "depth": 3,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        **PATCH,
    }
    text = TEXT | {"rope_parameters": MROPE} | changes
    return Qwen2VLConfig(vision_config=vision, text_config=text, **_qwen_ids())


def qwen2_5_vl(vision_changes: dict[str, Any] | None = None, **changes: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1, 3],
        **PATCH,
        **(vision_changes or {}),
    }
    text = TEXT | {"rope_parameters": MROPE} | changes
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_qwen_ids())


def _qwen3_vision() -> dict[str, Any]:
    return {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
        **PATCH,
    }


def qwen3_vl(**changes: Any) -> Any:
    from transformers import Qwen3VLConfig

    text = TEXT | {"head_dim": 8, "rope_parameters": MROPE} | changes
    return Qwen3VLConfig(vision_config=_qwen3_vision(), text_config=text, **_qwen_ids())


def qwen3_vl_moe(**changes: Any) -> Any:
    from transformers import Qwen3VLMoeConfig

    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
    }
    text = TEXT | {"head_dim": 8, "rope_parameters": MROPE} | experts | changes
    return Qwen3VLMoeConfig(vision_config=_qwen3_vision(), text_config=text, **_qwen_ids())


def _glm_ids() -> dict[str, int]:
    return _qwen_ids() | {"image_start_token_id": 88, "image_end_token_id": 89}


def glm4v(**changes: Any) -> Any:
    """One token for images and frames, positions resampled by a grid, no window."""
    from transformers import Glm4vConfig

    text = TEXT | {"rope_parameters": MROPE} | changes
    vision = images_of.glm_vision(text["hidden_size"])
    return Glm4vConfig(vision_config=vision, text_config=text, **_glm_ids())


def glm4v_moe(**changes: Any) -> Any:
    from transformers import Glm4vMoeConfig

    experts = {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    }
    rope = MROPE | {"partial_rotary_factor": 1.0}
    text = TEXT | {"rope_parameters": rope} | experts | changes
    vision = images_of.glm_vision(text["hidden_size"])
    return Glm4vMoeConfig(vision_config=vision, text_config=text, **_glm_ids())


def kimi_k25(**changes: Any) -> Any:
    """MoonViT before DeepSeek-V3's decoder: rows line by line, bicubic positions, MLA."""
    from transformers import Kimi_K25Config

    vision = {
        "patch_size": 4,
        "pos_emb_height": 6,
        "pos_emb_width": 6,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
    }
    return Kimi_K25Config(
        vision_config=vision,
        text_config=deepseek_v3(**changes),
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **_qwen_ids(),
    )


def _with_text(name: str, text: Any) -> Any:
    def made(**changes: Any) -> Any:
        return getattr(images_of, name)(text(**changes))

    made.__name__ = name
    return made


def mistral(**changes: Any) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**(TEXT | {"sliding_window": None, "head_dim": 8} | changes))


CONFIGS = {
    f.__name__: f
    for f in (
        llama,
        qwen3,
        qwen2_window,
        six_heads,
        deepseek_v3,
        llava,
        internvl,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        glm4v,
        glm4v_moe,
        kimi_k25,
        *(_with_text(name, mistral if name == "mistral3" else llama) for name in IMAGES),
    )
}
TILES = {"llava": 4, "internvl": 4}  # visual tokens a tile
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
GLM = ("glm4v", "glm4v_moe")
PACKED = (*QWEN, *GLM, "kimi_k25")


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> nn.Module:
    """Returns the model with larger weights than usual, so that every path carries gradient."""
    import transformers

    config = CONFIGS[name](**changes)
    visual = name in TILES or name in PACKED or name in IMAGES
    auto = transformers.AutoModelForImageTextToText if visual else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model: nn.Module = auto.from_config(config, attn_implementation="sdpa").to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            center = 1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0
            parameter.copy_((center + 0.15 * noise).to(dtype))
    return model.train()


def batch(name: str, seed: int, kind: str = "plain", images: int = 5) -> dict[str, Any]:
    """Returns a batch of the model's keyword arguments, labels included.

    Args:
        kind: plain (one sequence), padded (two, the second shorter, padded right), left (padded
            left), packed (documents by positions), video (a clip besides the images; GLM-4V has
            either), together (images that are not divided into tiles).
        images: images of the whole batch.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in TILES:
        return _tile_batch(name, generator, kind, images)
    if name in IMAGES:
        return _image_batch(name, generator, kind, images)
    if name in PACKED:
        return _packed_batch(name, generator, kind, images)
    return _text_batch(generator, kind)


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2, 80, (count,), generator=generator).tolist()


def _rows(sequences: list[list[int]], kind: str) -> dict[str, Tensor]:
    """Pads sequences to one length and makes labels: nothing visual, nothing padded."""
    length = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        padding = length - len(sequence)
        kept = [1] * len(sequence)
        left = kind == "left"
        ids.append([0] * padding + sequence if left else sequence + [0] * padding)
        mask.append([0] * padding + kept if left else kept + [0] * padding)
    ids_BS, mask_BS = torch.tensor(ids), torch.tensor(mask)
    visual = (ids_BS == IMAGE_ID) | (ids_BS == VIDEO_ID)
    labels_BS = ids_BS.masked_fill((mask_BS == 0) | visual, -100)
    result = {"input_ids": ids_BS, "labels": labels_BS}
    return result if mask_BS.all() and kind != "padded" else result | {"attention_mask": mask_BS}


def _text_batch(generator: torch.Generator, kind: str) -> dict[str, Any]:
    if kind in ("padded", "left"):
        return _rows([_words(23, generator), _words(9, generator)], kind)
    inputs: dict[str, Any] = _rows([_words(23, generator), _words(23, generator)], kind)
    if kind == "packed":
        first = [*range(7), *range(11), *range(5)]
        inputs["position_ids"] = torch.tensor([first, [*range(15), *range(8)]])
    return inputs


def _tile_batch(name: str, generator: torch.Generator, kind: str, images: int) -> dict[str, Any]:
    first = images - images // 3
    shares = [first, images - first] if kind in ("padded", "left") else [images]
    sequences = []
    for index, share in enumerate(shares):
        sequence = _words(5 - index, generator)
        for _ in range(share):
            sequence += [IMAGE_ID] * TILES[name] + _words(3, generator)
        sequences.append(sequence)
    inputs: dict[str, Any] = _rows(sequences, kind)
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
    return inputs


def _image_batch(name: str, generator: torch.Generator, kind: str, images: int) -> dict[str, Any]:
    first = images - images // 3
    counts, clips = num_tokens(name, images, kind)
    shares = [counts[:first], counts[first:]] if kind in ("padded", "left") else [counts]
    sequences = []
    for index, share in enumerate(shares):
        sequence = _words(5 - index, generator)
        for count in share:
            sequence += [IMAGE_ID] * count + _words(3, generator)
        sequences.append(sequence)
    for count in clips:
        sequences[0] += [VIDEO_ID] * count + _words(2, generator)
    inputs: dict[str, Any] = _rows(sequences, kind)
    if kind == "packed":
        length = inputs["input_ids"].shape[1]
        text = [*range(length // 3), *range(length - length // 3)]
        inputs["position_ids"] = torch.tensor([text])
    return inputs | visual_inputs(name, generator, images, len(sequences), kind)


def _packed_batch(name: str, generator: torch.Generator, kind: str, images: int) -> dict[str, Any]:
    if name in GLM and kind == "video":
        images = 0  # a video's frames are written with the images' token
    grids = [GRIDS[i % len(GRIDS)] for i in range(images)]
    first = len(grids) - len(grids) // 3
    shares = [grids[:first], grids[first:]] if kind in ("padded", "left") else [grids]
    sequences = []
    for index, share in enumerate(shares):
        sequence = _words(5 - index, generator)
        for grid in share:
            sequence += _visual_tokens(grid, IMAGE_ID) + _words(3, generator)
        sequences.append(sequence)
    if kind == "video":
        frames, height, width = CLIP
        # Qwen3-VL writes a timestamp before each frame, the others a clip's tokens in one run.
        apart = frames if name.startswith(("qwen3", "glm")) else 1
        for _ in range(apart):
            shape = (frames // apart, height, width)
            token = IMAGE_ID if name in GLM else VIDEO_ID
            sequences[0] += _visual_tokens(shape, token) + _words(4, generator)
    inputs: dict[str, Any] = _rows(sequences, kind)
    ids = inputs["input_ids"]
    image_type = 2 if name in GLM and kind == "video" else 1
    inputs["mm_token_type_ids"] = image_type * (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
    if name == "kimi_k25":
        del inputs["mm_token_type_ids"]
    if grids:
        inputs["image_grid_thw"] = torch.tensor(grids)
        inputs["pixel_values"] = _pixels(grids, generator)
        if name == "kimi_k25":  # patches in their own shape, one frame
            pixels = inputs["pixel_values"].unflatten(1, (3, 2, 4, 4))
            inputs["pixel_values"] = pixels[:, :, 0].contiguous()
    if kind == "video":
        inputs["video_grid_thw"] = torch.tensor([CLIP])
        inputs["pixel_values_videos"] = _pixels([CLIP], generator)
    if kind == "packed":
        length = ids.shape[1]
        text = [*range(length // 3), *range(length - length // 3)]
        rotary = torch.randint(0, 50, (3, 1, length), generator=generator)
        text_1BS = torch.tensor(text).view(1, 1, -1)
        one_axis = name == "kimi_k25"
        inputs["position_ids"] = text_1BS[0] if one_axis else torch.cat((text_1BS, rotary))
    return inputs


def _visual_tokens(grid: tuple[int, int, int], token: int) -> list[int]:
    frames, height, width = grid
    return [START_ID] + [token] * (frames * height * width // 4)


def _pixels(grids: list[tuple[int, int, int]], generator: torch.Generator) -> Tensor:
    rows = sum(t * h * w for t, h, w in grids)
    return torch.randn(rows, 3 * 2 * 4 * 4, generator=generator)
