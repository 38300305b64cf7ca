"""Which tensors of a view are routed experts, and whose: names only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from epctl.convert.view import TensorView
from epctl.layout.model import MoELayout


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """A stored tensor of routed experts; `expert` is None where one tensor holds all of them.

    `key` is what it is within an expert: `gate`, `down`, `gate_up`, with `.scale` or `.bias`
    behind it, or the rest of its name for what the layout does not describe.
    """

    layer: int
    expert: int | None
    key: str


def stored_names(moe: MoELayout) -> dict[str, str]:
    """Returns the name templates of an expert's tensors by key."""
    storage = moe.storage
    names = dict(storage.names)
    names |= {f"{key}.scale": name for key, name in storage.scales.items()}
    names |= {f"{key}.bias": name for key, name in storage.biases.items()}
    return names


def find_expert_tensors(
    moe: MoELayout | None, tensors: Mapping[str, TensorView]
) -> dict[str, ExpertTensor]:
    """Returns the routed experts' tensors by name, in the order of `tensors`."""
    if moe is None:
        return {}
    if moe.storage.kind == "per_expert":
        return _per_expert(moe, tensors)
    named = {
        moe.tensor_name(layer, template): ExpertTensor(layer, None, key)
        for layer in moe.layers
        for key, template in stored_names(moe).items()
    }
    return {name: named[name] for name in tensors if name in named}


def _per_expert(moe: MoELayout, tensors: Mapping[str, TensorView]) -> dict[str, ExpertTensor]:
    """Everything below `...experts.7.` belongs to expert 7, also what the layout does not name."""
    keys = {template.partition("{expert}")[2]: key for key, template in stored_names(moe).items()}
    head = moe.storage.names["down"].partition("{expert}")[0]
    layers = {moe.tensor_name(layer, head): layer for layer in moe.layers}
    pattern = re.compile(r"(.*?" + re.escape(head) + r")(\d+)(\..+)")
    found: dict[str, ExpertTensor] = {}
    for name in tensors:
        match = pattern.fullmatch(name)
        layer = layers.get(match[1]) if match else None
        if match is None or layer is None or int(match[2]) >= moe.experts_of_layer(layer):
            continue
        found[name] = ExpertTensor(layer, int(match[2]), keys.get(match[3], match[3]))
    return found
