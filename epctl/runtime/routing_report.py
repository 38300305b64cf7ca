"""How evenly a run's experts are used: counts on the device, read once a report.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.runtime.balance import routers_of
from epctl.runtime.moe import LocalExperts, Router


def routing_facts(engine: Any) -> dict[str, Any]:
    """Returns how evenly experts were used since the last report. A collective.

    `expert_load` is the largest max/mean over layers, `expert_loads` that of each layer; with
    capacity the share of dropped choices, with balance losses their value summed over layers.
    """
    routers = routers_of(engine.module)
    if not routers:
        return {"expert_load": float("nan")}
    counts = [cast(Tensor, router.tokens_per_expert).double() for router in routers]
    sizes = [len(count_E) for count_E in counts]
    extra = _balance_sums(engine.module, engine.device)
    sums = torch.cat([*counts, extra])
    dist.all_reduce(sums)
    for router in routers:
        router.tokens_per_expert.zero_()
    if engine.module.epctl_balance is not None:
        engine.module.epctl_balance.forget_counts()
    values = sums.tolist()
    layers = [values[sum(sizes[:n]) : sum(sizes[: n + 1])] for n in range(len(sizes))]
    loads = [max(layer) * len(layer) / max(sum(layer), 1e-9) for layer in layers]
    dropped, loss, has_dropped, has_loss = values[sum(sizes) :]
    facts: dict[str, Any] = {"expert_load": round(max(loads), 3)}
    facts["expert_loads"] = [round(load, 3) for load in loads]
    if has_dropped:
        facts["drop_rate"] = round(dropped / max(1.0, sum(map(sum, layers))), 6)
    if has_loss:
        facts["balance_loss"] = round(loss / dist.get_world_size(), 6)
    return facts


def _balance_sums(model: torch.nn.Module, device: torch.device) -> Tensor:
    """Returns (choices dropped, value of the losses, whether there are any) since last time."""
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for module in model.modules():
        if isinstance(module, LocalExperts) and module.limits is not None:
            dropped = module.limits.take_dropped()
            if dropped is not None:
                sums[0] += dropped
                sums[2] = 1
        elif isinstance(module, Router) and module.losses is not None:
            value = module.losses.take_mean()
            if value is not None:
                sums[1] += value
                sums[3] = 1
    return sums
