"""Notes on a live model what a checkpoint calls its tensors.

The rules are transformers' own (its conversion mapping); which tensors hold experts, and how, is
the layout's. Each note is an attribute of the module that owns the tensor, so that it survives
whatever happens to the Parameter: `hub_names` by leaf, `stored_experts` for a layer's experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from epctl.errors import LayoutError
from epctl.layout.model import ModelLayout
from epctl.layout.source import ModelSource
from epctl.runtime.names import StoredExperts, is_fused_experts, live_name


def note_hub_names(model: nn.Module, source: ModelSource, layout: ModelLayout) -> None:
    """Notes the names that `source` has for the tensors of `model`.

    Raises LayoutError if the checkpoint keeps a dense tensor in another arrangement than the
    model: epctl reads and writes those as they are.
    """
    stored_experts = expert_tensor_names(layout)
    owners = dict(_owned_tensors(model))
    rename = _renaming(model, set(owners))
    for name in source.tensors:
        if name in stored_experts:
            continue
        live, is_converted = rename(name)
        if live not in owners:
            continue
        if is_converted:
            raise LayoutError(
                f"`{layout.id}` stores `{name}` in another arrangement than transformers' "
                f"`{live}`; training reads and writes dense tensors only as they are"
            )
        if live != name:
            owner, leaf = owners[live]
            noted = {**getattr(owner, "hub_names", {}), leaf: name}
            owner.hub_names = noted  # type: ignore[assignment]
    _note_experts(model, layout)


def _owned_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Yields each tensor's name in transformers' model with the module and leaf that hold it."""
    for path, owner in model.named_modules():
        leaves = [leaf for leaf, _ in owner.named_parameters(recurse=False)]
        leaves += [leaf for leaf, _ in owner.named_buffers(recurse=False)]
        for leaf in leaves:
            yield live_name(owner, path, leaf), (owner, leaf)


def _renaming(model: nn.Module, known: set[str]) -> Any:
    """Returns a function: checkpoint name -> (live name, True if values change on the way)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", "") or None
    table = dict.fromkeys(known, True)

    def rename(name: str) -> tuple[str, bool]:
        live, pattern = rename_source_key(name, renamings, converters, prefix, table)
        return live, pattern is not None

    return rename


def _note_experts(model: nn.Module, layout: ModelLayout) -> None:
    if layout.moe is None:
        return
    for name, module in model.named_modules():
        layer = layer_number(name)
        is_experts = name.endswith(".experts") and (
            hasattr(module, "w2") or is_fused_experts(module)
        )
        if is_experts and layer in layout.moe.layer_prefixes:
            module.stored_experts = StoredExperts(layout.moe, layer)


def layer_number(name: str) -> int:
    """Returns the first number in a dotted name (`model.layers.3.mlp`), -1 without one."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else -1


def expert_tensor_names(layout: ModelLayout) -> set[str]:
    """Returns the checkpoint names of all routed experts' tensors."""
    moe = layout.moe
    if moe is None:
        return set()
    names = set()
    for layer in moe.layers:
        experts = range(moe.experts_of_layer(layer) if moe.storage.kind == "per_expert" else 1)
        for stored in (*moe.storage.names.values(), *moe.storage.biases.values()):
            names |= {moe.tensor_name(layer, stored, expert) for expert in experts}
    return names
