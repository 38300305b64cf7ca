"""Puts model, optimizer and DeepSpeed together: everything between building and the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from epctl.config import OptimSection, RunConfig
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.mesh import Mesh
from epctl.runtime.muon_rule import MuonRule
from epctl.runtime.optimizer import MatrixOptimizer
from epctl.runtime.parameter_groups import parameter_groups, row_blocks
from epctl.runtime.schedule import rate_factor


def create_engine(
    model: nn.Module, config: RunConfig, deepspeed_config: dict[str, Any]
) -> tuple[Any, MatrixOptimizer, Any]:
    """Returns (engine, optimizer, scheduler), the optimizer wired to the engine's partitions."""
    import deepspeed

    optimizers: list[MatrixOptimizer] = []

    def make_optimizer(_: Any) -> MatrixOptimizer:
        # Called by the engine after DeepSpeed's own expert layers, if asked for, are in place.
        optimizers.append(create_optimizer(model, config.optim))
        return optimizers[-1]

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=deepspeed_config,
        dist_init_required=False,
    )
    optimizer = optimizers[-1]
    optimizer.wire(seams.flat_partitions(engine), engine.device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, config.train.steps, config.optim)
    )
    return engine, optimizer, scheduler


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


def count_state_bytes(engine: Any, optimizer: MatrixOptimizer) -> StateBytes:
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
    engine: Any, scheduler: Any, batches: list[torch.Tensor], config: RunConfig, mesh: Mesh
) -> tuple[float, float]:
    """Runs one optimizer step over its micro-batches; returns (mean loss, raw gradient norm)."""
    norm = float("nan")
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for ids_BS in batches:
        ids_BS = ids_BS.to(engine.device)
        loss = engine(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
        engine.backward(loss)
        if config.parallel.zero == 0 and engine.is_gradient_accumulation_boundary():
            norm = seams.clip_gradients_zero0(engine, mesh, config.optim.gradient_clipping)
        engine.step()
        total += loss.detach().double()
    scheduler.step()
    dist.all_reduce(total)
    mean = total / (len(batches) * dist.get_world_size())
    if config.parallel.zero > 0:
        norm = seams.gradient_norm(engine)
    return cast(float, mean.item()), norm
