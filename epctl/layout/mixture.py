"""The routed experts of a stack -> MoELayout: counts, shapes, layers, router, shared experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from epctl.errors import LayoutError
from epctl.layout.evidence import Evidence
from epctl.layout.experts import (
    ExpertStack,
    build_storage,
    count_experts,
    describe_layers,
    keep_first_width,
    read_shapes,
)
from epctl.layout.facts import finite, moe_layers_by_config
from epctl.layout.model import MoELayout, SharedExperts
from epctl.layout.router import build_router, namings, present_name


class LayerMismatchError(LayoutError):
    """The layers with experts are not those that the config's rule names."""


def build_moe(
    evidence: Evidence, stack: ExpertStack, others: Sequence[ExpertStack], doubt: str | None
) -> MoELayout:
    """Returns the layout of `stack`; `doubt` is why its names alone do not let it train.

    Raises LayoutError or a subclass when tensors contradict each other or the config.
    """
    facts, reasons, family = evidence.facts, evidence.reasons, evidence.family
    stack, counts = _count(evidence, stack)
    num_experts = max(counts.values())
    expert_hidden = facts.get_int("expert_hidden_size") or facts.get_int("hidden_size")
    shapes = read_shapes(stack, evidence.tensors, num_experts, expert_hidden)
    storage = build_storage(stack, evidence.tensors, evidence.groups, shapes)
    _check_orientation(evidence, stack, shapes.transposed)
    _check_width(evidence, shapes.intermediate_size)
    reasons["moe.expert_intermediate_size"] = "shape of the experts' down projection"
    reasons["moe.expert_storage"] = _storage_reason(evidence, stack)
    layers, mtp = _split_layers(evidence, counts)
    router = build_router(stack, family, facts, evidence.groups, evidence.tensors, reasons)
    every_layer = range(evidence.num_layers or 0)
    return MoELayout(
        layer_prefixes={layer: stack.layer_prefixes[layer] for layer in layers},
        dense_layers=tuple(layer for layer in every_layer if layer not in counts),
        num_experts=num_experts,
        top_k=_top_k(evidence, num_experts),
        hidden_size=facts.get_int("hidden_size") or shapes.hidden_size,
        expert_hidden_size=shapes.hidden_size,
        expert_intermediate_size=shapes.intermediate_size,
        storage=storage,
        router=router,
        shared_experts=_shared(evidence, stack, shapes.intermediate_size),
        activation=facts.get("activation"),
        activation_rule=family.activation if family else "unknown",
        activation_limit=finite(facts.get("activation_limit")),
        num_experts_by_layer=counts if len(set(counts.values())) > 1 else {},
        mtp_layers=tuple(mtp),
        other_stacks=tuple(other.prefix for other in others),
        untrainable=doubt or _untrainable(evidence, shapes.hidden_size),
    )


def _count(evidence: Evidence, stack: ExpertStack) -> tuple[ExpertStack, dict[int, int]]:
    """Returns the stack without experts of a second width, and the experts of each layer."""
    facts, family = evidence.facts, evidence.family
    stated, num_stated = facts.get("num_experts"), facts.get_int("num_experts")
    quirks = family.experts if family else {}
    if "mixed_widths" in quirks and stack.per_expert:
        stack, removed = keep_first_width(stack, evidence.tensors)
        evidence.warnings.append(f"{removed} experts of another width (for vision) stand beside")
    known = None if "mixed_counts" in quirks else num_stated
    counts = count_experts(stack, evidence.tensors, known)
    reason = facts.reasons.get("num_experts", "the config does not say")
    reason += f"; the tensors of {describe_layers(list(counts))} hold {max(counts.values())}"
    if isinstance(stated, list) and num_stated is None:
        reason += " (a list that varies)"
    evidence.reasons["moe.num_experts"] = reason
    return stack, counts


def _top_k(evidence: Evidence, num_experts: int) -> int | None:
    facts = evidence.facts
    top_k = facts.get_int("top_k")
    evidence.reasons["moe.top_k"] = facts.reasons.get("top_k", "the config does not say")
    if top_k is not None and not 1 <= top_k <= num_experts:
        evidence.warnings.append(f"{facts.reasons['top_k']} is no count of {num_experts} experts")
        return None
    return top_k


def _untrainable(evidence: Evidence, expert_hidden_size: int) -> str | None:
    family, hidden_size = evidence.family, evidence.facts.get_int("hidden_size")
    if family is None and hidden_size not in (None, expert_hidden_size):
        return (
            f"its experts work in a projected space of {expert_hidden_size} values, "
            f"hidden_size is {hidden_size}"
        )
    if family is None:
        return None
    types = evidence.types
    if family.vision and types and types[-1] in family.model_types:
        # The whole model has a class of its own, whatever its text part is called.
        types = types[-1:]
    of_type = (family.untrainable_types.get(kind) for kind in types)
    return family.untrainable or next((reason for reason in of_type if reason), None)


def _storage_reason(evidence: Evidence, stack: ExpertStack) -> str:
    example = stack.groups["down"].names[0]
    shape = list(evidence.tensors[example].shape)
    return f"tensor `{example}` {shape}; naming `{stack.names.naming}`"


def _check_orientation(evidence: Evidence, stack: ExpertStack, transposed: bool) -> None:
    if evidence.family is None or stack.per_expert:
        return
    # When H = 2I a turned down projection alone looks like turned experts: say so.
    same_names = [n for n in evidence.family.names if n.experts == stack.names.experts]
    known = {bool(names.transposed) for names in same_names}
    if known and transposed not in known:
        words = {True: "[in, out]", False: "[out, in]"}
        evidence.warnings.append(
            f"expert matrices are stored {words[transposed]} by their shapes; the "
            f"{evidence.family.name} family stores {words[not transposed]}"
        )


def _check_width(evidence: Evidence, intermediate_size: int) -> None:
    stated = evidence.facts.get_int("expert_intermediate_size")
    if stated is not None and stated != intermediate_size:
        evidence.warnings.append(
            f"experts are {intermediate_size} wide, "
            f"{evidence.facts.reasons['expert_intermediate_size']}"
        )


def _split_layers(evidence: Evidence, counts: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Returns MoE layers and multi-token-prediction layers; checks them against the config."""
    total = evidence.num_layers
    layers = sorted(layer for layer in counts if total is None or layer < total)
    mtp = sorted(layer for layer in counts if total is not None and layer >= total)
    implied = moe_layers_by_config(evidence.facts, total) if total else None
    if implied is None:
        evidence.reasons["moe.layers"] = "layers that hold expert tensors"
        return layers, mtp
    expected, rule = implied
    missing, extra = expected - set(layers), set(layers) - expected
    if missing or extra:
        parts = [f"{describe_layers(sorted(missing))} should have experts"] if missing else []
        parts += [f"{describe_layers(sorted(extra))} should be dense"] if extra else []
        raise LayerMismatchError(
            f"{rule} and the tensors disagree: {' and '.join(parts)}",
            hint="a shard is missing, or config.json belongs to another checkpoint",
        )
    evidence.reasons["moe.layers"] = f"{rule}; the tensors agree"
    return layers, mtp


def _shared(evidence: Evidence, stack: ExpertStack, expert_width: int) -> SharedExperts | None:
    known = namings(stack, evidence.family, evidence.groups, evidence.tensors)
    for names in known:
        found = {
            key: name
            for key, name in names.shared.items()
            if f"{stack.prefix}.{name}" in evidence.groups
        }
        if found and len(found) == len(names.shared):
            example = evidence.groups[f"{stack.prefix}.{found['down']}"].names[0]
            shape = evidence.tensors[example].shape
            width = shape[-1] * (shape[0] if len(shape) == 3 else 1)
            count = evidence.facts.get_int("shared_experts") or max(1, width // expert_width)
            evidence.reasons["moe.shared_experts"] = (
                f"tensor `{example}` {list(shape)}; "
                + evidence.facts.reasons.get("shared_experts", "count by width")
            )
            gates = [names.shared_gate for names in known]
            return SharedExperts(found, count, width, present_name(stack, evidence.groups, gates))
    return None
