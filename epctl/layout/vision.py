"""The vision side: tower, projector and decoder by prefix, sizes by config, layers by tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from epctl.layout.experts import Groups
from epctl.layout.facts import ConfigFacts
from epctl.layout.families import Family
from epctl.layout.model import AttentionLayout, VisionLayout
from epctl.layout.names import HOLE
from epctl.layout.router import Reasons

_TOWER = re.compile(r"^((?:[a-z_]+\.){0,2}?(?:[a-z_]*vision[a-z_]*|visual|image_tower|vit)\.)")
_PROJECTOR = re.compile(
    r"^((?:[a-z_]+\.){0,2}?(?:[a-z_]*projector|connector|merger|mlp1|aligner|embed_vision|"
    r"vision_language_adapter)\.)"
)
_EMBEDDING = re.compile(
    r"^((?:[a-z_]+\.){0,3})(?:embed_tokens|word_embeddings|wte|tok_embeddings|embed|embeddings)"
    r"\.weight$"
)
_SECTIONS = (
    "vision_config.", "vision_encoder.", "thinker_config.vision_config.", "visual.",
    "params_json.vision_encoder.",
)  # fmt: skip
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("depth", "num_hidden_layers", "num_layers", "n_layers"),
    # Where both stand (Qwen2-VL), hidden_size is the width of what the merger puts out.
    "hidden_size": ("embed_dim", "hidden_size", "width", "dim"),
    "num_heads": ("num_heads", "num_attention_heads", "n_heads"),
    "num_kv_heads": ("num_key_value_heads",),
    "patch_size": ("patch_size",),
    "temporal_patch_size": ("temporal_patch_size",),
    "merge_size": ("spatial_merge_size", "merge_kernel_size"),
    "image_size": ("image_size", "force_image_size"),
    "window_size": ("window_size",),
    "full_layers": ("fullatt_block_indexes", "global_attn_indexes"),
}
# Keys outside the vision section: patches a side that become one token, in different words.
_TOP_MERGE = ("spatial_merge_size", "scale_factor")
_SHRINK = ("downsample_ratio", "vision_config.pixel_shuffle_ratio", "pixel_shuffle_ratio")
_SMALLEST_SHRINK = 1 / 64
_LARGEST_SIZE = 2**31
IMAGE_TOKENS = (
    "image_token_id", "image_token_index", "media_placeholder_token_id", "img_context_token_id",
    "thinker_config.image_token_id",
)  # fmt: skip


def decoder_prefix(groups: Groups) -> str | None:
    """Returns what stands before the token embedding's own name, such as `language_model.model.`"""
    for pattern in groups:
        match = _EMBEDDING.match(pattern)
        if match and not _TOWER.match(pattern):
            return match[1]
    return None


def _prefix(groups: Groups, stated: Iterable[str], generic: re.Pattern[str]) -> str | None:
    for prefix in stated:
        if any(pattern.startswith(prefix) for pattern in groups):
            return prefix
    for pattern in groups:
        match = generic.match(pattern)
        if match:
            return match[1]
    return None


def build_vision(
    facts: ConfigFacts, family: Family | None, groups: Groups, reasons: Reasons
) -> VisionLayout | None:
    """Returns the vision layout, None for a model without a vision tower."""
    stated: Mapping[str, Any] = family.vision if family and family.vision else {}
    tower = _prefix(groups, stated.get("tower", ()), _TOWER)
    if tower is None:
        return None
    plain = tower == ""
    value = _Values(facts, plain, reasons)
    num_layers = _count_layers(groups, tower)
    stated_layers = value.whole("num_layers")
    reasons["vision.tower"] = f"tensors below `{tower or '(top)'}`: {num_layers} layers"
    if stated_layers is not None and stated_layers != num_layers:
        reasons["vision.tower"] += f" (config says {stated_layers})"
    heads = value.whole("num_heads")
    full = value.get("full_layers")
    window = value.whole("window_size") if isinstance(full, list) else None
    windowed = tuple(n for n in range(num_layers) if n not in full) if window else ()
    projector = None
    if not plain:
        projector = _prefix(groups, stated.get("projector", ()), _PROJECTOR)
    return VisionLayout(
        tower_prefix=tower,
        projector_prefix=projector,
        decoder_prefix=None if plain else decoder_prefix(groups),
        attention=AttentionLayout(
            num_layers, value.whole("hidden_size"), heads, value.whole("num_kv_heads") or heads
        ),
        patch_size=value.whole("patch_size"),
        temporal_patch_size=value.whole("temporal_patch_size"),
        merge_size=None if plain else _merge_size(value, facts, reasons),
        image_size=value.whole("image_size"),
        window_size=window,
        windowed_layers=windowed,
        image_token_id=None if plain else _image_token(facts, reasons),
        placeholder=stated.get("placeholder"),
        unit=stated.get("unit"),
    )


def _image_token(facts: ConfigFacts, reasons: Reasons) -> int | None:
    token, reason = facts.look_up(IMAGE_TOKENS)
    if reason:
        reasons["vision.image_token_id"] = reason
    return token if type(token) is int else None


class _Values:
    """Looks vision keys up in the vision section (or at the top of a plain encoder's config)."""

    def __init__(self, facts: ConfigFacts, plain: bool, reasons: Reasons) -> None:
        self._facts = facts
        self._sections = ("", *_SECTIONS) if plain else _SECTIONS
        self._reasons = reasons

    def get(self, meaning: str) -> Any:
        keys = [section + key for section in self._sections for key in _ALIASES[meaning]]
        value, reason = self._facts.look_up(keys)
        if reason is not None:
            self._reasons[f"vision.{meaning}"] = reason
        return value

    def whole(self, meaning: str) -> int | None:
        value = self.get(meaning)
        if isinstance(value, list) and value:  # [height, width] or [2, 2]
            value = value[0]
        return value if type(value) is int and 0 < value < _LARGEST_SIZE else None


def _merge_size(value: _Values, facts: ConfigFacts, reasons: Reasons) -> int | None:
    merge = value.whole("merge_size")
    if merge is not None:
        return merge
    top, reason = facts.look_up(_TOP_MERGE)
    if type(top) is int:
        reasons["vision.merge_size"] = str(reason)
        return top
    shrink, reason = facts.look_up(_SHRINK)
    if isinstance(shrink, float) and _SMALLEST_SHRINK <= shrink <= 1:
        reasons["vision.merge_size"] = str(reason)
        return round(1 / shrink)
    return _merge_by_tokens(value, facts, reasons)


def _merge_by_tokens(value: _Values, facts: ConfigFacts, reasons: Reasons) -> int | None:
    tokens, reason = facts.look_up(("mm_tokens_per_image",))
    image, patch = value.whole("image_size"), value.whole("patch_size")
    if type(tokens) is not int or not image or not patch or not 0 < tokens < _LARGEST_SIZE:
        return None
    reasons["vision.merge_size"] = f"{reason}, image_size {image}, patch_size {patch}"
    return round(image / patch / math.sqrt(tokens))


def _count_layers(groups: Groups, tower: str) -> int:
    counts = [
        len({index[0] for index in group.indices})
        for pattern, group in groups.items()
        if pattern.startswith(tower) and HOLE in pattern
    ]
    return max(counts, default=0)
