"""Gradients as DeepSpeed's engine forms them, with epctl's experts where a case asks for them.

One step of plain SGD at a huge rate: the weights then *are* the averaged gradient, whatever the
ZeRO stage holds where.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe import ExpertParallelMoE, expert_parallel
from epctl.runtime.moe_rules import ExpertShape

RATE = 2.0**20


def swap_experts(model: nn.Module, mesh: Mesh) -> None:
    """Puts epctl's experts, this rank's share, into every block with fused transformers experts."""
    for name, block in list(model.named_modules()):
        experts = getattr(block, "experts", None)
        if hasattr(experts, "gate_up_proj"):
            model.set_submodule(name, _swapped(block, mesh))


def _swapped(block: Any, mesh: Mesh) -> ExpertParallelMoE:
    gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    num_experts, twice, hidden = gate_up.shape
    shape = ExpertShape(num_experts, hidden, twice // 2)
    layer = expert_parallel(block, "gate", block.gate, shape, mesh, gate_up.dtype)
    own = slice(layer.local_experts.start, layer.local_experts.stop)
    gate, up = gate_up[own].chunk(2, dim=1)
    with torch.no_grad():
        for parameter, value in (
            (layer.experts.w1, gate),
            (layer.experts.w3, up),
            (layer.experts.w2, down[own]),
        ):
            assert parameter is not None
            parameter.copy_(value)
    return layer


def expected_here(expected: dict[str, Tensor | None], mesh: Mesh) -> dict[str, Tensor | None]:
    """The reference gradients under the names and slices that this rank's experts have."""
    result: dict[str, Tensor | None] = {}
    for name, gradient in expected.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            result[name] = gradient
            continue
        assert gradient is not None
        local = mesh.local_experts(len(gradient))
        own = gradient[local.start : local.stop]
        if leaf == "gate_up_proj":
            result[f"{prefix}.w1"], result[f"{prefix}.w3"] = own.chunk(2, dim=1)
        else:
            result[f"{prefix}.w2"] = own
    return result


def create(model: nn.Module, zero: int, mesh: Mesh) -> Any:
    """The engine over SGD; at ZeRO-3 experts are partitioned over their own group."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": 2**20,
            "allgather_bucket_size": 2**20,
            "stage3_param_persistence_threshold": 100,
        },
        "steps_per_print": 2**31,
    }
    if zero == 3:
        for module in model.modules():
            if isinstance(module, ExpertParallelMoE):
                seams.partition_module(module.experts, mesh.edp_group, config)
        seams.partition_module(model, None, config)
    groups = [{"params": list(model.parameters()), "name": "all"}]
    optimizer = torch.optim.SGD(seams.split_expert_groups(groups), lr=RATE)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    with seams.full_parameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def step(engine: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One forward, backward and step; returns this rank's loss and the gradients of the engine."""
    before = whole_weights(engine.module)
    loss = engine(**inputs).loss
    engine.backward(loss)
    engine.step()
    after = whole_weights(engine.module)
    return loss.detach(), {name: (before[name] - after[name]) / RATE for name in before}
