"""Builds the model a rank trains: meta device first, then only what this rank holds.

No rank ever holds the whole model: MoE blocks are swapped for layers with local experts while
everything is still on meta, then one load unit (embedding, a decoder layer, the head) at a time
gets memory and weights and, at ZeRO-3, is partitioned before the next one is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.fused_gate import fuse_gates
from epctl.runtime.fused_norm import fuse_norms
from epctl.runtime.latent_attention import fuse_latent_attention
from epctl.runtime.mesh import Mesh, validate_expert_parallel
from epctl.runtime.moe import ExpertParallelMoE
from epctl.runtime.moe_blocks import count_experts, swap_moe_blocks
from epctl.runtime.names import hub_tensors
from epctl.runtime.native_config import auto_class, is_visual
from epctl.runtime.sequence.units import unreached
from epctl.runtime.trainable import select_trainable
from epctl.runtime.weights import WeightSource


def build_model(
    config: Any,
    mesh: Mesh,
    weights: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    zero3_config: dict[str, Any] | None = None,
    swap: bool = True,
    trainable: str = "all",
) -> nn.Module:
    """Returns the model with this rank's experts and weights from `weights`.

    Args:
        config: a transformers config of a causal language model, with a vision tower or without.
        swap: false keeps transformers' blocks with all experts and its norms, for DeepSpeed's own
            AutoEP and as what epctl's are compared with.
        zero3_config: the DeepSpeed config when parameters are to be partitioned (ZeRO-3).
        trainable: what is trained; see `select_trainable`.

    Raises:
        ConfigError: the ep size does not divide the experts, or `trainable` names nothing.
        InputError: `weights` lacks a tensor or holds one of another shape.
    """
    model = meta_model(config, dtype)
    num_experts = count_experts(model, config)
    validate_expert_parallel(mesh.ep_size, mesh.num_ranks, num_experts)
    if swap:
        swap_moe_blocks(model, config, mesh, dtype)
        fuse_norms(model)
        fuse_gates(model)
        fuse_latent_attention(model)
    weights.note_names(model)
    unused = unreached(model) if is_visual(config) else []
    select_trainable(model, trainable, num_experts)
    for parameter in unused:
        parameter.requires_grad_(False)
    ties = tied_owners(model)
    for prefix, module in load_units(model):
        materialize(module, prefix, weights, device, ties)
        if zero3_config is not None:
            _partition(module, mesh, zero3_config)
    initialize_computed(model)
    return model


def meta_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Returns transformers' own class for `config` without any memory behind it."""
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config, dtype=dtype)
    return model


def load_units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (prefix, module) in order; together they own every Parameter exactly once.

    A unit is what a rank holds whole at one time while loading: the embedding, one decoder layer,
    the final norm, the head.
    """
    for name, child in model.named_children():
        yield from _units_below(name, child)


def _units_below(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Takes apart the lists of layers and the modules that hold one."""
    children = list(module.named_children())
    is_list = isinstance(module, nn.ModuleList)
    holds_list = any(isinstance(child, nn.ModuleList) for _, child in children)
    owns_tensors = module._parameters or module._buffers
    if is_list:
        for inner_name, inner in children:
            yield f"{name}.{inner_name}", inner
    elif holds_list and not owns_tensors:
        for inner_name, inner in children:
            yield from _units_below(f"{name}.{inner_name}", inner)
    else:
        yield name, module


Owners = list[tuple[nn.Module, str]]


def tied_owners(model: nn.Module) -> dict[int, Owners]:
    """Returns by id the modules and leaves that share a Parameter, where more than one does."""
    owners: dict[int, Owners] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, leaf))
    return {key: found for key, found in owners.items() if len(found) > 1}


def materialize(
    module: nn.Module,
    prefix: str,
    weights: WeightSource,
    device: torch.device,
    ties: dict[int, Owners] | None = None,
) -> None:
    """Gives a module on meta real memory and fills it tensor by tensor under its hub names."""
    shared = {id(p) for p in module.parameters() if not p.is_meta}
    _to_empty(module, device, ties or {})
    with torch.no_grad():
        for tensor in hub_tensors(module, prefix):
            if id(tensor.tensor) not in shared:
                weights.read_into(tensor.name, tensor.local())
                tensor.tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def _to_empty(module: nn.Module, device: torch.device, ties: dict[int, Owners]) -> None:
    """Like `Module.to_empty`, but Parameters keep their identity and so their expert marks."""
    for child in module.modules():
        for leaf, parameter in list(child.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue  # tied to one of an earlier unit
            fresh = torch.empty_like(parameter, device=device)
            replacement = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            replacement.__dict__.update(parameter.__dict__)
            for owner, own_leaf in ties.get(id(parameter), [(child, leaf)]):
                owner.register_parameter(own_leaf, replacement)
        for name, buffer in list(child.named_buffers(recurse=False)):
            child._buffers[name] = _zeros_like(buffer, device)


def _zeros_like(buffer: Tensor | None, device: torch.device) -> Tensor | None:
    return None if buffer is None else torch.zeros_like(buffer, device=device)


def _partition(module: nn.Module, mesh: Mesh, zero3_config: dict[str, Any]) -> None:
    """Partitions a unit at once: experts over their edp group, the rest over all ranks."""
    for child in module.modules():
        if isinstance(child, ExpertParallelMoE):
            seams.partition_module(child.experts, mesh.edp_group, zero3_config)
    seams.partition_module(module, None, zero3_config)


def initialize_computed(model: nn.Module) -> None:
    """Fills what is in no checkpoint (rotary tables, decay masks) as transformers does.

    Tensors that were read are marked, and its initialisation leaves those alone.
    """
    model.initialize_weights()  # type: ignore[operator]
