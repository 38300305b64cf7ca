"""The router: its tensors out of the table, its arithmetic out of the family and the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epctl.layout.experts import ExpertStack, Groups, Tensors
from epctl.layout.facts import ConfigFacts, ConfigValueError, finite
from epctl.layout.families import Family, FamilyNames
from epctl.layout.generic import GENERIC_RULE, generic_names
from epctl.layout.model import RouterLayout

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
Reasons = dict[str, str]
_GROUP_KEYS = ("num_groups", "top_groups", "group_score")


def present_name(
    stack: ExpertStack, groups: Groups, alternatives: Sequence[str | None]
) -> str | None:
    """Returns the first of the names, relative to the layer prefix, that has a tensor."""
    return next(
        (name for name in alternatives if name and f"{stack.prefix}.{name}" in groups), None
    )


def namings(
    stack: ExpertStack, family: Family | None, groups: Groups, tensors: Tensors
) -> list[FamilyNames]:
    """Returns the matched naming, then the family's others; without a family what names show.

    A family nobody listed may name its experts as a known one does, and its router otherwise.
    """
    if family is None:
        return [stack.names, *(found.names for found in generic_names(groups, tensors))]
    others = family.names
    return [stack.names, *(names for names in others if names != stack.names)]


def build_router(
    stack: ExpertStack,
    family: Family | None,
    facts: ConfigFacts,
    groups: Groups,
    tensors: Tensors,
    reasons: Reasons,
) -> RouterLayout:
    """Returns the router of a stack; each fact's reason goes into `reasons`."""
    names = _router_names(stack, family, groups, tensors)
    weight = names["weight"]
    example = groups[f"{stack.prefix}.{weight}"].names[0] if weight else None
    shape = tensors[example].shape if example else ()
    if example:
        reasons["moe.router.weight"] = f"tensor `{example}` {list(shape)}"
    if names["correction_bias"]:
        bias = groups[f"{stack.prefix}.{names['correction_bias']}"].names[0]
        reasons["moe.router.correction_bias"] = f"tensor `{bias}`"
    rule = (family.router or {}) if family else GENERIC_RULE
    grouped = _groups_count(rule.get("groups_when"), facts, reasons)
    values = {
        key: _resolve(key, spec, family, facts, reasons)
        for key, spec in rule.items()
        if key != "groups_when" and (grouped or key not in _GROUP_KEYS)
    }
    if not rule:
        reasons["moe.router.score_func"] = "no family states the routing rule of this model_type"
    return RouterLayout(
        **names,
        num_outputs=shape[0] if shape else None,
        score_func=values.get("score_func"),
        normalize=_flag(values.get("normalize"), reasons.get("moe.router.normalize")),
        scale=_number(values.get("scale"), reasons.get("moe.router.scale")),
        num_groups=_count(values.get("num_groups")),
        top_groups=_count(values.get("top_groups")),
        group_score=values.get("group_score"),
        correction_bias_is_parameter=bool(values.get("correction_bias_is_parameter", False)),
        score_after_selection=bool(values.get("score_after_selection", False)),
        selection=values.get("selection", "top_k"),
        normalize_epsilon=float(values.get("normalize_epsilon", 0.0)),
        scale_on=values.get("scale_on", "weight"),
        weight_on=values.get("weight_on", "expert_output"),
        float32=bool(values.get("float32", False)),
    )


def _router_names(
    stack: ExpertStack, family: Family | None, groups: Groups, tensors: Tensors
) -> dict[str, str | None]:
    """Returns the names of the router's tensors, below the layer prefix, or None."""
    known = namings(stack, family, groups, tensors)
    alternatives = {
        "weight": [names.router for names in known],
        "linear_bias": [names.router_bias for names in known],
        "correction_bias": [names.correction_bias for names in known],
    }
    return {key: present_name(stack, groups, listed) for key, listed in alternatives.items()}


def _groups_count(
    condition: Mapping[str, Any] | None, facts: ConfigFacts, reasons: Reasons
) -> bool:
    """Returns whether groups count at all; some families need the config to name a method."""
    if condition is None:
        return True
    value, reason = facts.look_up(condition["config"])
    counts = value in condition["values"]
    if not counts:
        reasons["moe.router.num_groups"] = f"{reason or 'no method stated'}: groups do not count"
    return counts


def _flag(value: Any, reason: str | None) -> bool | None:
    # A number too: DBRX gives the order of a norm, and no norm is null.
    if value is None or isinstance(value, bool | int | float):
        return None if value is None else bool(value)
    raise ConfigValueError(f"{reason}: true or false is needed")


def _number(value: Any, reason: str | None) -> float | None:
    number = finite(value)
    if value is None or number is not None:
        return number
    raise ConfigValueError(f"{reason}: a finite number is needed")


def _count(value: Any) -> int:
    # Null, and the `false` of one published config, both say: no groups.
    return value if type(value) is int and value > 0 else 1


def _resolve(
    key: str, spec: Any, family: Family | None, facts: ConfigFacts, reasons: Reasons
) -> Any:
    """Returns a literal, or what the config says, or the family's default; records why."""
    title = family.name if family else "generic"
    path = f"moe.router.{key}"
    if not isinstance(spec, Mapping):
        reasons[path] = f"rule of the {title} family"
        return spec
    value, reason = facts.look_up(spec["config"])
    if reason is not None and (key != "score_func" or value in SCORE_FUNCTIONS):
        reasons[path] = reason
        return value
    if family is None:
        reasons[path] = f"config.json states none of {', '.join(spec['config'])}"
        return None
    default = spec.get("default")
    odd = f"; {reason} names no score function" if reason is not None else ""
    reasons[path] = f"default of the {title} family{odd}"
    return default
