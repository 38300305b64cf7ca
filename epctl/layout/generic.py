"""The generic rule: naming of experts, router and shared experts of a family nobody listed.

It reads names and shapes only. What they cannot show (the order of gate and up, the routing
rule) stays unknown: inspect, convert and plan work, train asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from epctl.layout.experts import Groups, Tensors
from epctl.layout.families import FamilyNames
from epctl.layout.names import HOLE

# The routing rule of a family nobody listed is what config.json states of it, never a default.
GENERIC_RULE: Mapping[str, Mapping[str, list[str]]] = {
    "score_func": {"config": ["scoring_func", "score_func", "moe_router_activation_func"]},
    "normalize": {"config": ["norm_topk_prob", "moe_renormalize", "route_norm"]},
    "scale": {"config": ["routed_scaling_factor", "router_scaling_factor", "route_scale"]},
    "num_groups": {"config": ["n_group", "num_expert_group"]},
    "top_groups": {"config": ["topk_group", "num_limited_groups"]},
}

_ROLES = {
    "gate": {"gate_proj", "w1", "gate", "wg", "linear_gate", "gate_linear"},
    "up": {"up_proj", "w3", "v1", "up", "wi", "linear_v", "up_linear"},
    "down": {"down_proj", "w2", "down", "wo", "linear_down", "down_linear"},
    "gate_up": {"gate_up_proj", "gate_up", "w13", "w13_weight", "input_linear", "fc1", "wi_fused"},
}
_FUSED_DOWN = {"output_linear", "fc2", "w2_weight"}
_BLOCK = re.compile(r"expert|\.moe\.")
_ROUTER = re.compile(r"(^|[._])(gate|router|classifier|wg)($|[._])")
_SHARED = re.compile(r"shared?_(expert|experts|mlp)(\.|$)")
_BIAS = re.compile(r"(correction_bias|expert_bias|router_bias|balancing_bias(es)?|gate\.bias)$")


@dataclass(frozen=True, slots=True)
class GenericNames:
    """A naming found by the generic rule; `doubt` says what names and shapes left open."""

    names: FamilyNames
    doubt: str | None


def generic_names(groups: Groups, tensors: Tensors) -> list[GenericNames]:
    """Returns every expert naming that names and shapes show, one for each expert block."""
    found = []
    for (prefix, block), leaves in _expert_blocks(groups, tensors).items():
        shapes = {leaf: _shape(groups, tensors, f"{prefix}.{block}{leaf}") for leaf in leaves}
        fused = not block.endswith(f"{HOLE}.")
        assigned = _assign_fused(shapes) if fused else _assign_single(shapes)
        if assigned is None:
            continue
        roles, doubt = assigned
        base = block.replace(HOLE, "{expert}")
        experts = {role: base + leaf for role, leaf in roles.items()}
        found.append(GenericNames(_with_router(prefix, block, experts, groups, tensors), doubt))
    return found


def _expert_blocks(groups: Groups, tensors: Tensors) -> dict[tuple[str, str], list[str]]:
    """Returns weight leaves by (layer prefix, block), the block ending in `#.` or in `.`."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for pattern in groups:
        if not _BLOCK.search(pattern) or _SHARED.search(pattern):
            continue
        dims = len(_shape(groups, tensors, pattern))
        split = _split_single(pattern) if dims == 2 else _split_fused(pattern)
        if split is not None and dims in (2, 3):
            prefix, block, leaf = split
            blocks.setdefault((prefix, block), []).append(leaf)
    return blocks


def _split_single(pattern: str) -> tuple[str, str, str] | None:
    # model.layers.#.mlp.experts.#.w1.weight -> model.layers.#, mlp.experts.#., w1.weight
    match = re.fullmatch(r"(.*#)\.([^#]*expert[^#]*#\.)([^#]+)", pattern)
    return (match[1], match[2], match[3]) if match else None


def _split_fused(pattern: str) -> tuple[str, str, str] | None:
    match = re.fullmatch(r"(.*#)\.([^#]*(?:expert[^#.]*|\bmoe)\.)([^#]+)", pattern)
    return (match[1], match[2], match[3]) if match else None


def _shape(groups: Groups, tensors: Tensors, pattern: str) -> tuple[int, ...]:
    return tensors[groups[pattern].names[0]].shape


def _role(leaf: str) -> str | None:
    word = leaf.removesuffix(".weight").rsplit(".", 1)[-1]
    return next((role for role, words in _ROLES.items() if word in words), None)


def _assign_single(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, str], str | None] | None:
    """Returns roles of one expert's own matrices: by name, else by shape."""
    by_name = {_role(leaf): leaf for leaf in shapes}
    if {"gate", "up", "down"} <= by_name.keys():
        return {role: by_name[role] for role in ("gate", "up", "down")}, None
    if set(by_name) == {"up", "down"}:
        return {role: by_name[role] for role in ("up", "down")}, None
    leaves = sorted(shapes)
    if len(leaves) == 3:
        for down in leaves:
            others = [leaf for leaf in leaves if leaf != down]
            turned = shapes[down][::-1]
            if all(shapes[leaf] == turned for leaf in others) and shapes[down] != turned:
                doubt = f"which of `{others[0]}` and `{others[1]}` is the gate is not known"
                return {"gate": others[0], "up": others[1], "down": down}, doubt
    return None


def _assign_fused(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, str], str | None] | None:
    """Returns roles of tensors with a leading expert dim: by name, else by size."""
    shapes = {leaf: shape for leaf, shape in shapes.items() if len(shape) == 3}
    by_name = {_role(leaf): leaf for leaf in shapes}
    words = {leaf.removesuffix(".weight").rsplit(".", 1)[-1]: leaf for leaf in shapes}
    down = by_name.get("down") or next((words[w] for w in _FUSED_DOWN if w in words), None)
    if down and {"gate", "up"} <= by_name.keys():
        return {"gate": by_name["gate"], "up": by_name["up"], "down": down}, None
    if down and set(by_name) == {"up", "down"}:
        return {"up": by_name["up"], "down": down}, None
    doubt = "whether gate and up are halves or interleaved is not known"
    if down and "gate_up" in by_name:
        return {"gate_up": by_name["gate_up"], "down": down}, doubt
    if len(shapes) == 2:
        small, large = sorted(shapes, key=lambda leaf: _volume(shapes[leaf]))
        if _volume(shapes[large]) == 2 * _volume(shapes[small]):
            return {"gate_up": large, "down": small}, doubt
    return None


def _volume(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _with_router(
    prefix: str, block: str, experts: dict[str, str], groups: Groups, tensors: Tensors
) -> FamilyNames:
    """Returns the naming with router, correction bias and shared experts found beside it."""
    parent = re.split(r"expert|\bmoe\.", block)[0]
    leaves = list(_below(prefix, parent, groups))
    router = next(
        (
            leaf
            for leaf in leaves
            if _ROUTER.search(leaf.removesuffix(".weight"))
            and len(_shape(groups, tensors, f"{prefix}.{leaf}")) == 2
            and _shape(groups, tensors, f"{prefix}.{leaf}")[0] > 1
        ),
        None,
    )
    shared_leaves = [leaf for leaf in leaves if _SHARED.search(leaf)]
    shared = {role: leaf for leaf in shared_leaves if (role := _role(leaf))}
    return FamilyNames(
        naming="generic",
        experts=experts,
        router=router,
        correction_bias=next((leaf for leaf in leaves if _BIAS.search(leaf)), None),
        shared=shared if "down" in shared else {},
        shared_gate=next((leaf for leaf in leaves if leaf.endswith("expert_gate.weight")), None),
    )


def _below(prefix: str, parent: str, groups: Groups) -> Iterator[str]:
    """Yields names below the layer prefix inside the MoE block, experts' own left out."""
    start = f"{prefix}.{parent}"
    for pattern in groups:
        leaf = pattern[len(prefix) + 1 :]
        if pattern.startswith(start) and HOLE not in leaf and not leaf.endswith("_proj"):
            yield leaf
