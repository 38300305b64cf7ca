"""Parameters by part, counted from the tensor table alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from epctl.layout.experts import ExpertStack, Groups, Tensors, tail_pattern
from epctl.layout.model import MoELayout, ParameterCounts, ParameterShape, VisionLayout
from epctl.layout.names import NameGroup
from epctl.layout.safetensors import TensorEntry

# Tables that old transformers releases wrote and every loader recomputes.
_STALE = re.compile(r"(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|masked_bias)$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|wte|tok_embeddings|lm_head|embed|output)\.weight$"
)
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_SCALE = re.compile(
    r"(_scale_inv|_scales|\.weight_scale(_2)?|\.input_scale|\.qscale_(weight|act)|\.scale)$"
)
# Constants that modules register as persistent buffers.
_BUFFER = re.compile(r"(\.weight_shape|\balpha|layer_scalar|slope_rate|_decay)$")
_INTEGERS = ("I8", "I16", "I32", "I64", "U16", "U32", "U64", "BOOL")
# The parts that add up to a model's total.
SUMMED_PARTS = ("routed_experts", "shared_experts", "dense", "vision", "embeddings")
_PACKED = re.compile(r"\.(weight_packed|qweight)$")


def is_stale(name: str) -> bool:
    """True for tensors that no model reads and that export drops."""
    return _STALE.search(name) is not None


def logical_elements(name: str, entry: TensorEntry, packed_bits: int | None) -> int:
    """Returns the number of values a tensor stands for.

    `name` may be a pattern. MXFP4 blocks hold two values a byte; int32 words of `weight_packed`
    and `qweight` hold 32 / packed_bits.
    """
    if name.endswith("_blocks") and entry.dtype == "U8":
        return entry.num_elements * 2
    if packed_bits and entry.dtype == "I32" and _PACKED.search(name):
        return entry.num_elements * 32 // packed_bits
    return entry.num_elements


@dataclass(frozen=True, slots=True)
class Partition:
    """Rules that put each tensor pattern into one part of the model."""

    expert_patterns: frozenset[str]
    shared_patterns: frozenset[str]
    buffer_patterns: frozenset[str]
    vision_prefixes: tuple[str, ...]
    mtp_prefixes: tuple[str, ...]
    tied_head: bool

    def part_of(self, pattern: str, groups: Groups) -> str:
        """Returns the ParameterCounts field that a pattern counts towards."""
        if is_stale(pattern):
            return "dropped"
        if _SCALE.search(pattern) and _has_weight(pattern, groups):
            return "scales"
        if pattern in self.buffer_patterns or _BUFFER.search(pattern):
            return "buffers"
        if pattern in self.expert_patterns:
            return "routed_experts"
        if pattern in self.shared_patterns:
            return "shared_experts"
        if self.vision_prefixes and pattern.startswith(self.vision_prefixes):
            return "vision"
        if self.tied_head and _HEAD.search(pattern):
            return "dropped"
        return "embeddings" if _EMBEDDING.search(pattern) else "dense"


def _has_weight(pattern: str, groups: Groups) -> bool:
    base = _SCALE.sub("", pattern)
    return any(base + ending in groups for ending in ("", ".weight", "_blocks", ".weight_packed"))


def build_partition(
    stacks: Sequence[ExpertStack],
    moe: MoELayout | None,
    vision: VisionLayout | None,
    *,
    tied_head: bool,
    mtp_prefixes: Sequence[str],
) -> Partition:
    """Returns the rules for a checkpoint with these parts."""
    shared: set[str] = set()
    buffers: set[str] = set()
    for stack in stacks:
        if moe is None:
            break
        names = list(moe.shared_experts.names.values()) if moe.shared_experts else []
        for name in names:
            pattern = f"{stack.prefix}.{tail_pattern(name)}"
            shared |= {pattern, pattern.replace(".weight", ".bias")}
        router = moe.router
        if router.correction_bias and not router.correction_bias_is_parameter:
            buffers.add(f"{stack.prefix}.{router.correction_bias}")
    prefixes = (vision.tower_prefix, vision.projector_prefix) if vision else ()
    return Partition(
        expert_patterns=frozenset().union(*(stack.patterns for stack in stacks)),
        shared_patterns=frozenset(shared),
        buffer_patterns=frozenset(buffers),
        vision_prefixes=tuple(prefix for prefix in prefixes if prefix is not None),
        mtp_prefixes=tuple(mtp_prefixes),
        tied_head=tied_head,
    )


def count_parameters(
    groups: Groups,
    tensors: Tensors,
    partition: Partition,
    moe: MoELayout | None,
    packed_bits: int | None = None,
) -> ParameterCounts:
    """Returns the counts; each tensor counts once."""
    counts = dict.fromkeys(ParameterCounts.__slots__, 0)
    for pattern, group in groups.items():
        part = partition.part_of(pattern, groups)
        if tensors[group.names[0]].dtype in _INTEGERS and not _PACKED.search(pattern):
            part = "buffers"  # tables such as token id to expert; nothing that trains
        counted, mtp = _sum_group(group, tensors, partition.mtp_prefixes, packed_bits)
        counts[part] += counted
        counts["mtp"] += mtp
    counts["total"] = sum(counts[part] for part in SUMMED_PARTS)
    active = None
    if moe is None or moe.top_k is not None:
        active = counts["total"] - _idle(counts["routed_experts"], moe)
    return ParameterCounts(**{**counts, "active_per_token": active})  # type: ignore[arg-type]


def parameter_shapes(
    groups: Groups, tensors: Tensors, partition: Partition
) -> Iterator[ParameterShape]:
    """Yields what the model itself trains, by part, pattern and shape: no buffers, scales, MTP."""
    for pattern, group in groups.items():
        part = partition.part_of(pattern, groups)
        if part not in SUMMED_PARTS or tensors[group.names[0]].dtype in _INTEGERS:
            continue
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name in group.names:
            if not (partition.mtp_prefixes and name.startswith(partition.mtp_prefixes)):
                by_shape.setdefault(tensors[name].shape, []).append(name)
        for shape, names in by_shape.items():
            yield ParameterShape(part, shape, tuple(names))


def _sum_group(
    group: NameGroup, tensors: Tensors, mtp_prefixes: tuple[str, ...], packed_bits: int | None
) -> tuple[int, int]:
    counted = mtp = 0
    cache: dict[tuple[str, tuple[int, ...]], int] = {}
    for name in group.names:
        entry = tensors[name]
        key = (entry.dtype, entry.shape)
        size = cache.get(key)
        if size is None:
            size = cache[key] = logical_elements(group.pattern, entry, packed_bits)
        if mtp_prefixes and name.startswith(mtp_prefixes):
            mtp += size
        else:
            counted += size
    return counted, mtp


def _idle(routed: int, moe: MoELayout | None) -> int:
    """Returns the routed parameters that one token does not use."""
    if moe is None or not moe.top_k:
        return 0
    num_experts = sum(moe.experts_of_layer(layer) for layer in moe.layers)
    used = sum(min(moe.top_k, moe.experts_of_layer(layer)) for layer in moe.layers)
    return routed - routed * used // num_experts
