"""Keeps experts evenly used: bias updates without a loss, balance losses, expert capacity.

`set_up_balance` puts the settings where they act: losses on routers, limits on the experts'
dispatch. `LossFreeBalance` moves the correction biases once a step. Shape suffixes: L layers,
T tokens, E experts, K top_k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.config import RunConfig
from epctl.errors import ConfigError
from epctl.kernels.balance import (
    attach_loss,
    drop_over_capacity,
    router_z_loss,
    sequence_balance_loss,
)
from epctl.kernels.reference import ScoreFunction, scores_of
from epctl.runtime.moe import LocalExperts, Router
from epctl.runtime.recompute import recomputing

_Kind = TypeVar("_Kind", bound=nn.Module)


@dataclass
class RouterLosses:
    """The losses of one router; `total` sums their values over forwards, for the report.

    Args:
        num_sequences: sequences of a micro-batch, over which the balance loss is taken apart.
        weight: what the engine makes of a micro-batch's loss: one over the accumulation.
    """

    sequence: float
    z: float
    num_sequences: int
    weight: float
    total: Tensor | None = None
    num_forwards: int = 0

    def attach(
        self, weights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, score_func: str
    ) -> Tensor:
        """Returns the weights unchanged, with the losses hanging on their backward."""
        loss = logits_TE.new_zeros(())
        if self.sequence:
            # Scores of all experts, also where the rule scores only the chosen ones.
            of_all = cast(ScoreFunction, score_func.removeprefix("topk_"))
            scores_TE = scores_of(logits_TE, of_all)
            parts = self.num_sequences if len(scores_TE) % self.num_sequences == 0 else 1
            by_sequence = (parts, len(scores_TE) // parts, -1)
            balance = sequence_balance_loss(
                scores_TE.view(by_sequence), experts_TK.view(by_sequence)
            )
            loss = loss + self.sequence * balance
        if self.z:
            loss = loss + self.z * router_z_loss(logits_TE)
        if not recomputing():
            value = loss.detach()
            self.total = value if self.total is None else self.total + value
            self.num_forwards += 1
        return attach_loss(weights_TK, loss, self.weight)

    def take_mean(self) -> Tensor | None:
        """Returns the mean value since the last call, on the device; None if there was none."""
        total, count = self.total, self.num_forwards
        self.total, self.num_forwards = None, 0
        return None if total is None else total / max(1, count)


@dataclass
class DispatchLimits:
    """What bounds a layer's exchange; `num_dropped` counts choices since the last report."""

    capacity_factor: float | None
    max_rows: int | None
    num_dropped: Tensor | None = None

    def drop(
        self, weights_TK: Tensor, experts_TK: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor]:
        """Drops what is over an expert's share of this rank's choices times the factor."""
        if self.capacity_factor is None:
            return weights_TK, experts_TK
        capacity = math.ceil(self.capacity_factor * experts_TK.numel() / num_experts)
        weights_TK, kept_TK = drop_over_capacity(weights_TK, experts_TK, num_experts, capacity)
        if not recomputing():
            dropped = (kept_TK < 0).sum()
            self.num_dropped = dropped if self.num_dropped is None else self.num_dropped + dropped
        return weights_TK, kept_TK

    def take_dropped(self) -> Tensor | None:
        """Returns the choices dropped since the last call, on the device."""
        dropped, self.num_dropped = self.num_dropped, None
        return dropped


def routers_of(model: nn.Module) -> list[Any]:
    """Returns every router that counts its choices, in the order of the layers."""
    return [module for module in model.modules() if hasattr(module, "tokens_per_expert")]


def set_up_balance(model: nn.Module, config: RunConfig) -> LossFreeBalance | None:
    """Gives routers their losses and experts their limits; returns the updater of the biases.

    Raises ConfigError for a setting that this model's routers cannot follow.
    """
    moe = config.moe
    if moe.sequence_loss or moe.z_loss:
        for router in _modules(model, Router, "`moe.sequence_loss` and `moe.z_loss`"):
            router.losses = RouterLosses(
                moe.sequence_loss,
                moe.z_loss,
                config.train.micro_batch_size,
                1 / config.train.gradient_accumulation_steps,
            )
    if moe.capacity_factor is not None or moe.max_tokens_per_rank is not None:
        names = "`moe.capacity_factor` and `moe.max_tokens_per_rank`"
        for experts in _modules(model, LocalExperts, names):
            experts.limits = DispatchLimits(moe.capacity_factor, moe.max_tokens_per_rank)
    return LossFreeBalance(model, moe.bias_update_rate) if moe.bias_update_rate else None


def _modules(model: nn.Module, kind: type[_Kind], settings: str) -> list[_Kind]:
    modules = [module for module in model.modules() if isinstance(module, kind)]
    if not modules:
        raise ConfigError(
            f"{settings} need epctl's {kind.__name__}; this {type(model).__name__} has none",
            hint="leave them out with `--moe autoep` and for families that route by their own code",
        )
    return modules


class LossFreeBalance:
    """Auxiliary-loss-free balancing (2408.15664): the correction bias of an expert that got more
    tokens than the mean goes down by `rate`, of one that got fewer up, once an optimizer step.

    Counts are those of all ranks and micro-steps. Biases are float32 buffers outside of any
    gradient, so ZeRO neither cuts nor rounds them; every rank computes the same ones.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        owners = [(router, _bias_of(model, router)) for router in routers_of(model)]
        # By owner and name: the engine may put another tensor in a buffer's place.
        self.routers = [(router, *bias) for router, bias in owners if bias is not None]
        if not self.routers:
            raise ConfigError(
                f"`moe.bias_update_rate` is {rate}, and {type(model).__name__} has no correction "
                "bias to move",
                hint="`moe.sequence_loss` balances models without one",
            )
        self._seen_LE = self._counts()

    def _counts(self) -> Tensor:
        return torch.stack([router.tokens_per_expert for router, _, _ in self.routers])

    def forget_counts(self) -> None:
        """Call after the routers' counts were set to zero."""
        self._seen_LE = torch.zeros_like(self._seen_LE)

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves every bias. A collective; no host synchronisation."""
        counts_LE = self._counts()
        routed_LE = (counts_LE - self._seen_LE).double()
        self._seen_LE = counts_LE
        dist.all_reduce(routed_LE)
        direction_LE = (routed_LE.mean(dim=1, keepdim=True) - routed_LE).sign()
        for (_, owner, name), direction_E in zip(self.routers, direction_LE, strict=True):
            bias = owner.get_buffer(name)
            bias.add_(direction_E.to(bias.dtype).view_as(bias), alpha=self.rate)


def _bias_of(model: nn.Module, router: Any) -> tuple[nn.Module, str] | None:
    """Returns where the correction bias is: a float32 buffer of the router or of its block."""
    block = next(m for m in model.modules() if any(child is router for child in m.children()))
    for owner in (router, block):
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.dtype == torch.float32 and buffer.numel() == router.tokens_per_expert.numel():
                return owner, name
    return None
