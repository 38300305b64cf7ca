"""detect: config, tensor names and families -> ModelLayout; the generic rule without a family.

The order of trust: tensors decide what is stored, the family decides what tensors cannot show
(order of gate and up, routing rule), the config states sizes and is checked against both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from epctl.errors import LayoutError
from epctl.layout.experts import (
    ExpertStack,
    Groups,
    Tensors,
    build_storage,
    check_scales,
    count_experts,
    describe_layers,
    find_stacks,
    keep_first_width,
    read_shapes,
)
from epctl.layout.facts import ConfigFacts, finite, model_types, moe_layers_by_config
from epctl.layout.families import Family, families_by_model_type, load_families
from epctl.layout.generic import generic_names
from epctl.layout.model import (
    AttentionLayout,
    ModelLayout,
    MoELayout,
    SharedExperts,
    VisionLayout,
)
from epctl.layout.names import HOLE, group_names
from epctl.layout.parallel import ep_sizes, sequence_sizes
from epctl.layout.parameters import build_partition, count_parameters, is_stale
from epctl.layout.router import Reasons, build_router, namings, present_name
from epctl.layout.safetensors import short_text
from epctl.layout.source import ModelSource
from epctl.layout.vision import build_vision


class LayerMismatchError(LayoutError):
    """The layers with experts are not those that the config's rule names."""


def detect(source: ModelSource) -> ModelLayout:
    """Returns the layout of a model.

    Raises LayoutError or a subclass when tensors contradict each other or the config.
    """
    check_scales(source.tensors)
    return _Detector(source).layout()


class _Detector:
    """Holds what the steps share; one instance a detection."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.tensors: Tensors = source.tensors
        self.groups: Groups = group_names(source.tensors)
        self.reasons: Reasons = {}
        self.warnings: list[str] = list(source.warnings)
        self.types = model_types(source.config)
        self.family = self._match_family()
        self.facts = ConfigFacts(
            source.config,
            self.family.config if self.family else None,
            self.family.defaults if self.family else None,
            self.family.name if self.family else None,
        )
        self.num_layers = self.facts.get_num_layers()

    def _match_family(self) -> Family | None:
        by_type = families_by_model_type()
        matches = [by_type[kind] for kind in self.types if kind in by_type]
        # A family with expert names (the text part) before one that only knows the vision side.
        for family in sorted(matches, key=lambda entry: not entry.names):
            kinds = [kind for kind in self.types if kind in family.model_types]
            self.reasons["model.family"] = f"config model_type = {kinds[0]!r}"
            return family
        architecture = _architecture(self.source.config)
        for family in load_families().values():
            if architecture in family.architectures:
                self.reasons["model.family"] = f"config architectures = {architecture!r}"
                return family
        self.reasons["model.family"] = "no family lists this model_type; the generic rule applies"
        return None

    def _vision_family(self) -> Family | None:
        by_type = families_by_model_type()
        matches = [by_type[kind] for kind in reversed(self.types) if kind in by_type]
        return next((family for family in matches if family.vision), None)

    def layout(self) -> ModelLayout:
        config = self.source.config
        vision_family = self._vision_family()
        vision = build_vision(self.facts, vision_family, self.groups, self.reasons)
        stacks, doubt = self._find_stacks()
        moe = self._build_moe(stacks[0], stacks[1:], doubt) if stacks else None
        if moe is None:
            self._warn_dense()
        decoder = self._decoder(vision)
        counts = self._count(stacks, moe, vision)
        dropped = tuple(name for name in self.tensors if is_stale(name))
        self._add_warnings(moe, dropped)
        families = [family for family in (self.family, vision_family) if family]
        return ModelLayout(
            id=self.source.id,
            source=self.source.kind,
            revision=self.source.revision,
            architecture=_architecture(config),
            model_type=self.types[-1] if self.types else None,
            dtype=self._dtype(),
            family=self.family.name if self.family else None,
            num_tensors=len(self.tensors),
            num_bytes=sum(entry.num_bytes for entry in self.tensors.values()),
            parameters=counts,
            moe=moe,
            vision=vision,
            decoder=decoder,
            ep_sizes=ep_sizes(moe.experts_of_layer(n) for n in moe.layers) if moe else (),
            sequence_parallel=sequence_sizes(
                decoder, vision.attention if vision else None, self._refusals(families)
            ),
            dropped=dropped,
            warnings=tuple(self.warnings),
            reasons=self.reasons,
            remote_code=bool(config.get("auto_map")),
        )

    def _find_stacks(self) -> tuple[list[ExpertStack], str | None]:
        """Returns the expert stacks, the one that trains first, and what names leave in doubt."""
        if self.family and self.family.names:
            stacks = find_stacks(self.groups, self.family.names)
            if stacks:
                return stacks, None
        everyone = [names for family in load_families().values() for names in family.names]
        usable = [names for names in everyone if not names.flat_rows]
        stacks = [stack for stack in find_stacks(self.groups, usable) if self._looks_stored(stack)]
        if stacks:
            naming = stacks[0].names.experts["down"]
            self.reasons["moe.names"] = f"experts are named as in a known family: `{naming}`"
            if self.family and self.family.names:
                self.warnings.append(
                    f"expert names are not those of the {self.family.name} family: `{naming}`"
                )
            return stacks, None
        found = generic_names(self.groups, self.tensors)
        stacks = find_stacks(self.groups, [entry.names for entry in found])
        if not stacks:
            return [], None
        doubt = next(entry.doubt for entry in found if entry.names == stacks[0].names)
        self.reasons["moe.names"] = "generic rule: names and shapes below a component `expert`"
        return stacks, doubt

    def _looks_stored(self, stack: ExpertStack) -> bool:
        # A dense model may use an expert's words (`mlp.input_linear`); experts have a third dim.
        dims = len(self.tensors[stack.groups["down"].names[0]].shape)
        return dims == (2 if stack.per_expert else 4 if stack.names.quantization else 3)

    def _build_moe(
        self, stack: ExpertStack, others: Sequence[ExpertStack], doubt: str | None
    ) -> MoELayout:
        facts, reasons = self.facts, self.reasons
        stated = facts.get("num_experts")
        num_stated = facts.get_int("num_experts")
        quirks = self.family.experts if self.family else {}
        if "mixed_widths" in quirks and stack.per_expert:
            stack, removed = keep_first_width(stack, self.tensors)
            self.warnings.append(f"{removed} experts of another width (for vision) stand beside")
        known = None if "mixed_counts" in quirks else num_stated
        counts = count_experts(stack, self.tensors, known)
        num_experts = max(counts.values())
        reasons["moe.num_experts"] = (
            facts.reasons.get("num_experts", "the config does not say")
            + f"; the tensors of {describe_layers(list(counts))} hold {num_experts}"
        )
        if isinstance(stated, list) and num_stated is None:
            reasons["moe.num_experts"] += " (a list that varies)"
        expert_hidden = facts.get_int("expert_hidden_size") or facts.get_int("hidden_size")
        shapes = read_shapes(stack, self.tensors, num_experts, expert_hidden)
        storage = build_storage(stack, self.tensors, self.groups, shapes)
        self._check_orientation(stack, shapes.transposed)
        self._check_width(shapes.intermediate_size)
        reasons["moe.expert_intermediate_size"] = "shape of the experts' down projection"
        reasons["moe.expert_storage"] = self._storage_reason(stack)
        layers, mtp = self._split_layers(counts)
        family = self.family
        router = build_router(stack, family, facts, self.groups, self.tensors, reasons)
        top_k = facts.get_int("top_k")
        if top_k is not None and not 1 <= top_k <= num_experts:
            self.warnings.append(f"{facts.reasons['top_k']} is no count of {num_experts} experts")
            top_k = None
        reasons["moe.top_k"] = facts.reasons.get("top_k", "the config does not say")
        varied = len(set(counts.values())) > 1
        return MoELayout(
            layer_prefixes={layer: stack.layer_prefixes[layer] for layer in layers},
            dense_layers=tuple(
                layer for layer in range(self.num_layers or 0) if layer not in counts
            ),
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=facts.get_int("hidden_size") or shapes.hidden_size,
            expert_hidden_size=shapes.hidden_size,
            expert_intermediate_size=shapes.intermediate_size,
            storage=storage,
            router=router,
            shared_experts=self._shared(stack, shapes.intermediate_size),
            activation=facts.get("activation"),
            activation_rule=family.activation if family else "unknown",
            activation_limit=self._activation_limit(),
            num_experts_by_layer=counts if varied else {},
            mtp_layers=tuple(mtp),
            other_stacks=tuple(other.prefix for other in others),
            untrainable=doubt or self._untrainable(shapes.hidden_size),
        )

    def _activation_limit(self) -> float | None:
        return finite(self.facts.get("activation_limit"))

    def _untrainable(self, expert_hidden_size: int) -> str | None:
        if self.family and self.family.untrainable:
            return self.family.untrainable
        hidden_size = self.facts.get_int("hidden_size")
        if hidden_size is not None and hidden_size != expert_hidden_size:
            return (
                f"its experts work in a projected space of {expert_hidden_size} values, "
                f"hidden_size is {hidden_size}"
            )
        return None

    def _storage_reason(self, stack: ExpertStack) -> str:
        example = stack.groups["down"].names[0]
        shape = list(self.tensors[example].shape)
        return f"tensor `{example}` {shape}; naming `{stack.names.naming}`"

    def _check_orientation(self, stack: ExpertStack, transposed: bool) -> None:
        if self.family is None or stack.per_expert:
            return
        # When H = 2I a turned down projection alone looks like turned experts: say so.
        same_names = [n for n in self.family.names if n.experts == stack.names.experts]
        known = {bool(names.transposed) for names in same_names}
        if known and transposed not in known:
            words = {True: "[in, out]", False: "[out, in]"}
            self.warnings.append(
                f"expert matrices are stored {words[transposed]} by their shapes; the "
                f"{self.family.name} family stores {words[not transposed]}"
            )

    def _check_width(self, intermediate_size: int) -> None:
        stated = self.facts.get_int("expert_intermediate_size")
        if stated is not None and stated != intermediate_size:
            self.warnings.append(
                f"experts are {intermediate_size} wide, "
                f"{self.facts.reasons['expert_intermediate_size']}"
            )

    def _split_layers(self, counts: Mapping[int, int]) -> tuple[list[int], list[int]]:
        """Returns MoE layers and multi-token-prediction layers; checks them against the config."""
        total = self.num_layers
        layers = sorted(layer for layer in counts if total is None or layer < total)
        mtp = sorted(layer for layer in counts if total is not None and layer >= total)
        implied = moe_layers_by_config(self.facts, total) if total else None
        if implied is None:
            self.reasons["moe.layers"] = "layers that hold expert tensors"
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
        self.reasons["moe.layers"] = f"{rule}; the tensors agree"
        return layers, mtp

    def _shared(self, stack: ExpertStack, expert_width: int) -> SharedExperts | None:
        known = namings(stack, self.family)
        for names in known:
            found = {
                key: name
                for key, name in names.shared.items()
                if f"{stack.prefix}.{name}" in self.groups
            }
            if found and len(found) == len(names.shared):
                example = self.groups[f"{stack.prefix}.{found['down']}"].names[0]
                shape = self.tensors[example].shape
                width = shape[-1] * (shape[0] if len(shape) == 3 else 1)
                count = self.facts.get_int("shared_experts") or max(1, width // expert_width)
                self.reasons["moe.shared_experts"] = (
                    f"tensor `{example}` {list(shape)}; "
                    + self.facts.reasons.get("shared_experts", "count by width")
                )
                gates = [names.shared_gate for names in known]
                return SharedExperts(found, count, width, present_name(stack, self.groups, gates))
        return None

    def _warn_dense(self) -> None:
        stated = self.facts.get_int("num_experts")
        family = self.family
        if family and family.untrainable and not family.names:
            self.warnings.append(f"unsupported mixture of experts: {family.untrainable}")
        elif stated is not None and stated > 1:
            self.warnings.append(
                f"{self.facts.reasons['num_experts']}, but no tensor belongs to an expert: "
                "the model is dense"
            )

    def _decoder(self, vision: VisionLayout | None) -> AttentionLayout | None:
        facts = self.facts
        if (vision is not None and vision.tower_prefix == "") or self.num_layers is None:
            return None
        heads = facts.get_int("num_heads")
        return AttentionLayout(
            self.num_layers, facts.get_int("hidden_size"), heads,
            facts.get_int("num_kv_heads") or heads,
        )  # fmt: skip

    def _count(
        self, stacks: Sequence[ExpertStack], moe: MoELayout | None, vision: VisionLayout | None
    ) -> Any:
        # The top level wins here: a text section may keep its class default.
        tied = self.source.config.get("tie_word_embeddings")
        if tied is None:
            tied, _ = self.facts.look_up(["tie_word_embeddings"])
        head = next((p for p in self.groups if p.endswith("lm_head.weight")), None)
        if tied is True and head:
            self.warnings.append(f"`{head}` repeats the tied embedding and is not counted")
        partition = build_partition(
            stacks, moe, vision, tied_head=tied is True, mtp_prefixes=self._mtp_prefixes(stacks)
        )
        bits, _ = self.facts.look_up(
            [
                "quantization_config.bits",
                "quantization_config.config_groups.group_0.weights.num_bits",
            ]
        )
        return count_parameters(
            self.groups,
            self.tensors,
            partition,
            moe,
            bits if type(bits) is int and bits > 0 else None,
        )

    def _mtp_prefixes(self, stacks: Sequence[ExpertStack]) -> list[str]:
        """Returns name prefixes of multi-token-prediction layers."""
        prefixes = [
            f"{prefix}."
            for stack in stacks[:1]
            for layer, prefix in stack.layer_prefixes.items()
            if self.num_layers is not None and layer >= self.num_layers
        ]
        for start in ("mtp.", "model.mtp."):
            if any(pattern.startswith(start) for pattern in self.groups):
                prefixes.append(start)
        return prefixes

    def _add_warnings(self, moe: MoELayout | None, dropped: Sequence[str]) -> None:
        if dropped:
            kind = dropped[0].rsplit(".", 1)[-1]
            noun = "tensor" if len(dropped) == 1 else "tensors"
            self.warnings.append(f"{len(dropped)} stale {kind} {noun} will be dropped")
        if moe and moe.mtp_layers:
            self.warnings.append(
                f"multi-token-prediction {describe_layers(moe.mtp_layers)} are kept verbatim "
                "and not trained"
            )
        elif any(pattern.startswith(("mtp.", "model.mtp.")) for pattern in self.groups):
            self.warnings.append(
                "multi-token-prediction tensors under `mtp.` are kept verbatim and not trained"
            )
        if moe:
            for prefix in moe.other_stacks:
                self.warnings.append(f"a second stack of experts stands below `{prefix}`")
        if self.source.config.get("auto_map"):
            self.warnings.append(
                "the repository ships Python code (auto_map); nothing of it was imported"
            )

    def _refusals(self, families: Sequence[Family]) -> list[str]:
        refusals = [family.sequence_parallel for family in families if family.sequence_parallel]
        recurrent = next(
            (p for p in self.groups if p.endswith("A_log") or ".linear_attn." in p), None
        )
        if recurrent:
            refusals.append(
                f"layers with a recurrence along the sequence (`{recurrent.replace(HOLE, 'L')}`)"
            )
        return list(dict.fromkeys(refusals))

    def _dtype(self) -> str:
        sizes: Counter[str] = Counter()
        for entry in self.tensors.values():
            sizes[entry.dtype] += entry.num_bytes or entry.num_elements
        return sizes.most_common(1)[0][0] if sizes else "none"


def _architecture(config: Mapping[str, Any]) -> str | None:
    listed = config.get("architectures")
    return short_text(str(listed[0])) if isinstance(listed, list) and listed else None
