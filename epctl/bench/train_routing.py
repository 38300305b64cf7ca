"""Natural and balanced routing of any of the measured engines, by hooks, and how even it was.

Shape suffixes: T tokens, K top_k, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.runtime.deepspeed_seams import AutoEPMoELayer
from epctl.runtime.moe import ExpertParallelMoE, LocalExperts
from epctl.runtime.names import is_fused_experts


class RoutingControl:
    """Sees every layer's choice of experts; puts an even one in its place while `balanced`.

    The weights stay the router's, so the same gradients flow. Raises ValueError for a model whose
    choices are nowhere to be seen.
    """

    def __init__(self, model: nn.Module, num_experts: int, device: torch.device) -> None:
        self.num_experts, self.device = num_experts, device
        self.balanced = self.counting = False
        self._tables: dict[tuple[int, int], Tensor] = {}
        hooks = list(self._hooks(model))
        if not hooks:
            raise ValueError(f"no layer of {type(model).__name__} shows its choice of experts")
        self._counts_LE = torch.zeros(len(hooks), num_experts, dtype=torch.int64, device=device)

    def _hooks(self, model: nn.Module) -> Iterator[Any]:
        layer = 0
        for module in model.modules():
            if isinstance(module, AutoEPMoELayer) and not isinstance(module, ExpertParallelMoE):
                router: Any = module.router
                yield router.register_forward_hook(self._after_router(layer))
            elif isinstance(module, LocalExperts) or is_fused_experts(module):
                yield module.register_forward_pre_hook(self._before_experts(layer))
            else:
                continue
            layer += 1

    def _before_experts(self, layer: int) -> Any:
        """epctl's and transformers' experts are called with tokens, experts and weights."""

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            x_TD, experts_TK, weights_TK, *rest = inputs
            chosen_TK = self._chosen(layer, experts_TK)
            return (x_TD, chosen_TK, self._weights(weights_TK), *rest)

        return hook

    def _after_router(self, layer: int) -> Any:
        """AutoEP's router returns weights, experts and how many tokens each expert gets."""

        def hook(module: nn.Module, inputs: Any, output: tuple[Any, ...]) -> Any:
            weights_TK, experts_TK, counts_E, *rest = output
            chosen_TK = self._chosen(layer, experts_TK)
            if self.balanced:
                counts_E = self._count(chosen_TK).to(counts_E.dtype)
            return (self._weights(weights_TK), chosen_TK, counts_E, *rest)

        return hook

    def _chosen(self, layer: int, experts_TK: Tensor) -> Tensor:
        if self.balanced:
            experts_TK = self.even_table(*experts_TK.shape).to(experts_TK.dtype)
        if self.counting:
            self._counts_LE[layer] += self._count(experts_TK)
        return experts_TK

    def _weights(self, weights_TK: Tensor) -> Tensor:
        """Engines list a token's experts in orders of their own; an even table knows only one."""
        return weights_TK.sort(dim=-1, descending=True).values if self.balanced else weights_TK

    def _count(self, experts_TK: Tensor) -> Tensor:
        flat = experts_TK.detach().flatten().long()
        zeros_E = torch.zeros(self.num_experts, dtype=torch.int64, device=flat.device)
        return zeros_E.scatter_add_(0, flat, torch.ones_like(flat))

    def even_table(self, num_tokens: int, top_k: int) -> Tensor:
        """Returns [T, K] experts, every one as often as the others up to one turn of a shuffle."""
        key = (num_tokens, top_k)
        if key not in self._tables:
            self._tables[key] = even_table(num_tokens, top_k, self.num_experts).to(self.device)
        return self._tables[key]

    def imbalance(self) -> float:
        """Returns the fullest expert's tokens over the mean since the last call, mean of layers.

        A collective.
        """
        counts_LE = self._counts_LE.double()
        dist.all_reduce(counts_LE)
        self._counts_LE.zero_()
        ratio_L = counts_LE.max(dim=1).values / counts_LE.mean(dim=1).clamp_min(1e-9)
        return float(ratio_L.mean())


def even_table(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Returns [T, K] experts: a token takes the next K of a shuffled circle of all of them.

    The circle is shuffled anew whenever it closes at a token's end, so no token meets one twice.
    """
    period = num_experts // math.gcd(num_experts, top_k)
    generator = torch.Generator().manual_seed(num_tokens)
    turns = -(-num_tokens // period)
    order_NE = torch.rand(turns, num_experts, generator=generator).argsort(dim=1)
    place_PK = torch.arange(period * top_k).view(period, top_k) % num_experts
    table_TK = order_NE[:, place_PK].reshape(-1, top_k)
    return table_TK[:num_tokens].contiguous()
