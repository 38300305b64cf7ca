"""Partial training: which parameters get gradients and optimizer state, chosen by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from epctl.errors import ConfigError
from epctl.launch.memory_shape import PARTS
from epctl.runtime.deepspeed_seams import full_shape
from epctl.runtime.names import hub_tensors


def select_trainable(model: nn.Module, wanted: str, num_experts: int) -> int:
    """Freezes every parameter that `wanted` does not name; returns how many elements are frozen.

    Args:
        wanted: `all`, `experts`, `attention`, `router`, or a regular expression searched for in
            checkpoint names such as `model.layers.3.mlp.experts.7.gate_proj.weight`.

    Raises ConfigError if the expression is not valid, names nothing, or only some of the experts
    that share one parameter.
    """
    if wanted == "all":
        return 0
    matches = _matcher(wanted)
    names = _names_by_parameter(model, num_experts)
    num_frozen = num_trained = 0
    for parameter in model.parameters():
        hits = [matches(name) for name in names[id(parameter)]]
        if any(hits) and not all(hits):
            raise ConfigError(
                f"`--train {wanted}` names {sum(hits)} of {len(hits)} experts of a layer, "
                f"`{names[id(parameter)][hits.index(False)]}` not; they train together",
                hint=r"write `experts\.\d+\.` in place of one expert's number",
            )
        parameter.requires_grad_(all(hits))
        num_elements = full_shape(parameter).numel()
        num_trained += num_elements if all(hits) else 0
        num_frozen += 0 if all(hits) else num_elements
    if not num_trained:
        example = next(iter(names.values()))[0]
        raise ConfigError(
            f"`--train {wanted}` matches no parameter of the model",
            hint=f"use all, {', '.join(PARTS)}, or a regex of names such as `{example}`",
        )
    return num_frozen


def _names_by_parameter(model: nn.Module, num_experts: int) -> dict[int, list[str]]:
    """Returns the checkpoint names of each parameter, those of other ranks' experts included.

    Every rank must decide alike, or their optimizers would hold different parameters.
    """
    names: dict[int, dict[str, None]] = {}
    for tensor in hub_tensors(model):
        before, separator, after = tensor.name.partition(".experts.")
        known = [tensor.name]
        if separator:
            leaf = after.partition(".")[2]
            known = [f"{before}{separator}{expert}.{leaf}" for expert in range(num_experts)]
        names.setdefault(id(tensor.tensor), {}).update(dict.fromkeys(known))
    return {key: list(value) for key, value in names.items()}


def _matcher(wanted: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(PARTS.get(wanted, wanted))
    except re.error as error:
        raise ConfigError(f"`--train {wanted}` is no regular expression: {error}") from None
    return lambda name: pattern.search(name) is not None
