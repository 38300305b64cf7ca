"""Puts model, optimizer and DeepSpeed together: everything between building and the first step."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from epctl.config import OptimSection, RunConfig
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.attention_logits import AttentionLogits
from epctl.runtime.balance import set_up_balance
from epctl.runtime.chunked_loss import limit_logits
from epctl.runtime.data_batch import Batch
from epctl.runtime.deepspeed_gradients import shorten_gradients
from epctl.runtime.deepspeed_offload import complete_offloaded
from epctl.runtime.deepspeed_step import weights_written_by_optimizer
from epctl.runtime.deepspeed_whole import show_whole
from epctl.runtime.guards import StepGuard
from epctl.runtime.mesh import Mesh
from epctl.runtime.muon_rule import MuonRule
from epctl.runtime.native_config import is_visual
from epctl.runtime.optimizer import MatrixOptimizer
from epctl.runtime.parameter_groups import parameter_groups, row_blocks
from epctl.runtime.qk_clip import clip_factors
from epctl.runtime.ranges import annotate
from epctl.runtime.schedule import rate_factor
from epctl.runtime.sequence.group import create_sequence_group
from epctl.runtime.sequence.parallel import parallelize


def create_engine(
    model: nn.Module, config: RunConfig, deepspeed_config: dict[str, Any]
) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Returns (engine, optimizer, scheduler), the optimizer wired to the engine's partitions."""
    import deepspeed

    model.epctl_balance = set_up_balance(model, config)  # type: ignore[assignment]
    reason = limit_logits(model, int(config.train.logits_mib * 2**20))
    if reason is not None:
        warnings.warn(f"`train.logits_mib` is ignored: {reason}", stacklevel=2)
    visual = is_visual(getattr(model, "config", None))
    if config.parallel.share_images and not visual:
        reason = "this model is not trained on images"
        warnings.warn(f"`parallel.share_images` is ignored: {reason}", stacklevel=2)
    if config.parallel.sp > 1 or visual:
        # Of images every rank must run the tower whatever its batch holds, also by itself.
        share = config.parallel.share_images and visual
        everyone = create_sequence_group(dist.get_world_size()) if share else None
        parallelize(model, create_sequence_group(config.parallel.sp), vision_group=everyone)
    if config.optim.name == "deepspeed-muon":
        return _create_deepspeed_muon(model, config, deepspeed_config)
    optimizers: list[MatrixOptimizer] = []

    def make_optimizer(_: Any) -> MatrixOptimizer:
        # Called by the engine after DeepSpeed's own expert layers, if asked for, are in place.
        optimizers.append(create_optimizer(model, config.optim))
        return optimizers[-1]

    seams.gather_by_layer(model, config.parallel.zero)
    experts = [p for p in model.parameters() if seams.is_expert_parameter(p)]
    frozen = bool(experts) and not any(p.requires_grad for p in experts)
    with seams.frozen_experts() if frozen else contextlib.nullcontext():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=deepspeed_config,
            dist_init_required=False,
        )
    optimizer = optimizers[-1]
    complete_offloaded(engine)
    show_whole(engine)
    copies = weights_written_by_optimizer(engine)
    shorten_gradients(engine, optimizer.divide_gradients_by, takes_any_dtype=bool(copies))
    optimizer.wire(seams.flat_partitions(engine), engine.device, copies)
    interval = 1 if config.optim.qk_clip is not None else config.optim.attention_logit_interval
    if interval:
        optimizer.attention_logits = AttentionLogits(engine.module, interval)
    return engine, optimizer, _scheduler(optimizer, config)


def _scheduler(optimizer: torch.optim.Optimizer, config: RunConfig) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, config.train.steps, config.optim)
    )


def _create_deepspeed_muon(
    model: nn.Module, config: RunConfig, deepspeed_config: dict[str, Any]
) -> tuple[Any, torch.optim.Optimizer, Any]:
    """The engine's own Muon, for comparison; its config names the optimizer."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=deepspeed_config,
        dist_init_required=False,
    )
    optimizer = seams.client_optimizer(engine)
    return engine, optimizer, _scheduler(optimizer, config)


def create_optimizer(model: nn.Module, optim: OptimSection) -> MatrixOptimizer:
    """Returns the client optimizer over the model's own parameters, not yet wired."""
    return MatrixOptimizer(
        parameter_groups(model, optim),
        rule=muon_rule(optim),
        row_blocks=row_blocks(model, optim),
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )


def muon_rule(optim: OptimSection) -> MuonRule:
    """Returns the Muon update that the settings ask for."""
    return MuonRule(
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        momentum_dtype=getattr(torch, optim.momentum_dtype),
        scale=optim.update_scale,
        num_steps=optim.newton_schulz_steps,
        coefficients=optim.coefficients,
        method=optim.newton_schulz,
        kernels=optim.kernels,
    )


@dataclass(frozen=True)
class StateBytes:
    """Bytes this rank holds between steps, counted from the live tensors."""

    parameters: int
    masters: int
    optimizer_state: int

    @property
    def total(self) -> int:
        return self.parameters + self.masters + self.optimizer_state


def count_state_bytes(engine: Any, optimizer: torch.optim.Optimizer) -> StateBytes:
    """Counts parameter, master and optimizer-state bytes of this rank."""
    parameters = sum(_held(p) * p.element_size() for p in engine.module.parameters())
    flats = [partition.flat for partition in seams.flat_partitions(engine)]
    held = {id(p) for p in engine.module.parameters()}
    masters = sum(flat.nbytes for flat in flats if id(flat) not in held)
    state = sum(
        value.nbytes
        for flat in flats
        for value in optimizer.state[flat].values()
        if isinstance(value, torch.Tensor)
    )
    return StateBytes(parameters, masters, state)


def _held(parameter: nn.Parameter) -> int:
    partition = getattr(parameter, "ds_tensor", None)
    return int(partition.numel()) if partition is not None else parameter.numel()


def train_step(
    engine: Any,
    scheduler: Any,
    batches: Sequence[Batch | torch.Tensor],
    config: RunConfig,
    mesh: Mesh,
    guard: StepGuard | None = None,
    enter: Callable[[str], None] = lambda phase: None,
) -> tuple[float, float]:
    """Runs one optimizer step over its micro-batches; returns (mean loss, raw gradient norm).

    The loss is the mean over the targets of all ranks and micro-steps together, so a batch with
    few targets does not weigh as much as a full one.

    Args:
        guard: asked before the update; may have it left out, or raise GateError on every rank.
        enter: told what the rank is about to do.
    """
    micro_batches = [_as_batch(batch) for batch in batches]
    num_micro_batches = len(batches) * dist.get_world_size()
    # Ranks of one sequence group hold the same batch: each counts its share.
    own = sum(b.num_targets for b in micro_batches) / mesh.sp_size
    targets = torch.tensor(own, device=engine.device)
    enter("count of targets")  # whoever is behind must not stand where the others wait
    dist.all_reduce(targets)
    # The engine averages over ranks and micro-steps; a sum over this makes that the mean.
    targets_per_micro_batch = targets.clamp_min(1) / num_micro_batches
    norm = float("nan")
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(micro_batches):
        enter(f"forward {number + 1}")
        inputs = batch.to(engine.device).model_inputs()
        result = engine(**inputs, num_items_in_batch=targets_per_micro_batch)
        enter(f"backward {number + 1}")
        engine.backward(result.loss)
        total += result.loss.detach().double()
        del result  # or its logits would live through the next forward
        if config.parallel.zero == 0 and engine.is_gradient_accumulation_boundary():
            # DeepSpeed's own Muon runs unclipped at every stage: ds_config.py.
            own = config.optim.name != "deepspeed-muon"
            bound = config.optim.gradient_clipping if own else 0.0
            norm = seams.clip_gradients_zero0(engine, mesh, bound)
        if engine.is_gradient_accumulation_boundary():
            enter("optimizer step")
            skips = guard is not None and guard.before_update(total, num_micro_batches)
            _before_optimizer_step(engine, config, norm, skips=skips)
        with annotate("optimizer"):
            engine.step()
    scheduler.step()
    if engine.module.epctl_balance is not None:
        engine.module.epctl_balance.after_step()
    dist.all_reduce(total)
    if config.parallel.zero > 0:
        norm = seams.gradient_norm(engine)
    return cast(float, (total / num_micro_batches).item()), norm


def _as_batch(batch: Batch | torch.Tensor) -> Batch:
    return Batch.of_ids(batch) if isinstance(batch, torch.Tensor) else batch


def _before_optimizer_step(engine: Any, config: RunConfig, norm: float, *, skips: bool) -> None:
    """Tells epctl's optimizer what it must know of this step; `norm` is meant at ZeRO-0 only.

    A norm that is not finite leaves the update out; DeepSpeed does so itself at other stages.
    """
    optimizer = seams.client_optimizer(engine)
    if not isinstance(optimizer, MatrixOptimizer):
        return
    overflow = config.parallel.zero == 0 and not math.isfinite(norm)
    optimizer.skip_steps(skips or overflow)
    if optimizer.attention_logits is None:
        return
    report, bound = optimizer.attention_logits.collect(), config.optim.qk_clip
    if report is not None and bound is not None:
        maxima = optimizer.attention_logits.latest
        optimizer.scale_rows_after_step(clip_factors(engine.module, maxima, bound))
