"""Families: one JSON file each under `families/`, the facts that tensors cannot show.

A file may say `"like": "other"` and then only what differs; objects merge, lists and scalars
replace, and null removes. The schema is in docs/adding-a-model.md.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from epctl.errors import LayoutError

_KEYS = {
    "name", "title", "like", "model_types", "config", "defaults", "names", "router", "activation",
    "experts", "vision", "untrainable", "layers", "notes", "live_module", "sequence_parallel",
    "architectures", "untrainable_types",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """One naming of a family's MoE tensors, relative to the layer prefix.

    `storage` has `gate`, `up`, `down` or `gate_up`, `down`; each may hold `{expert}`.
    """

    naming: str
    experts: Mapping[str, str]
    router: str | None = None
    router_bias: str | None = None
    correction_bias: str | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_gate: str | None = None
    biases: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    quantization: str | None = None
    flat_rows: bool = False
    interleaved: bool = False
    transposed: bool | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One family as its JSON file states it, `like` resolved."""

    name: str
    title: str
    model_types: tuple[str, ...]
    names: tuple[FamilyNames, ...]
    config: Mapping[str, list[str]]
    defaults: Mapping[str, Any]
    router: Mapping[str, Any] | None
    activation: str
    experts: Mapping[str, Any]
    vision: Mapping[str, Any] | None
    layers: str | None
    untrainable: str | None
    untrainable_types: Mapping[str, str]
    sequence_parallel: str | None
    live_module: str | None
    architectures: tuple[str, ...]
    notes: tuple[str, ...]


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return {key: value for key, value in merged.items() if value is not None}


def build_family(document: Mapping[str, Any], *, file: str) -> Family:
    """Returns the Family of a resolved document. Raises LayoutError naming `file`."""
    unknown = set(document) - _KEYS
    if unknown:
        raise LayoutError(f"`{file}` has unknown keys {sorted(unknown)}; known: {sorted(_KEYS)}")
    try:
        return Family(
            name=document["name"],
            title=document["title"],
            model_types=tuple(document["model_types"]),
            names=tuple(FamilyNames(**entry) for entry in document.get("names", ())),
            config=document.get("config", {}),
            defaults=document.get("defaults", {}),
            router=document.get("router"),
            activation=document.get("activation", "standard"),
            experts=document.get("experts", {}),
            vision=document.get("vision"),
            layers=document.get("layers"),
            untrainable=document.get("untrainable"),
            untrainable_types=document.get("untrainable_types", {}),
            sequence_parallel=document.get("sequence_parallel"),
            live_module=document.get("live_module"),
            architectures=tuple(document.get("architectures", ())),
            notes=tuple(document.get("notes", ())),
        )
    except (KeyError, TypeError) as error:
        raise LayoutError(f"`{file}` is no family file: {error}") from None


def resolve_documents(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns each document merged onto its `like` chain. Raises LayoutError for a bad chain."""
    resolved: dict[str, dict[str, Any]] = {}

    def resolve(name: str, chain: tuple[str, ...]) -> dict[str, Any]:
        if name in resolved:
            return resolved[name]
        if name in chain or name not in documents:
            raise LayoutError(f"family `{chain[-1]}` is like `{name}`, which cannot be resolved")
        document = documents[name]
        base = resolve(document["like"], (*chain, name)) if "like" in document else {}
        # What names a family is never inherited.
        base = {
            key: base[key]
            for key in base
            if key not in ("notes", "architectures", "untrainable_types")
        }
        resolved[name] = _merge(base, document)
        return resolved[name]

    for name in documents:
        resolve(name, ("",))
    return resolved


@functools.cache
def load_families() -> Mapping[str, Family]:
    """Returns the bundled families by name."""
    folder = resources.files(__package__) / "families"
    documents: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.iterdir(), key=lambda item: item.name):
        if file.name.endswith(".json"):
            document = json.loads(file.read_text(encoding="utf-8"))
            documents[document["name"]] = document
    return {
        name: build_family(document, file=f"{name}.json")
        for name, document in resolve_documents(documents).items()
    }


@functools.cache
def families_by_model_type() -> Mapping[str, Family]:
    """Returns the family of each model_type. Raises LayoutError if two claim the same one."""
    table: dict[str, Family] = {}
    for family in load_families().values():
        for model_type in family.model_types:
            if model_type in table:
                raise LayoutError(
                    f"model_type `{model_type}` is claimed by `{table[model_type].name}` "
                    f"and `{family.name}`"
                )
            table[model_type] = family
    return table
