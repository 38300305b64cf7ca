"""The unsharded side of `--check`: transformers' own model and blocks, whole, on one rank.

Nothing of epctl's expert layer, exchange or ZeRO wiring is in it, so what drops the route scale or
the correction bias there cannot drop it here too. The optimizer's arithmetic is shared; its ways
of cutting and exchanging are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.config import RunConfig
from epctl.runtime.build import build_model
from epctl.runtime.check_directions import STORED_DTYPE, stored_gradients
from epctl.runtime.check_record import StepRecord, part_of
from epctl.runtime.data_batch import Batch
from epctl.runtime.deepspeed_seams import FlatPartition, Fragment
from epctl.runtime.engine import create_optimizer
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe_blocks import moe_blocks, router_of
from epctl.runtime.names import hub_tensors
from epctl.runtime.schedule import rate_factor
from epctl.runtime.training_model import TrainingModel


@dataclass(frozen=True)
class Reference:
    """What the unsharded model did; `gradients` of the first step, before clipping."""

    steps: list[StepRecord]
    choices_LTK: Tensor | None
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run_reference(
    model: TrainingModel,
    config: RunConfig,
    steps: list[list[Batch]],
    device: torch.device,
    solo_group: dist.ProcessGroup,
    stored_dtype: torch.dtype = torch.float32,
    before_step: Callable[[nn.Module, int], None] = lambda module, number: None,
    gradient_dtype: torch.dtype = STORED_DTYPE,
) -> Reference:
    """Trains on the global batches of `steps` on this rank alone.

    Args:
        steps: the micro-batches of all ranks, in order, a list a step.
        solo_group: a process group that holds only this rank.
        stored_dtype: what forward and backward see the weights rounded to; masters and all
            arithmetic are float32. An update smaller than that rounding is not seen, as in an
            engine that keeps its weights so.
        before_step: told the model and the step's number.
        gradient_dtype: of the gradients that are returned.
    """
    whole = Mesh(0, 1, 1, 0)
    module = build_model(
        model.config,
        whole,
        model.weights,
        dtype=torch.float32,
        device=device,
        swap=False,
        trainable=config.train.parameters,
    )
    _round_to(module, stored_dtype)
    choices_LTK = _choices(module, steps[0], device)
    optimizer = create_optimizer(module, config.optim)
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer.wire([_whole_partition(p, solo_group) for p in trainable], device)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, config.train.steps, config.optim)
    )
    records, gradients = [], dict[str, Tensor]()
    for number, batches in enumerate(steps):
        before_step(module, number)
        loss = _backward(module, optimizer, batches, device, stored_dtype)
        gradients = gradients or stored_gradients(module, gradient_dtype)
        records.append(_update(module, optimizer, loss, config.optim.gradient_clipping))
        rates.step()
    weights = {t.name: t.local().detach().cpu().clone() for t in hub_tensors(module)}
    return Reference(records, choices_LTK, weights, gradients)


def _whole_partition(parameter: nn.Parameter, group: dist.ProcessGroup) -> FlatPartition:
    fragment = Fragment(parameter, 0, parameter.numel(), 0)
    return FlatPartition(parameter, group, 0, ((fragment,),))


def _backward(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    device: torch.device,
    stored_dtype: torch.dtype,
) -> float:
    """Leaves the gradient of the mean over all targets; returns that mean."""
    num_targets = max(1, sum(batch.num_targets for batch in batches))
    optimizer.zero_grad()
    rounds = stored_dtype != torch.float32
    masters = [p.detach().clone() for p in module.parameters()] if rounds else []
    _round_to(module, stored_dtype)
    loss = 0.0
    for batch in batches:
        inputs = batch.to(device).model_inputs()
        part = module(**inputs, num_items_in_batch=num_targets).loss
        part.backward()
        loss += float(part)
    with torch.no_grad():
        for parameter, master in zip(module.parameters(), masters, strict=rounds):
            parameter.copy_(master)
    return loss


def _update(
    module: nn.Module, optimizer: torch.optim.Optimizer, loss: float, clipping: float
) -> StepRecord:
    norm = _total(_norms(module))
    if 0 < clipping < norm:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(clipping / (norm + 1e-6))
    norms = _norms(module)
    optimizer.step()
    return StepRecord(loss, norm, norms)


@torch.no_grad()
def _round_to(module: nn.Module, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        return
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))


def _norms(module: nn.Module) -> dict[str, float]:
    """Returns the gradient norm of each part, trained ones only."""
    squares: dict[str, float] = {}
    for tensor in hub_tensors(module):
        if tensor.tensor.grad is not None:
            gradient = replace(tensor, tensor=tensor.tensor.grad).local()
            part = part_of(tensor.name)
            squares[part] = squares.get(part, 0.0) + float(gradient.double().square().sum())
    return {part: value**0.5 for part, value in squares.items()}


def _total(norms: dict[str, float]) -> float:
    return math.sqrt(sum(value**2 for value in norms.values()))


@torch.no_grad()
def _choices(module: nn.Module, batches: list[Batch], device: torch.device) -> Tensor | None:
    """Returns the experts that transformers' routers choose for every token, None without any."""
    blocks = [block for _, block in moe_blocks(module)]
    if not blocks:
        return None
    found: list[list[Tensor]] = [[] for _ in blocks]
    hooks = [
        router_of(block).register_forward_hook(
            lambda _m, _i, output, seen=seen: seen.append(_experts_in(output).cpu())
        )
        for block, seen in zip(blocks, found, strict=True)
    ]
    for batch in batches:
        module(**batch.to(device).model_inputs())
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(seen) for seen in found])


def _experts_in(outputs: tuple[Tensor, ...]) -> Tensor:
    """Returns what a router of transformers chose; Llama 4's says it by scores above zero."""
    chosen = next((output for output in outputs if not output.is_floating_point()), None)
    if chosen is not None:
        return chosen.reshape(-1, chosen.shape[-1])
    scores_TE = outputs[0]
    return scores_TE.topk(int((scores_TE > 0).sum(dim=1).max())).indices
