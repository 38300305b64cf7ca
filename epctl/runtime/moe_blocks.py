"""Finds a model's MoE blocks by their structure and makes expert-parallel layers of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from epctl.errors import LayoutError
from epctl.layout.detect import detect
from epctl.layout.model import ModelLayout, MoELayout
from epctl.layout.safetensors import TensorEntry
from epctl.layout.source import ModelSource
from epctl.runtime.hub_names import layer_number
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe import (
    ExpertParallelMoE,
    Router,
    counting_router,
    expert_parallel,
)
from epctl.runtime.moe_rules import ExpertShape, RouterRule
from epctl.runtime.names import is_fused_experts

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def live_layout(model: nn.Module, config: Any) -> ModelLayout:
    """Returns the layout of a transformers model by its own names, shapes and config.

    Raises LayoutError for a model whose structure or config contradict each other.
    """
    state = {**dict(model.named_parameters()), **dict(_persistent_buffers(model))}
    tensors = {
        name: TensorEntry(DTYPE_NAMES.get(tensor.dtype, "F32"), tuple(tensor.shape), "live", 0, 0)
        for name, tensor in state.items()
    }
    return detect(ModelSource(type(model).__name__, "folder", config.to_dict(), tensors))


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                yield f"{path}.{leaf}" if path else leaf, buffer


def moe_layout(model: nn.Module, config: Any) -> MoELayout:
    """Returns the routed experts of a live model. Raises LayoutError if it cannot be trained."""
    layout = live_layout(model, config)
    layout.require_trainable()
    if layout.moe is None:
        raise LayoutError(f"`{config.model_type}` has no routed experts in any layer")
    return layout.moe


def count_experts(model: nn.Module, config: Any) -> int:
    """Returns the routed experts of a layer, 0 for a model without; raises as `moe_layout`."""
    layout = live_layout(model, config)
    layout.require_trainable()
    return 0 if layout.moe is None else layout.moe.num_experts


def swap_moe_blocks(model: nn.Module, config: Any, mesh: Mesh, dtype: torch.dtype) -> int:
    """Makes every MoE block of `model` expert-parallel; returns how many.

    Args:
        config: the transformers config that `model` was built from.

    Raises LayoutError if the model has a block that epctl cannot run, saying why.
    """
    blocks = list(moe_blocks(model))
    if not blocks and live_layout(model, config).moe is None:
        return 0
    moe = moe_layout(model, config)
    found = {layer_number(name) for name, _ in blocks}
    if found != set(moe.layers):
        raise LayoutError(
            f"layers {sorted(found ^ set(moe.layers))} have experts in the model or the layout "
            "only: their blocks are not built as transformers' others are"
        )
    for name, block in blocks:
        with torch.device("meta"):
            layer = _expert_parallel(name, block, moe, config, mesh, dtype)
        model.set_submodule(name, layer)
    return len(blocks)


def moe_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields transformers' MoE blocks: modules whose child `experts` holds all of them stacked."""
    for name, module in model.named_modules():
        experts = module._modules.get("experts")
        if experts is not None and is_fused_experts(experts):
            yield name, module


def router_of(block: nn.Module) -> nn.Module:
    """Returns the router of a block: transformers calls that child `gate` or `router`."""
    return block.get_submodule("gate" if "gate" in block._modules else "router")


def _expert_parallel(
    name: str, block: nn.Module, moe: MoELayout, config: Any, mesh: Mesh, dtype: torch.dtype
) -> ExpertParallelMoE:
    layer = layer_number(name)
    tensors = {
        key: full.removeprefix(f"{name}.") for key, full in moe.router_tensors(layer).items()
    }
    router_name, _, weight_name = tensors["weight"].partition(".")
    shape = ExpertShape.from_layout(moe, layer, *_limits(block.experts, moe))
    rule = RouterRule.from_layout(moe, config)
    live = block.get_submodule(router_name)
    _own_bias_as_buffer(block, tensors.get("correction_bias"))
    if rule is None:
        router = counting_router(live, shape.num_experts, moe.router.selection)
    else:
        inside = {
            key: full.removeprefix(f"{router_name}.")
            for key, full in tensors.items()
            if full.startswith(f"{router_name}.")
        }
        router = _router(live, rule, {**inside, "weight": weight_name}, dtype)
    return expert_parallel(block, router_name, router, shape, mesh, dtype)


def _limits(experts: Any, moe: MoELayout) -> tuple[float | None, float]:
    """Returns the clamp of a layer's experts and the factor in the sigmoid of the GPT-OSS form.

    The live module knows best: in some families the limit differs from layer to layer.
    """
    limit = getattr(experts, "limit", getattr(experts, "swiglu_limit", moe.activation_limit))
    limit = None if limit is None or limit == float("inf") else float(limit)
    return limit, float(getattr(experts, "alpha", getattr(experts, "swiglu_alpha", 1.702)))


def _router(live: nn.Module, rule: RouterRule, names: dict[str, str], dtype: torch.dtype) -> Router:
    """Returns epctl's router with the tensors of transformers', hoisted into one module.

    ZeRO-3 gathers what a module owns itself when its forward runs, so none may be a level below.
    """
    bias = names.get("linear_bias")
    router = Router(
        rule,
        _parameter(live, names["weight"], dtype),
        None if bias is None else _parameter(live, bias, dtype),
    )
    leaves = {"weight": names["weight"]} | ({} if bias is None else {"bias": bias})
    correction = names.get("correction_bias")
    if correction is not None:
        shape = _tensor(live, correction).shape
        router.register_buffer("e_score_correction_bias", torch.zeros(shape))
        leaves["e_score_correction_bias"] = correction
    router.live_leaves = {leaf: name for leaf, name in leaves.items() if leaf != name}
    return router


def _parameter(module: nn.Module, name: str, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(_tensor(module, name).shape, dtype=dtype))


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), leaf)
    return tensor


def _own_bias_as_buffer(block: nn.Module, name: str | None) -> None:
    """Makes a correction bias that the block itself owns a float32 buffer.

    In some families it is a Parameter; it takes no gradient and no optimizer may touch it.
    """
    if name is not None and "." not in name:
        shape = _tensor(block, name).shape
        block._parameters.pop(name, None)
        block.register_buffer(name, torch.zeros(shape))
