"""What a run tells about itself: the plan counted from the live model, memory, expert load."""

from __future__ import annotations

import resource
from typing import Any

import torch
import torch.distributed as dist

from epctl.config import RunConfig
from epctl.runtime.engine import count_state_bytes
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import hub_tensors
from epctl.runtime.parameter_groups import count_split
from epctl.runtime.training_model import TrainingModel


def plan_of(
    config: RunConfig,
    mesh: Mesh,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    model: TrainingModel,
) -> dict[str, Any]:
    """Returns what is about to run, counted from the live model."""
    split = count_split(engine.module, config.optim, mesh.ep_size)
    state = count_state_bytes(engine, optimizer)
    sizes = _count_parameters(engine.module)
    total = sizes["dense"] + sizes["expert"] * mesh.ep_size
    moe = model.moe
    return {
        "model": model.name,
        "revision": model.revision,
        "architecture": type(engine.module).__name__,
        "num_layers": model.num_layers,
        "num_experts": moe.num_experts if moe else 0,
        "top_k": moe.top_k if moe else 0,
        "route_scale": moe.router.scale if moe else None,
        "num_parameters": total,
        "num_parameters_rank": sizes["dense"] + sizes["expert"],
        "num_expert_parameters_rank": sizes["expert"],
        "num_local_experts": mesh.num_local_experts(moe.num_experts) if moe else 0,
        "num_muon": split.num_muon,
        "num_muon_matrices": split.num_muon_matrices,
        "num_owned_matrices": getattr(optimizer, "num_owned_matrices", 0),
        "num_sent_bytes": getattr(optimizer, "num_sent_bytes", 0),
        "num_adamw": split.num_adamw,
        "num_frozen": total - split.num_muon - split.num_adamw,
        "trained": config.train.parameters,
        "num_ranks": mesh.num_ranks,
        "ep": mesh.ep_size,
        "edp": mesh.edp_size,
        "sp": mesh.sp_size,
        "zero": config.parallel.zero,
        "device": engine.device.type,
        "backend": dist.get_backend(),
        "dtype": str(next(engine.module.parameters()).dtype).removeprefix("torch."),
        "bytes_parameters": state.parameters,
        "bytes_masters": state.masters,
        "bytes_optimizer_state": state.optimizer_state,
        "steps": config.train.steps,
    }


def _count_parameters(module: torch.nn.Module) -> dict[str, int]:
    sizes = {"expert": 0, "dense": 0, "buffer": 0}
    for tensor in hub_tensors(module):
        is_buffer = not isinstance(tensor.tensor, torch.nn.Parameter)
        kind = "buffer" if is_buffer else "expert" if tensor.is_expert else "dense"
        sizes[kind] += tensor.num_elements
    return sizes


def attention_facts(optimizer: Any) -> dict[str, Any]:
    """Returns the largest attention logit last measured and where, if the run measures any."""
    measured = getattr(optimizer, "attention_logits", None)
    report = measured.latest_report if measured is not None else None
    if report is None:
        return {}
    return {
        "attention_logit": round(report.largest, 4),
        "attention_logit_layer": report.layer,
        "attention_logit_head": report.head,
    }


def peak_memory(device: torch.device) -> int:
    """Returns this rank's peak bytes: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def max_over_ranks(value: int, device: torch.device) -> int:
    """Returns the highest of all ranks' values. A collective."""
    highest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest)
