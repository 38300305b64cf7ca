"""detect: config, tensor names and families -> ModelLayout; the generic rule without a family.

The order of trust: tensors decide what is stored, the family decides what tensors cannot show
(order of gate and up, routing rule), the config states sizes and is checked against both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from epctl.layout.evidence import Evidence
from epctl.layout.experts import ExpertStack, check_scales, describe_layers, find_stacks
from epctl.layout.families import Family, load_families
from epctl.layout.generic import generic_names
from epctl.layout.mixture import build_moe
from epctl.layout.model import (
    AttentionLayout,
    ModelLayout,
    MoELayout,
    ParameterCounts,
    VisionLayout,
)
from epctl.layout.names import HOLE
from epctl.layout.parallel import ep_sizes, sequence_sizes
from epctl.layout.parameters import (
    Partition,
    build_partition,
    count_parameters,
    is_stale,
    parameter_shapes,
)
from epctl.layout.source import ModelSource
from epctl.layout.vision import build_vision


def detect(source: ModelSource) -> ModelLayout:
    """Returns the layout of a model.

    Raises LayoutError or a subclass when tensors contradict each other or the config.
    """
    check_scales(source.tensors)
    return _Detector(source).layout()


class _Detector(Evidence):
    """The steps from evidence to layout."""

    def layout(self) -> ModelLayout:
        """Returns the layout; fills reasons and warnings on the way."""
        config = self.source.config
        vision_family = self.vision_family()
        vision = build_vision(self.facts, vision_family, self.groups, self.reasons)
        stacks, doubt = self._find_stacks()
        moe = build_moe(self, stacks[0], stacks[1:], doubt) if stacks else None
        if moe is None:
            self._warn_dense()
        decoder = self._decoder(vision)
        partition = self._partition(stacks, moe, vision)
        counts = self._count(partition, moe)
        dropped = tuple(name for name in self.tensors if is_stale(name))
        self._add_warnings(moe, dropped)
        families = [family for family in (self.family, vision_family) if family]
        return ModelLayout(
            id=self.source.id,
            source=self.source.kind,
            revision=self.source.revision,
            architecture=self.architecture,
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
            parameter_shapes=tuple(parameter_shapes(self.groups, self.tensors, partition)),
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

    def _partition(
        self, stacks: Sequence[ExpertStack], moe: MoELayout | None, vision: VisionLayout | None
    ) -> Partition:
        # The top level wins here: a text section may keep its class default.
        tied = self.source.config.get("tie_word_embeddings")
        if tied is None:
            tied, _ = self.facts.look_up(["tie_word_embeddings"])
        head = next((p for p in self.groups if p.endswith("lm_head.weight")), None)
        if tied is True and head:
            self.warnings.append(f"`{head}` repeats the tied embedding and is not counted")
        return build_partition(
            stacks, moe, vision, tied_head=tied is True, mtp_prefixes=self._mtp_prefixes(stacks)
        )

    def _count(self, partition: Partition, moe: MoELayout | None) -> ParameterCounts:
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
