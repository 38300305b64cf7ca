"""The peers of `epctl bench moe`: each builds its own block from the problem's weights.

A peer is imported only here and only when asked for; one that is not installed, or does not run,
is left out with its reason.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from epctl.bench.moe import SCALE, Implementation, Problem, epctl_block, leaf_gradients, reset
from epctl.kernels import grouped_mm, route, router_logits


def _zero_gradients(module: nn.Module, problem: Problem) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        reset(problem)

    return run


def _torch_grouped_mm(problem: Problem) -> Implementation:
    def forward() -> Tensor:
        weights_TK, experts_TK = route(
            router_logits(problem.x_TD, problem.router_ED),
            problem.bias_E,
            top_k=problem.top_k,
            normalize=True,
            scale=SCALE,
        )
        y_TD: Tensor = grouped_mm.moe_mlp(
            problem.x_TD, experts_TK, weights_TK, problem.w1_EID, problem.w3_EID, problem.w2_EDI
        )
        return y_TD

    return Implementation(
        "torch-grouped-mm",
        forward,
        lambda: leaf_gradients(problem),
        lambda: reset(problem),
        "epctl's fallback without Triton; router by epctl",
    )


class _FusedExperts(nn.Module):
    """The experts as transformers 5 stores them, gate above up in one parameter."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        gate_up = torch.cat([problem.w1_EID.detach(), problem.w3_EID.detach()], dim=1)
        self.gate_up_proj = nn.Parameter(gate_up)
        self.down_proj = nn.Parameter(problem.w2_EDI.detach().clone())


def _fused_gradients(
    experts: Any, router: Tensor, problem: Problem
) -> Callable[[], dict[str, Tensor]]:
    def run() -> dict[str, Tensor]:
        gate, up = experts.gate_up_proj.grad.chunk(2, dim=1)
        return {
            "dx": _gradient(problem.x_TD),
            "drouter": _gradient(router),
            "dw1": gate,
            "dw3": up,
            "dw2": experts.down_proj.grad,
        }

    return run


def _gradient(tensor: Tensor) -> Tensor:
    # Infinity is what the gate shows for a gradient that never came.
    return torch.full_like(tensor, torch.inf) if tensor.grad is None else tensor.grad


def _transformers_config(problem: Problem) -> Any:
    from transformers import DeepseekV3Config

    num_experts, intermediate, hidden = problem.w1_EID.shape
    config = DeepseekV3Config(
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        n_routed_experts=num_experts,
        num_experts_per_tok=problem.top_k,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=SCALE,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
    )
    config._experts_implementation = "grouped_mm"
    return config


def _transformers_router(problem: Problem) -> Any:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    with torch.device(problem.x_TD.device):
        router = modeling.DeepseekV3TopkRouter(_transformers_config(problem))
    router.to(problem.x_TD.dtype)
    router.weight.data.copy_(problem.router_ED.detach())
    router.e_score_correction_bias = problem.bias_E.clone()
    return router


def _behind_router(
    problem: Problem,
    name: str,
    experts: Any,
    run: Callable[[Tensor, Tensor], Tensor],
    note: str,
) -> Implementation:
    """Returns experts with fused parameters behind the DeepSeek-V3 router of transformers.

    Args:
        run: takes the experts chosen and their weights, [T, K] each.
    """
    router = _transformers_router(problem)
    block = nn.ModuleDict({"router": router, "experts": experts})

    def forward() -> Tensor:
        _, weights_TK, experts_TK = router(problem.x_TD)
        return run(experts_TK, weights_TK)

    return Implementation(
        name,
        forward,
        _fused_gradients(experts, router.weight, problem),
        _zero_gradients(block, problem),
        f"{note}, DeepSeek-V3 router of transformers",
    )


def _transformers(problem: Problem) -> Implementation:
    from transformers.models.qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    num_experts, intermediate, hidden = problem.w1_EID.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=num_experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = modeling.Qwen3MoeExperts(config)
    stored = _FusedExperts(problem)
    experts.gate_up_proj, experts.down_proj = stored.gate_up_proj, stored.down_proj

    def run(experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD: Tensor = experts(problem.x_TD, experts_TK, weights_TK)
        return y_TD

    return _behind_router(
        problem, "transformers", experts, run, "experts_implementation grouped_mm"
    )


def _liger(problem: Problem) -> Implementation:
    # Its autotuner takes minutes on a first call; this pins what it calls its default tiles.
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    fused: Any = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    experts = _FusedExperts(problem)

    def run(experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD: Tensor = fused.apply(
            problem.x_TD,
            experts.gate_up_proj,
            experts.down_proj,
            experts_TK.to(torch.int32),
            weights_TK,
        )
        return y_TD

    return _behind_router(problem, "liger", experts, run, "autotune off")


def _sonicmoe(problem: Problem) -> Implementation:
    functional: Any = importlib.import_module("sonicmoe.functional")
    swiglu: Any = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    _pin_quack_tiles()
    experts = _FusedExperts(problem)

    def run(experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        tables = _sonicmoe_tables(functional, experts_TK.to(torch.int32), problem)
        offsets, gather, scatter, reverse = tables
        num_tokens, num_rows = problem.x_TD.shape[0], experts_TK.numel()
        rows = (gather, scatter, reverse, None, False, swiglu)
        # Its parameters lie as (rows, columns, experts); the gate above the up projection.
        gate_up, down = (w.permute(1, 2, 0) for w in (experts.gate_up_proj, experts.down_proj))
        up = functional._UpProjection.apply(
            problem.x_TD, gate_up, None, offsets, num_rows, problem.top_k, *rows, False, True
        )
        y_TD: Tensor = functional._DownProjection.apply(
            *up, down, None, weights_TK.float(), offsets, num_tokens, problem.top_k, *rows
        )
        return y_TD

    return _behind_router(problem, "sonicmoe", experts, run, "quack's default tiles")


def _pin_quack_tiles() -> None:
    """Takes QuACK's default tiles: its tuner compiles for over four minutes on a first call."""
    for name in ("sonicmoe.functional.forward", "sonicmoe.functional.backward"):
        module = importlib.import_module(name)
        for product in ("gemm", "gemm_gated", "gemm_dgated"):
            found = getattr(module, product, None)
            if found is not None and not isinstance(found, functools.partial):
                setattr(module, product, functools.partial(found, tuned=False))


def _sonicmoe_tables(
    functional: Any, experts_TK: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns offsets (E + 1,) and the rows' gather, scatter and reverse scatter indices."""
    num_experts, num_rows = problem.w1_EID.shape[0], experts_TK.numel()
    counts, offsets, gather, scatter, reverse = (
        torch.empty(size, dtype=torch.int32, device=experts_TK.device)
        for size in (num_experts, num_experts + 1, num_rows, num_rows, num_rows)
    )
    functional.TC_topk_router_metadata_triton(
        experts_TK, num_experts, counts, offsets, gather, scatter, reverse
    )
    return offsets, gather, scatter, reverse


def _moe_ops(problem: Problem) -> Implementation:
    ops: Any = importlib.import_module("moe_ops")
    num_experts, num_tokens = problem.w1_EID.shape[0], problem.x_TD.shape[0]
    router = _transformers_router(problem)

    def forward() -> Tensor:
        _, weights_TK, experts_TK = router(problem.x_TD)
        rows, row_id_map, offsets = ops.permute(
            problem.x_TD, experts_TK.to(torch.int32), E=num_experts
        )
        gate, up = (ops.grouped_gemm(rows, w, offsets) for w in (problem.w1_EID, problem.w3_EID))
        down = ops.grouped_gemm(nn.functional.silu(gate) * up, problem.w2_EDI, offsets)
        y_TD: Tensor = ops.unpermute(down, row_id_map, weights_TK, num_tokens, problem.top_k)
        return y_TD

    def gradients() -> dict[str, Tensor]:
        return leaf_gradients(problem) | {"drouter": _gradient(router.weight)}

    return Implementation(
        "moe-ops",
        forward,
        gradients,
        _zero_gradients(router, problem),
        "its grouped GEMM, permute and unpermute; SwiGLU by torch, router of transformers",
    )


def _deepspeed(name: str, note: str, **options: str) -> Callable[[Problem], Implementation]:
    def build(problem: Problem) -> Implementation:
        layer = _deepspeed_layer(problem, options)

        def forward() -> Tensor:
            y = layer(problem.x_TD.unsqueeze(0))
            y_TD: Tensor = (y[0] if isinstance(y, tuple) else y).view_as(problem.x_TD)
            return y_TD

        def gradients() -> dict[str, Tensor]:
            return {
                "dx": _gradient(problem.x_TD),
                "drouter": _gradient(layer.router.gate.weight),
                "dw1": _gradient(layer.experts.w1),
                "dw3": _gradient(layer.experts.w3),
                "dw2": _gradient(layer.experts.w2),
            }

        return Implementation(name, forward, gradients, _zero_gradients(layer, problem), note)

    return build


def _deepspeed_layer(problem: Problem, options: dict[str, str]) -> Any:
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    num_experts, intermediate, hidden = problem.w1_EID.shape
    source = nn.Module()
    source.gate = nn.Linear(hidden, num_experts, bias=False, device="meta")
    source.gate.weight = nn.Parameter(problem.router_ED.detach().clone())
    # A buffer, or AutoEP leaves it out and says so in a log line.
    source.gate.register_buffer("e_score_correction_bias", problem.bias_E.clone())
    source.experts = _FusedExperts(problem)
    spec = MoELayerSpec(
        moe_module_name="block",
        model_family="deepseek_v3",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=num_experts,
        top_k=problem.top_k,
        hidden_size=hidden,
        ffn_hidden_size=intermediate,
        score_func="sigmoid",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
        route_scale=SCALE,
    )
    config = AutoEPConfig(enabled=True, autoep_size=1, **options)
    layer = AutoEPMoELayer(spec, source, ep_size=1, ep_rank=0, config=config)
    # It makes its parameters in the default dtype on the default device.
    layer.to(device=problem.x_TD.device, dtype=problem.x_TD.dtype)
    # In bf16 the bias would choose other experts than the float32 reference does.
    layer.router.e_score_correction_bias = problem.bias_E.clone()
    return layer


PEERS: dict[str, Callable[[Problem], Implementation]] = {
    "deepspeed": _deepspeed("deepspeed", "AutoEP, ep 1, defaults"),
    "deepspeed-fused": _deepspeed(
        "deepspeed-fused",
        "AutoEP, ep 1, combine_impl fused_weighted_sum, gate_up_impl fused",
        combine_impl="fused_weighted_sum",
        gate_up_impl="fused",
    ),
    "transformers": _transformers,
    "liger": _liger,
    "sonicmoe": _sonicmoe,
    "moe-ops": _moe_ops,
    "torch-grouped-mm": _torch_grouped_mm,
}


def build(name: str, problem: Problem) -> Implementation | str:
    """Returns epctl's own block or a peer, or the reason why the peer cannot take part."""
    if name == "epctl":
        return epctl_block(problem)
    try:
        return PEERS[name](problem)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
