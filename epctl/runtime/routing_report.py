"""How evenly a run's experts are used: counts on the device, read once a report.

Shape suffix: E experts. What is reduced has the same length on every rank whatever came to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.runtime.balance import routers_of
from epctl.runtime.moe import LocalExperts, Router


@dataclass(frozen=True)
class Routing:
    """What all ranks routed since the last report.

    Attributes:
        facts: `expert_load` is the largest max/mean over layers, `expert_loads` that of each
            layer; with capacity `drop_rate` is the share of dropped choices and `drop_rates` that
            of each layer; with balance losses `balance_loss` is their value summed over layers.
        choices: of every layer those that each of its experts was given, dropped ones too.
    """

    facts: dict[str, Any]
    choices: list[list[int]] = field(default_factory=list)


def take_routing(engine: Any) -> Routing:
    """Returns how evenly experts were used since the last report. A collective."""
    model, device = engine.module, engine.device
    routers = routers_of(model)
    if not routers:
        return Routing({"expert_load": float("nan")})
    counts_E = [cast(Tensor, router.tokens_per_expert).double() for router in routers]
    dropped, losses = _dropped(model), _losses(model)
    more = [value.to(device, torch.float64).view(1) for value in (*dropped, *losses)]
    sums = torch.cat([*counts_E, *more])
    dist.all_reduce(sums)
    for router in routers:
        router.tokens_per_expert.zero_()
    if model.epctl_balance is not None:
        model.epctl_balance.forget_counts()
    sizes = [*map(len, counts_E), len(dropped), len(losses)]
    parts = torch.split(sums.cpu(), sizes)  # one wait for the device, not one a layer
    *layers, all_dropped, all_losses = (part.tolist() for part in parts)
    choices = [list(map(int, layer)) for layer in layers]
    return Routing(_facts(layers, all_dropped, all_losses), choices)


def _facts(layers: list[list[float]], dropped: list[float], losses: list[float]) -> dict[str, Any]:
    loads = [max(layer) * len(layer) / max(sum(layer), 1e-9) for layer in layers]
    facts: dict[str, Any] = {"expert_load": round(max(loads), 3)}
    facts["expert_loads"] = [round(load, 3) for load in loads]
    if dropped:
        chosen = [max(1.0, sum(layer)) for layer in layers]
        facts["drop_rate"] = round(sum(dropped) / sum(chosen), 6)
        shares = zip(dropped, chosen, strict=True)
        facts["drop_rates"] = [round(number / count, 6) for number, count in shares]
    if losses:
        facts["balance_loss"] = round(sum(losses) / dist.get_world_size(), 6)
    return facts


def _dropped(model: nn.Module) -> list[Tensor]:
    """Returns the choices dropped since last time by layer; none where there is no capacity."""
    limits = [m.limits for m in model.modules() if isinstance(m, LocalExperts)]
    bounded = [limit for limit in limits if limit is not None and limit.capacity_factor is not None]
    return [_or_zero(limit.take_dropped()) for limit in bounded]


def _losses(model: nn.Module) -> list[Tensor]:
    """Returns the value of the balance losses since last time by layer; none without any."""
    losses = [m.losses for m in model.modules() if isinstance(m, Router)]
    return [_or_zero(loss.take_mean()) for loss in losses if loss is not None]


def _or_zero(taken: Tensor | None) -> Tensor:
    """A layer that met no token since last time keeps its place."""
    return torch.zeros(()) if taken is None else taken
