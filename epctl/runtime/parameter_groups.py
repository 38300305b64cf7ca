"""Which parameter is on Muon and which on AdamW, counted and provable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from epctl.config import OptimSection
from epctl.errors import ConfigError
from epctl.runtime.deepspeed_seams import (
    full_shape,
    is_expert_parameter,
    split_expert_groups,
)
from epctl.runtime.moe import Router

Kind = Literal["muon", "adamw"]


@dataclass(frozen=True)
class OptimizerSplit:
    """Parameter counts of the whole model by optimizer, experts of all ranks included."""

    num_muon: int
    num_muon_matrices: int
    num_adamw: int


def parameter_kind(
    name: str, parameter: nn.Parameter, excluded: set[int], routers: set[int], optim: OptimSection
) -> Kind:
    """Returns the optimizer of one parameter.

    Muon takes matrices. Embeddings, the head (`excluded`, by identity: names differ between
    families), norms, biases and scalars stay on AdamW; routers follow `optim.router`.
    """
    if optim.name == "adamw" or id(parameter) in excluded:
        return "adamw"
    if id(parameter) in routers:
        return optim.router
    is_matrix = len(full_shape(parameter)) >= 2 and not name.endswith("bias")
    return "muon" if is_matrix else "adamw"


def classify(model: nn.Module, optim: OptimSection) -> Iterator[tuple[str, nn.Parameter, Kind]]:
    """Yields every trainable parameter with its optimizer."""
    excluded = {
        id(p)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        if embedding is not None
        for p in embedding.parameters()
    }
    routers = {id(p) for m in model.modules() if _is_router(m) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = parameter_kind(name, parameter, excluded, routers, optim)
            yield name, parameter, kind


def _is_router(module: nn.Module) -> bool:
    return isinstance(module, Router) or type(module).__name__ == "TokenChoiceTopKRouter"


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Returns client groups for DeepSpeed: dense and experts apart, each with its kind and rate.

    Raises ConfigError if Muon is asked for and no parameter is on it.
    """
    by_kind: dict[Kind, list[nn.Parameter]] = {"muon": [], "adamw": []}
    for _, parameter, kind in classify(model, optim):
        by_kind[kind].append(parameter)
    if optim.name == "muon" and not by_kind["muon"]:
        raise ConfigError(
            "optimizer is muon, but none of the model's parameters is a matrix it may take",
            hint="use `--optim adamw`",
        )
    rates = {"muon": optim.lr, "adamw": optim.adamw_lr or optim.lr}
    groups = [
        {
            "params": parameters,
            "name": kind,
            "kind": kind,
            "lr": rates[kind],
            "weight_decay": optim.weight_decay,
        }
        for kind, parameters in by_kind.items()
        if parameters
    ]
    return split_expert_groups(groups)


def count_split(model: nn.Module, optim: OptimSection, ep_size: int) -> OptimizerSplit:
    """Counts parameters by optimizer over all expert-parallel ranks."""
    num_elements = {"muon": 0, "adamw": 0}
    num_matrices = 0
    for _, parameter, kind in classify(model, optim):
        shape = full_shape(parameter)
        copies = ep_size if is_expert_parameter(parameter) else 1
        num_elements[kind] += shape.numel() * copies
        if kind == "muon":
            num_matrices += copies * (shape[0] if len(shape) == 3 else 1)
    return OptimizerSplit(num_elements["muon"], num_matrices, num_elements["adamw"])
