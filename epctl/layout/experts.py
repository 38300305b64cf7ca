"""Routed experts in a tensor table: which naming, which layers, which shapes, nothing missing.

LayoutError
|-- ExpertGapError       an expert or a projection of one is missing
|-- ExtraExpertError     more experts than the config says
|-- MixedExpertsError    experts of one layer differ in dtype or shape
|-- ExpertShapeError     shapes that fit no known orientation
`-- OrphanScaleError     scales of a quantised weight that is not there
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from epctl.errors import LayoutError
from epctl.layout.blocks import scale_block
from epctl.layout.families import FamilyNames
from epctl.layout.model import ExpertStorage
from epctl.layout.names import HOLE, NameGroup, fill_pattern, format_gaps, format_ranges
from epctl.layout.safetensors import TensorEntry

Tensors = Mapping[str, TensorEntry]
Groups = Mapping[str, NameGroup]
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# Far above any model; a tensor without bytes may claim any number of experts.
MAX_EXPERTS = 100_000
SCALE_SUFFIXES = ("_scale_inv", ".scale", "_scale", ".qscale_weight")


class ExpertGapError(LayoutError):
    pass


class ExtraExpertError(LayoutError):
    pass


class MixedExpertsError(LayoutError):
    pass


class ExpertShapeError(LayoutError):
    pass


class OrphanScaleError(LayoutError):
    pass


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """One stack of MoE layers; `patterns` are the expert tensors' patterns, scales included."""

    prefix: str
    names: FamilyNames
    groups: Mapping[str, NameGroup]
    patterns: frozenset[str]
    layer_prefixes: Mapping[int, str]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.names.experts["down"]


def tail_pattern(template: str) -> str:
    """Returns the pattern of a name below the layer prefix."""
    return template.replace("{expert}", HOLE)


def find_stacks(groups: Groups, candidates: Iterable[FamilyNames]) -> list[ExpertStack]:
    """Returns every stack whose tensors match one of `candidates` in full, largest first.

    A tensor belongs to the first candidate that matches; candidates with more tensors go first,
    so that an ungated naming never hides a gated one.
    """
    stacks: dict[str, ExpertStack] = {}
    taken: set[str] = set()
    for names in sorted(candidates, key=lambda entry: -len(entry.experts) - len(entry.scales)):
        for prefix in _matching_prefixes(groups, names):
            found = {
                key: groups[f"{prefix}.{tail_pattern(name)}"] for key, name in names.experts.items()
            }
            patterns = {group.pattern for group in found.values()}
            if not patterns & taken:
                taken |= patterns
                stacks[min(patterns)] = _stack(prefix, names, found, groups)
    return sorted(stacks.values(), key=lambda stack: -len(stack.layer_prefixes))


def _matching_prefixes(groups: Groups, names: FamilyNames) -> list[str]:
    """Returns the layer prefixes, ending in an index, below which every tensor stands."""
    tail = "." + tail_pattern(names.experts["down"])
    prefixes = []
    for pattern in groups:
        prefix = pattern[: -len(tail)]
        wanted = [*names.experts.values(), *names.scales.values()]
        if (
            pattern.endswith(tail)
            and prefix.endswith(HOLE)
            and all(f"{prefix}.{tail_pattern(name)}" in groups for name in wanted)
        ):
            prefixes.append(prefix)
    return prefixes


def _stack(
    prefix: str, names: FamilyNames, found: Mapping[str, NameGroup], groups: Groups
) -> ExpertStack:
    depth = prefix.count(HOLE)
    heads = sorted({index[:depth] for index in found["down"].indices})
    # Of several holes the one that varies numbers the layers (encoder.block.#.layer.1 does not).
    varying = [hole for hole in range(depth) if len({head[hole] for head in heads}) > 1]
    hole = varying[0] if varying else depth - 1
    extra = [*names.biases.values(), *names.scales.values()]
    patterns = {group.pattern for group in found.values()}
    patterns |= {f"{prefix}.{tail_pattern(name)}" for name in extra}
    patterns |= {
        _with_suffix(pattern, suffix)
        for pattern in tuple(patterns)
        for suffix in SCALE_SUFFIXES
        if _with_suffix(pattern, suffix) in groups
    }
    return ExpertStack(
        prefix=prefix,
        names=names,
        groups=found,
        patterns=frozenset(patterns & groups.keys()),
        layer_prefixes={head[hole]: fill_pattern(prefix, head) for head in heads},
    )


def _with_suffix(pattern: str, suffix: str) -> str:
    base = pattern.removesuffix(".weight") if suffix.startswith(".") else pattern
    return base + suffix


def count_experts(stack: ExpertStack, tensors: Tensors, num_experts: int | None) -> dict[int, int]:
    """Returns the number of experts of each layer.

    `num_experts` is what the config says, None when it says nothing. Raises ExpertGapError,
    ExtraExpertError or MixedExpertsError, naming layer, expert and tensor.
    """
    if not stack.per_expert:
        return _count_fused(stack, tensors, num_experts)
    depth = stack.prefix.count(HOLE)
    layers = list(stack.layer_prefixes.items())
    heads = {prefix: layer for layer, prefix in layers}
    present: dict[int, dict[str, set[int]]] = {layer: {} for layer, _ in layers}
    for key, group in stack.groups.items():
        cache: dict[tuple[int, ...], int] = {}
        for index in group.indices:
            head = index[:depth]
            layer = cache.get(head)
            if layer is None:
                layer = cache[head] = heads[fill_pattern(stack.prefix, head)]
            present[layer].setdefault(key, set()).add(index[depth])
        _check_uniform(stack, group, tensors, depth)
    return {
        layer: _check_experts(stack, layer, sets, num_experts) for layer, sets in present.items()
    }


def keep_first_width(stack: ExpertStack, tensors: Tensors) -> tuple[ExpertStack, int]:
    """Returns the stack without experts of another width than expert 0, and how many went.

    One family keeps text and vision experts in one list; only the first kind is described.
    """
    groups = {}
    removed: set[tuple[int, ...]] = set()
    for key, group in stack.groups.items():
        shape = tensors[group.names[0]].shape
        kept = NameGroup(group.pattern)
        for index, name in zip(group.indices, group.names, strict=True):
            if tensors[name].shape == shape:
                kept.indices.append(index)
                kept.names.append(name)
            else:
                removed.add(index)
        groups[key] = kept
    return replace(stack, groups=groups), len(removed)


def _check_experts(
    stack: ExpertStack, layer: int, sets: Mapping[str, set[int]], num_experts: int | None
) -> int:
    """Returns the layer's number of experts; raises for gaps and surplus."""
    everyone = set().union(*sets.values())
    expected = max(everyone) + 1 if num_experts is None else num_experts
    for key, name in stack.names.experts.items():
        present = sets.get(key, set())
        missing = format_gaps(present, max(expected, max(everyone) + 1))
        if missing:
            expert = int(re.split("[-,]", missing)[0])
            example = f"{stack.layer_prefixes[layer]}.{name.replace('{expert}', str(expert))}"
            raise ExpertGapError(
                f"layer {layer} has {len(present)} of {expected} experts: "
                f"{missing} missing, first `{example}`",
                hint="a shard is missing or was cut; download the checkpoint again",
            )
    if len(everyone) > expected:
        extra = {expert for expert in everyone if expert >= expected}
        raise ExtraExpertError(
            f"layer {layer} has {len(everyone)} experts, the config says {expected}: "
            f"{format_ranges(extra)} are too many",
            hint="config.json belongs to another checkpoint, or the experts were extended",
        )
    return len(everyone)


def _check_uniform(stack: ExpertStack, group: NameGroup, tensors: Tensors, depth: int) -> None:
    first: dict[tuple[int, ...], str] = {}
    for index, name in zip(group.indices, group.names, strict=True):
        seen = first.setdefault(index[:depth], name)
        mine, other = tensors[name], tensors[seen]
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise MixedExpertsError(
                f"`{name}` is {mine.dtype} {list(mine.shape)} but `{seen}` is "
                f"{other.dtype} {list(other.shape)}: experts of one layer must agree",
                hint="the checkpoint was assembled from different models or quantised in part",
            )


def _count_fused(stack: ExpertStack, tensors: Tensors, num_experts: int | None) -> dict[int, int]:
    counts: dict[int, int] = {}
    for layer, prefix in stack.layer_prefixes.items():
        shapes = _layer_shapes(stack, tensors, prefix)
        if stack.names.flat_rows:
            rows = shapes["down"][0]
            if not num_experts or num_experts < 1 or rows % num_experts:
                raise ExpertShapeError(
                    f"`{prefix}.{stack.names.experts['down']}` has {rows} rows, which "
                    f"num_experts = {num_experts} does not divide"
                )
            counts[layer] = num_experts
            continue
        counts[layer] = shapes["down"][0]
        if not 1 <= counts[layer] <= MAX_EXPERTS:
            raise ExpertShapeError(
                f"`{prefix}.{stack.names.experts['down']}` {list(shapes['down'])} would hold "
                f"{counts[layer]} experts; 1 to {MAX_EXPERTS} are read"
            )
        if num_experts is not None and counts[layer] != num_experts:
            error = ExtraExpertError if counts[layer] > num_experts else ExpertGapError
            raise error(
                f"`{prefix}.{stack.names.experts['down']}` holds {counts[layer]} experts, "
                f"the config says {num_experts}",
                hint="config.json belongs to another checkpoint, or experts were cut or added",
            )
    return counts


def _layer_shapes(stack: ExpertStack, tensors: Tensors, prefix: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each stored tensor of a layer, of expert 0 when each has its own."""
    shapes = {}
    for key, template in stack.names.experts.items():
        name = f"{prefix}.{template.replace('{expert}', '0')}"
        if name not in tensors:
            raise ExpertGapError(f"`{name}` is missing", hint="download the checkpoint again")
        shapes[key] = tensors[name].shape
    return shapes


@dataclass(frozen=True, slots=True)
class ExpertShapes:
    """What the shapes say: H and I of an expert, and whether matrices are stored [in, out]."""

    hidden_size: int
    intermediate_size: int
    transposed: bool


def _matrix_pair(
    stack: ExpertStack, shapes: Mapping[str, tuple[int, ...]], num_experts: int
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Returns the up-like and down matrices of one expert and the up-like widening (1 or 2)."""
    fused = "gate_up" in shapes
    up, down = shapes["gate_up" if fused else "up"], shapes["down"]
    if stack.names.quantization == "mxfp4":
        # [E, out, in / 32, 16] bytes, two values each; already in nn.Linear orientation.
        up, down = (*up[:2], up[2] * up[3] * 2), (*down[:2], down[2] * down[3] * 2)
    if stack.names.flat_rows:
        rows = up[0] // num_experts
        return (rows, up[1]), (down[1], rows), 1
    expected = 2 if stack.per_expert else 3
    if len(up) != expected or len(down) != expected:
        raise ExpertShapeError(
            f"experts below `{stack.prefix}` have shapes {list(up)} and {list(down)}; "
            f"{expected} dims are expected"
        )
    return (up[-2], up[-1]), (down[-2], down[-1]), 2 if fused else 1


def read_shapes(
    stack: ExpertStack, tensors: Tensors, num_experts: int, hidden_size: int | None
) -> ExpertShapes:
    """Returns H, I and orientation from the shapes alone.

    `hidden_size` is H when the config states it; it decides only when I = H makes both
    orientations possible. Raises ExpertShapeError when gate, up and down do not fit together.
    """
    prefix = next(iter(stack.layer_prefixes.values()))
    shapes = _layer_shapes(stack, tensors, prefix)
    up, down, widening = _matrix_pair(stack, shapes, num_experts)
    straight = up[0] == widening * down[1] and up[1] == down[0]
    crossed = up[1] == widening * down[0] and up[0] == down[1]
    gate = shapes.get("gate", shapes.get("up"))
    if not (straight or crossed) or (gate is not None and gate != shapes["up"]):
        listed = ", ".join(
            f"`{prefix}.{name}` {list(shapes[key])}" for key, name in stack.names.experts.items()
        )
        raise ExpertShapeError(
            f"expert shapes fit neither [out, in] nor [in, out]: {listed}",
            hint="one of the projections is transposed or belongs to another model",
        )
    if widening == 1 and hidden_size is not None:
        # gate [a, b] with down [b, a] fits both ways round; only the hidden size can tell.
        straight = up[1] == hidden_size or up[0] != hidden_size
    if straight:
        return ExpertShapes(up[1], down[1], transposed=False)
    return ExpertShapes(down[1], down[0], transposed=True)


def build_storage(
    stack: ExpertStack, tensors: Tensors, groups: Groups, shapes: ExpertShapes
) -> ExpertStorage:
    """Returns the ExpertStorage of a stack; scales of quantised weights are found by name."""
    names = stack.names
    down = tensors[stack.groups["down"].names[0]]
    scales, quantization = dict(names.scales), names.quantization
    block_size = None
    if not scales:
        scales = _find_scales(stack, groups)
        if scales:
            quantization = "fp8_block" if down.dtype in FLOAT8 else "scaled"
    if quantization == "fp8_block":
        block_size = _block_size(stack, tensors, scales)
    kind = "per_expert" if stack.per_expert else "fused"
    if not stack.per_expert and "gate_up" not in names.experts:
        kind = "flat_rows" if names.flat_rows else "stacked"
    present = {
        key: name
        for key, name in names.biases.items()
        if f"{stack.prefix}.{tail_pattern(name)}" in groups
    }
    return ExpertStorage(
        kind=kind,  # type: ignore[arg-type]
        names=dict(names.experts),
        transposed=shapes.transposed,
        interleaved=names.interleaved,
        biases=present,
        scales=scales,
        quantization=quantization,
        block_size=block_size,
        dtype=down.dtype,
    )


def _find_scales(stack: ExpertStack, groups: Groups) -> dict[str, str]:
    for suffix in SCALE_SUFFIXES:
        found = {
            key: _with_suffix(name, suffix)
            for key, name in stack.names.experts.items()
            if f"{stack.prefix}.{_with_suffix(tail_pattern(name), suffix)}" in groups
        }
        if found:
            return found
    return {}


def _block_size(
    stack: ExpertStack, tensors: Tensors, scales: Mapping[str, str]
) -> tuple[int, int] | None:
    """Returns the block that one scale of a stack covers, None when it cannot be told."""
    prefix = next(iter(stack.layer_prefixes.values()))
    name = stack.names.experts["down"].replace("{expert}", "0")
    scale = scales.get("down", "").replace("{expert}", "0")
    weight, grid = tensors.get(f"{prefix}.{name}"), tensors.get(f"{prefix}.{scale}")
    if weight is None or grid is None or len(grid.shape) < 2:
        return None
    return scale_block(weight.shape[-2:], grid.shape[-2:])


def check_scales(tensors: Tensors) -> None:
    """Raises OrphanScaleError for a block scale whose weight is not in the checkpoint."""
    for name in tensors:
        if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") not in tensors:
            raise OrphanScaleError(
                f"`{name}` scales `{name.removesuffix('_scale_inv')}`, which is not there",
                hint="the checkpoint is incomplete, or was dequantised without dropping scales",
            )


def describe_layers(layers: Sequence[int]) -> str:
    """Returns layer numbers for a sentence: `layers 1-26`, `layer 3`."""
    return f"layer{'s' if len(layers) != 1 else ''} {format_ranges(layers)}"
