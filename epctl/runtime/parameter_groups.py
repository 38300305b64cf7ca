"""Which parameter is on Muon and which on AdamW, each with its reason; counted and provable."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from epctl.config import OptimSection
from epctl.errors import ConfigError
from epctl.runtime.deepspeed_seams import (
    full_shape,
    is_expert_parameter,
    split_expert_groups,
)
from epctl.runtime.moe import Router
from epctl.runtime.row_blocks import blocks_of

Kind = Literal["muon", "adamw"]

_Convolution = torch.nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Assignment:
    """The optimizer of one trainable parameter and the rule that decided it."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    kind: Kind
    reason: str


@dataclass(frozen=True)
class OptimizerSplit:
    """Parameter counts of the whole model by optimizer, experts of all ranks included."""

    num_muon: int
    num_muon_matrices: int
    num_adamw: int


def classify(model: nn.Module, optim: OptimSection) -> Iterator[Assignment]:
    """Yields every trainable parameter once, with its optimizer and the reason.

    Decided by the module that owns the parameter, by identity and by shape; names differ between
    families. Under ZeRO-3 the shape is the whole one: a partitioned parameter looks like a vector.
    """
    excluded = _embedding_and_head(model)
    routers = {id(p) for m in model.modules() if is_router(m) for p in m.parameters()}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{module_name}.{own_name}" if module_name else own_name
                if id(parameter) in routers and optim.name != "adamw":
                    kind, reason = _router_kind(parameter, optim)
                else:
                    kind, reason = _kind(name, module, parameter, excluded, optim)
                yield Assignment(name, module, parameter, kind, reason)


def _kind(
    name: str,
    module: nn.Module,
    parameter: nn.Parameter,
    excluded: set[int],
    optim: OptimSection,
) -> tuple[Kind, str]:
    shape = full_shape(parameter)
    own_name = name.rpartition(".")[2]
    if optim.name == "adamw":
        return "adamw", "the optimizer is adamw"
    if id(parameter) in excluded:
        return "adamw", "embedding or head"
    if "Embedding" in type(module).__name__ or "patch_embed" in name:
        return "adamw", "embedding or position table"
    if isinstance(module, _Convolution):
        return "adamw", "convolution"
    if own_name.endswith("bias") or not _is_matrix(parameter):
        return "adamw", "vector or scalar"
    if len(shape) == 3 and _is_expert_stack(module, parameter):
        return "muon", "stacked expert matrices"
    if len(shape) == 2 and own_name == "weight":
        return "muon", "matrix"
    return "adamw", "not the weight of a linear layer"


def _router_kind(parameter: nn.Parameter, optim: OptimSection) -> tuple[Kind, str]:
    if not _is_matrix(parameter):
        return "adamw", "vector or scalar"
    return optim.router, f"router: optim.router = {optim.router}"


def _is_matrix(parameter: nn.Parameter) -> bool:
    shape = full_shape(parameter)
    return len(shape) >= 2 and min(shape[-2:]) > 1


def _embedding_and_head(model: nn.Module) -> set[int]:
    """Ids of the input embedding's and the head's parameters; a classification head has no mark."""
    getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    found = [getter() for getter in getters if getter is not None]
    return {id(p) for module in found if module is not None for p in module.parameters()}


def is_router(module: nn.Module) -> bool:
    """True for epctl's, DeepSpeed's and transformers' routers; the latter only share a suffix."""
    return isinstance(module, Router) or type(module).__name__.lower().endswith("router")


def _is_expert_stack(module: nn.Module, parameter: nn.Parameter) -> bool:
    num_experts = getattr(module, "num_experts", getattr(module, "num_local_experts", None))
    return is_expert_parameter(parameter) or num_experts == full_shape(parameter)[0]


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Returns client groups for DeepSpeed: dense and experts apart, each with its kind and rate.

    Raises ConfigError if Muon is asked for and no parameter is on it.
    """
    by_kind: dict[Kind, list[nn.Parameter]] = {"muon": [], "adamw": []}
    for assignment in classify(model, optim):
        by_kind[assignment.kind].append(assignment.parameter)
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
    split = split_expert_groups(groups)
    _assert_each_once(model, split)
    return split


def _assert_each_once(model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    """Every trainable parameter is in one group: a forgotten one would be frozen silently."""
    grouped = [id(p) for p in itertools.chain.from_iterable(g["params"] for g in groups)]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == trainable, f"{len(grouped)} of {len(trainable)} parameters are grouped"


def row_blocks(model: nn.Module, optim: OptimSection) -> dict[int, tuple[int, ...]]:
    """Returns the rows of the matrices inside fused (or per-head) Muon parameters, by id."""
    found = {}
    for assignment in classify(model, optim):
        if assignment.kind == "muon":
            blocks = blocks_of(model, assignment.name, assignment.parameter, optim.per_head)
            if blocks is not None:
                found[id(assignment.parameter)] = blocks
    return found


def count_split(model: nn.Module, optim: OptimSection, ep_size: int) -> OptimizerSplit:
    """Counts parameters by optimizer over all expert-parallel ranks."""
    num_elements = {"muon": 0, "adamw": 0}
    num_matrices = 0
    blocks = row_blocks(model, optim)
    for assignment in classify(model, optim):
        parameter = assignment.parameter
        shape = full_shape(parameter)
        copies = ep_size if is_expert_parameter(parameter) else 1
        num_elements[assignment.kind] += shape.numel() * copies
        if assignment.kind == "muon":
            num_stacked = shape[0] if len(shape) == 3 else 1
            num_matrices += copies * num_stacked * len(blocks.get(id(parameter), (0,)))
    total = sum(num_elements.values())
    trainable = sum(
        full_shape(p).numel() * (ep_size if is_expert_parameter(p) else 1)
        for p in model.parameters()
        if p.requires_grad
    )
    assert total == trainable, f"{total} of {trainable} parameters are counted"
    return OptimizerSplit(num_elements["muon"], num_matrices, num_elements["adamw"])
