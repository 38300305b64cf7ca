"""What a model is, as far as bytes and FLOPs go: its parameters by shape, its widths. No torch.

Letters of the formulas: D hidden size, V vocabulary, L layers, E experts, K top_k, I expert
intermediate size, F dense intermediate size, H heads, T tokens of a rank's micro-batch.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from epctl.config import OptimSection
from epctl.errors import ConfigError
from epctl.layout.facts import ConfigFacts
from epctl.layout.model import (
    ModelLayout,
    MoELayout,
    ParameterShape,
    Projection,
    VisionLayout,
)

# A processor cuts one image or clip to so many patches (16,384 tokens when four are merged).
MOST_PATCHES = 65_536
Kind = Literal["muon", "adamw"]
Part = Literal["experts", "dense"]
# What `train.parameters` has words for, as patterns of checkpoint names.
PARTS = {
    "experts": r"\.experts\.\d+\.",
    "attention": r"\.\w*attn\.",
    "router": r"\.(gate|router)(\.\w+)?\.weight$",
}


@dataclass(frozen=True, slots=True)
class ParameterFamily:
    """`count` Parameters of one shape. Of experts the first dim is all experts of a layer."""

    part: Part
    shape: tuple[int, ...]
    count: int
    kind: Kind
    trained: bool
    is_embedding: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads and widths of one attention layer; ranks are 0 without MLA's latent projections."""

    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    has_qk_norm: bool = False


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A vision tower: patches in, one token a `merge_size` squared patches out."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool
    merge_size: int
    num_full_layers: int
    window_patches: int


# Compared and hashed by identity: it is the key of many remembered sums.
@dataclass(frozen=True, eq=False)
class ModelShape:
    """Everything the memory and the cost model ask of a model; counts are of the whole model."""

    name: str
    families: tuple[ParameterFamily, ...]
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    expert_intermediate: int
    num_expert_projections: int
    shared_intermediate: int
    dense_intermediate: int
    attention: AttentionShape | None
    vision: VisionShape | None = None

    def usual_patches(self, sequence_length: int) -> int:
        """Returns patches of a sequence nobody has seen: half its tokens, up to a large image."""
        if self.vision is None:
            return 0
        return min(sequence_length // 2 * self.vision.merge_size**2, MOST_PATCHES)

    @property
    def num_expert_parameters(self) -> int:
        return sum(f.count * f.num_elements for f in self.families if f.part == "experts")

    @property
    def num_dense_parameters(self) -> int:
        return sum(f.count * f.num_elements for f in self.families if f.part == "dense")

    @property
    def num_parameters(self) -> int:
        return self.num_expert_parameters + self.num_dense_parameters

    @property
    def layer_expert_elements(self) -> int:
        """Elements of one layer's routed experts, all of them."""
        return self.num_expert_projections * (
            self.num_experts * self.expert_intermediate * self.hidden_size
        )

    @property
    def num_head_elements(self) -> int:
        """Elements of the head, or of the embedding that stands for it."""
        return self.vocab_size * self.hidden_size

    @functools.cached_property
    def num_matrix_parameters(self) -> int:
        """Parameters that a token multiplies with besides routed experts and the head."""
        return sum(
            f.count * f.num_elements
            for f in self.families
            if f.part == "dense" and not f.is_embedding and len(f.shape) >= 2
        )


def model_shape(
    layout: ModelLayout,
    config: Mapping[str, Any],
    optim: OptimSection | None = None,
    trained: str = "all",
) -> ModelShape:
    """Returns the shape of a model; `trained` is `train.parameters`.

    Raises ConfigError if `trained` is no regular expression or names nothing.
    """
    optim = optim or OptimSection()
    facts = ConfigFacts(config)
    moe, decoder = layout.moe, layout.decoder
    matches = _matcher(trained)
    families = Counter[tuple[Any, ...]]()
    for row, count in _parameters(layout, optim, matches):
        families[row] += count
    built = tuple(
        ParameterFamily(part, sizes, count, kind, is_trained, embedding)
        for (part, sizes, kind, is_trained, embedding), count in families.items()
    )
    if not any(f.trained for f in built):
        raise ConfigError(
            f"`--train {trained}` matches no parameter of the model",
            hint=f"use all, {', '.join(PARTS)}, or a regex of checkpoint names",
        )
    hidden = (decoder and decoder.hidden_size) or (moe and moe.hidden_size) or 0
    return ModelShape(
        name=layout.id,
        families=built,
        hidden_size=hidden,
        vocab_size=_vocab_size(layout, hidden),
        num_layers=decoder.num_layers if decoder else 0,
        num_moe_layers=len(moe.layers) if moe else 0,
        num_experts=moe.num_experts if moe else 0,
        top_k=(moe.top_k or 1) if moe else 0,
        expert_intermediate=moe.expert_intermediate_size if moe else 0,
        num_expert_projections=len(moe.storage.projections) if moe else 0,
        shared_intermediate=moe.shared_experts.intermediate_size
        if moe and moe.shared_experts
        else 0,
        dense_intermediate=_dense_intermediate(layout, facts),
        attention=_attention(layout, facts),
        vision=_vision(layout.vision, layout, config) if layout.vision else None,
    )


def _everything(_: str) -> bool:
    return True


def _matcher(trained: str) -> Callable[[str], bool]:
    if trained == "all":
        return _everything
    try:
        pattern = re.compile(PARTS.get(trained, trained))
    except re.error as error:
        raise ConfigError(f"`--train {trained}` is no regular expression: {error}") from None
    return lambda name: pattern.search(name) is not None


def _parameters(
    layout: ModelLayout, optim: OptimSection, matches: Callable[[str], bool]
) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yields ((part, shape, kind, trained, is_embedding), count)."""
    moe = layout.moe
    if moe is not None:
        yield from _expert_parameters(moe, optim, matches)
    router = moe.router.weight if moe is not None else None
    for found in layout.parameter_shapes:
        if found.part == "routed_experts":
            continue
        kind = _kind(found, optim, router)
        num_trained = sum(map(matches, found.names))
        shape, embedding = found.shape, found.part == "embeddings"
        for trained, count in ((True, num_trained), (False, len(found.names) - num_trained)):
            if count:
                yield ("dense", shape, kind, trained, embedding), count


def _expert_parameters(
    moe: MoELayout, optim: OptimSection, matches: Callable[[str], bool]
) -> Iterator[tuple[tuple[Any, ...], int]]:
    """As the runtime holds them, whatever the storage: gate, up, down apart, stacked by layer."""
    kind = "adamw" if optim.name == "adamw" else "muon"
    inward = (moe.expert_intermediate_size, moe.expert_hidden_size)
    for layer in moe.layers:
        num_experts = moe.experts_of_layer(layer)
        for projection in moe.storage.projections:
            shape = inward[::-1] if projection == "down" else inward
            trained = _trained_together(moe, layer, projection, matches)
            yield ("experts", (num_experts, *shape), kind, trained, False), 1
            if projection in moe.storage.biases or "gate_up" in moe.storage.biases:
                yield ("experts", (num_experts, shape[0]), "adamw", trained, False), 1


def _trained_together(
    moe: MoELayout, layer: int, projection: Projection, matches: Callable[[str], bool]
) -> bool:
    """True if the projection is trained. Raises ConfigError if only of some experts."""
    if matches is _everything:
        return True
    names = [
        _checkpoint_name(moe, layer, projection, expert)
        for expert in range(moe.experts_of_layer(layer))
    ]
    hits = sum(map(matches, names))
    if 0 < hits < len(names):
        raise ConfigError(
            f"`--train` names {hits} of {len(names)} experts of a layer; they train together",
            hint=r"write `experts\.\d+\.` in place of one expert's number",
        )
    return hits > 0


def _checkpoint_name(moe: MoELayout, layer: int, projection: Projection, expert: int) -> str:
    """Returns a name per expert, as export writes it, whatever the storage."""
    name = moe.expert_tensor(layer, expert, projection).name
    if moe.storage.kind == "per_expert":
        return name
    before = name.rpartition(".experts.")[0] or name.rpartition(".")[0]
    return f"{before}.experts.{expert}.{projection}_proj.weight"


def _kind(found: ParameterShape, optim: OptimSection, router: str | None) -> Kind:
    """The rule of runtime/parameter_groups.py by name and shape; a test compares the two."""
    name, shape = found.names[0], found.shape
    if optim.name == "adamw" or len(shape) != 2 or min(shape) <= 1:
        return "adamw"
    if found.part == "embeddings" or not name.endswith("weight") or "embed" in name:
        return "adamw"
    if router is not None and name.endswith(router):
        return optim.router
    return "muon"


def _vocab_size(layout: ModelLayout, hidden: int) -> int:
    sizes = [f.shape[0] for f in layout.parameter_shapes if f.part == "embeddings"]
    return max(sizes, default=0)


def _dense_intermediate(layout: ModelLayout, facts: ConfigFacts) -> int:
    """Width of the dense blocks: of the first layers of a MoE, or of all layers."""
    has_dense = layout.moe is None or layout.moe.dense_layers
    value = facts.look_up(["intermediate_size", "ffn_dim", "n_inner"])[0] if has_dense else None
    return value if isinstance(value, int) else 0


def _attention(layout: ModelLayout, facts: ConfigFacts) -> AttentionShape | None:
    decoder = layout.decoder
    if decoder is None or not decoder.num_heads:
        return None
    heads, kv_heads = decoder.num_heads, decoder.num_kv_heads or decoder.num_heads

    def number(*keys: str) -> int:
        value = facts.look_up(keys)[0]
        return value if isinstance(value, int) else 0

    rope, nope = number("qk_rope_head_dim"), number("qk_nope_head_dim")
    if nope:
        return AttentionShape(
            heads,
            heads,
            nope + rope,
            number("v_head_dim") or nope,
            number("q_lora_rank"),
            number("kv_lora_rank"),
            rope,
        )
    width = number("head_dim") or (decoder.hidden_size or heads) // heads
    normed = any("q_norm" in name for f in layout.parameter_shapes for name in f.names[:1])
    return AttentionShape(heads, kv_heads, width, width, has_qk_norm=normed)


def _vision(
    vision: VisionLayout, layout: ModelLayout, config: Mapping[str, Any]
) -> VisionShape | None:
    attention = vision.attention
    if not attention.hidden_size:
        return None
    inside = [f for f in layout.parameter_shapes if f.part == "vision" and len(f.shape) == 2]
    prefix = vision.projector_prefix or "\0"
    widths = [
        max(f.shape)
        for f in inside
        if len(f.names) >= attention.num_layers
        and not f.names[0].startswith(prefix)
        and "qkv" not in f.names[0]
    ]
    gated = any("gate_proj" in f.names[0] for f in inside)
    merge, windowed = vision.merge_size or 1, len(vision.windowed_layers)
    side = (vision.window_size or 0) // (vision.patch_size or 1)
    return VisionShape(
        attention.num_layers,
        attention.hidden_size,
        max(widths, default=4 * attention.hidden_size),
        gated,
        merge,
        attention.num_layers - windowed,
        side * side if windowed else 0,
    )
