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
from epctl.runtime.mesh import Mesh, validate_expert_parallel
from epctl.runtime.moe import ExpertParallelMoE, RouterRule
from epctl.runtime.names import hub_tensors
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
        config: a transformers DeepseekV3Config.
        swap: false keeps transformers' blocks with all experts, for DeepSpeed's own AutoEP.
        zero3_config: the DeepSpeed config when parameters are to be partitioned (ZeRO-3).
        trainable: what is trained; see `select_trainable`.

    Raises:
        ConfigError: the ep size does not divide the experts, or `trainable` names nothing.
        InputError: `weights` lacks a tensor or holds one of another shape.
    """
    validate_expert_parallel(mesh.ep_size, mesh.num_ranks, config.n_routed_experts)
    model = meta_model(config, dtype)
    if swap:
        swap_moe_blocks(model, config, mesh, dtype)
    select_trainable(model, trainable, config.n_routed_experts)
    for prefix, module in load_units(model):
        materialize(module, prefix, weights, device)
        if zero3_config is not None:
            _partition(module, mesh, zero3_config)
    _rebuild_rotary(model, config, device)
    return model


def meta_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Returns transformers' own DeepSeek-V3 class without any memory behind it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def swap_moe_blocks(model: nn.Module, config: Any, mesh: Mesh, dtype: torch.dtype) -> int:
    """Replaces every DeepSeek-V3 MoE block by epctl's layer; returns how many."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    rule = RouterRule.from_deepseek_v3(config)
    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, DeepseekV3MoE)]
    for name, block in blocks:
        with torch.device("meta"):
            layer = ExpertParallelMoE(
                rule,
                block.shared_experts,
                config.hidden_size,
                config.moe_intermediate_size,
                mesh,
                dtype,
            )
        model.set_submodule(name, layer)
    return len(blocks)


def load_units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (prefix, module) in order; together they own every Parameter exactly once.

    A unit is what a rank holds whole at one time while loading: the embedding, one decoder layer,
    the final norm, the head.
    """
    for name, child in model.named_children():
        if name == "model":
            for inner_name, inner in child.named_children():
                if isinstance(inner, nn.ModuleList):
                    for index, layer in enumerate(inner):
                        yield f"model.{inner_name}.{index}", layer
                else:
                    yield f"model.{inner_name}", inner
        else:
            yield name, child


def materialize(
    module: nn.Module, prefix: str, weights: WeightSource, device: torch.device
) -> None:
    """Gives a module on meta real memory and fills it tensor by tensor under its hub names."""
    _to_empty(module, device)
    with torch.no_grad():
        for tensor in hub_tensors(module, prefix):
            weights.read_into(tensor.name, tensor.local())


def _to_empty(module: nn.Module, device: torch.device) -> None:
    """Like `Module.to_empty`, but Parameters keep their identity and so their expert marks."""
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            marks = parameter.__dict__
            fresh = torch.empty_like(parameter, device=device)
            replacement = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            replacement.__dict__.update(marks)
            _replace(child, parameter, replacement)
        for name, buffer in list(child.named_buffers(recurse=False)):
            child._buffers[name] = _zeros_like(buffer, device)


def _zeros_like(buffer: Tensor | None, device: torch.device) -> Tensor | None:
    return None if buffer is None else torch.zeros_like(buffer, device=device)


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter is old:
            module.register_parameter(name, new)


def _partition(module: nn.Module, mesh: Mesh, zero3_config: dict[str, Any]) -> None:
    """Partitions a unit at once: experts over their edp group, the rest over all ranks."""
    for child in module.modules():
        if isinstance(child, ExpertParallelMoE):
            seams.partition_module(child.experts, mesh.edp_group, zero3_config)
    seams.partition_module(module, None, zero3_config)


def _rebuild_rotary(model: nn.Module, config: Any, device: torch.device) -> None:
    """Recomputes rotary tables: they are not in checkpoints, and meta ones hold nothing."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq") and hasattr(module, "compute_default_rope_parameters"):
            model.set_submodule(name, type(module)(config).to(device))
