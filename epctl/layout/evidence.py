"""What detection knows so far: the source, its names folded, the family, the config's facts.

`reasons` and `warnings` are filled by every step; everything else stays as it is.
"""

from __future__ import annotations

from epctl.layout.experts import Groups, Tensors
from epctl.layout.facts import ConfigFacts, model_types
from epctl.layout.families import Family, families_by_model_type, load_families
from epctl.layout.names import group_names
from epctl.layout.router import Reasons
from epctl.layout.safetensors import short_text
from epctl.layout.source import ModelSource


class Evidence:
    """One instance a detection, shared by its steps."""

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

    @property
    def architecture(self) -> str | None:
        """The first class name that the config lists."""
        listed = self.source.config.get("architectures")
        return short_text(str(listed[0])) if isinstance(listed, list) and listed else None

    def _match_family(self) -> Family | None:
        by_type = families_by_model_type()
        matches = [by_type[kind] for kind in self.types if kind in by_type]
        # A family with expert names (the text part) before one that only knows the vision side.
        for family in sorted(matches, key=lambda entry: not entry.names):
            kinds = [kind for kind in self.types if kind in family.model_types]
            self.reasons["model.family"] = f"config model_type = {kinds[0]!r}"
            return family
        for family in load_families().values():
            if self.architecture in family.architectures:
                self.reasons["model.family"] = f"config architectures = {self.architecture!r}"
                return family
        self.reasons["model.family"] = "no family lists this model_type; the generic rule applies"
        return None

    def vision_family(self) -> Family | None:
        """Returns the family that knows the vision side, None when none does."""
        by_type = families_by_model_type()
        matches = [by_type[kind] for kind in reversed(self.types) if kind in by_type]
        return next((family for family in matches if family.vision), None)
