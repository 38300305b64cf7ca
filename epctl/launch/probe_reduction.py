"""Probes of gradients on their way to the optimizer: accumulation, offload, norms, groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from epctl.launch.probe import Finding, probe_of
from epctl.launch.probe_engine import (
    Dial,
    autoep_config,
    engine_config,
    engine_of,
    expert_parameters,
    sgd,
    step_with,
    tiny_moe,
    tokens,
    train_moe_step,
    whole_weight,
)


@probe_of("bf16_optimizer_last_micro_batch")
def bf16_optimizer(work: Path) -> Finding:
    """Two micro-steps, only the last with a gradient, which differs between the ranks."""
    config = engine_config(
        1,
        gradient_accumulation_steps=2,
        bf16={"enabled": True},
        data_types={"grad_accum_dtype": "fp32"},
    )
    last = torch.full((8, 8), 1.0 + dist.get_rank())
    with engine_of(Dial(), config, sgd) as engine:
        step_with(engine, [torch.zeros(8, 8), last])
        moved = -whole_weight(engine)
    # Each rank moves its own half, so a mean over both would hide what they do differently.
    low, high = float(moved.min()), float(moved.max())
    live = max(abs(low - 0.75), abs(high - 0.75)) > 1e-2
    return Finding(live, f"the weight moved by {low:.3f} to {high:.3f}, should by 0.750")


@probe_of("offload_drops_micro_batches")
def offload(work: Path) -> Finding:
    """Gradients 1, 2, 4 over three micro-steps at ZeRO-1 and 2 with optimizer offload."""
    moved = []
    for stage in (1, 2):
        offloaded = {"offload_optimizer": {"device": "cpu"}}
        config = engine_config(stage, gradient_accumulation_steps=3, zero_optimization=offloaded)
        with engine_of(Dial(), config, sgd) as engine:
            step_with(engine, [torch.full((8, 8), value) for value in (1.0, 2.0, 4.0)])
            moved.append(-float(whole_weight(engine).max()))
    live = any(abs(value - 7 / 3) > 1e-3 for value in moved)
    seen = ", ".join(f"{value:.3f}" for value in moved)
    return Finding(live, f"the weight moved by {seen} at ZeRO-1, 2, should by 2.333")


@probe_of("expert_norm_averaged_zero0")
def expert_norm(work: Path) -> Finding:
    """The norm that clipping divides by at ZeRO-0, float32, EP 2, seen from what it leaves."""
    bound = 1e-3
    with engine_of(tiny_moe(), autoep_config(0, 2, gradient_clipping=bound)) as engine:
        ids = tokens()
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        before = _gradient_norm(engine)
        engine.clip_fp32_gradients()
        used = bound * before / _gradient_norm(engine)
    live = abs(used - before) > 1e-3 * before
    return Finding(live, f"clips by a norm of {used:.4f}, the norm is {before:.4f}")


def _gradient_norm(engine: Any) -> float:
    """Returns the norm over dense gradients and the experts of both ranks, each once."""
    experts = {id(p) for p in expert_parameters(engine)}
    squares = torch.zeros(2, dtype=torch.float64)
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            squares[int(id(parameter) in experts)] += parameter.grad.double().square().sum()
    dist.all_reduce(squares[1:])
    return float(squares.sum().sqrt())


@probe_of("expert_state_unlinked")
def expert_state(work: Path) -> Finding:
    """Adam state of expert Parameters, asked for by fragment after a full step at ZeRO-1."""
    with engine_of(tiny_moe(), autoep_config(1, 2)) as engine:
        train_moe_step(engine)
        held = [getattr(p, "_hp_mapping", None) for p in expert_parameters(engine)]
        fragments = [mapping.optim_fragment for mapping in held if mapping is not None]
        linked = sum(bool(fragment) for fragment in fragments)
    return Finding(
        linked < len(fragments), f"{linked} of {len(fragments)} expert fragments have state"
    )


@probe_of("reduce_scatter_off_with_experts")
def reduce_scatter_with_experts(work: Path) -> Finding:
    """ZeRO-2 with experts and `reduce_scatter: false`."""
    config = autoep_config(2, 2, zero_optimization={"reduce_scatter": False})
    return _refusal(tiny_moe(), config)


def _refusal(model: Any, config: dict[str, Any]) -> Finding:
    """Live if the engine refuses to start with this config."""
    try:
        with engine_of(model, config):
            return Finding(False, "the engine starts")
    except (AssertionError, ValueError) as error:
        return Finding(True, f"{type(error).__name__}: {str(error)[:80]}")


@probe_of("zero0_bf16_step_in_constructor")
def constructor_step(work: Path) -> Finding:
    """Calls of `step()` before training, at ZeRO-0 in bfloat16."""
    with engine_of(Dial(), engine_config(0, bf16={"enabled": True}), sgd) as engine:
        count = engine.basic_optimizer.num_steps
    return Finding(count > 0, f"{count} optimizer steps before the first one asked for")


@probe_of("warmup_schedule_one_rate")
def warmup(work: Path) -> Finding:
    """Two groups at 0.02 and 1e-5 under a warm-up to its one `warmup_max_lr`."""
    from deepspeed.runtime.lr_schedules import WarmupLR

    groups = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": lr} for p, lr in zip(groups, (0.02, 1e-5), strict=True)]
    )
    scheduler = WarmupLR(optimizer, warmup_max_lr=1e-3, warmup_num_steps=2)
    for _ in range(4):
        scheduler.step()
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return Finding(rates[0] == rates[1], f"rates after warm-up {rates[0]:g} and {rates[1]:g}")


@probe_of("autosp_gather_cuts_gradient")
def autosp(work: Path) -> Finding:
    """The gradient of a layer in front of AutoSP's wrapped attention."""
    from deepspeed.sequence.autosp_vit import UlyssesSPViTAttention

    torch.manual_seed(0)
    upstream, attention = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    wrapped = UlyssesSPViTAttention(attention, dist.group.WORLD, has_cls_token=False)
    wrapped(upstream(torch.ones(1, 3, 4))).square().sum().backward()
    gradient = upstream.weight.grad
    live = gradient is None or not bool(gradient.any())
    return Finding(live, "no gradient reaches the layer before" if live else "gradient arrives")


@probe_of("library_versions_differ")
def versions(work: Path) -> Finding:
    """The versions that each rank imports."""
    from epctl.runtime.versions import differing_versions

    differing = differing_versions()
    return Finding(bool(differing), "; ".join(differing) or f"{dist.get_world_size()} ranks agree")


@probe_of("default_clipping")
def default_clipping(work: Path) -> Finding:
    """What the engine clips at when the config does not say."""
    config = deepspeed.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1})
    bound = float(config.gradient_clipping)
    return Finding(bound != 0.0, f"an absent `gradient_clipping` means {bound}")
