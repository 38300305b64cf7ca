"""Losses that keep routing balanced and logits small, and the capacity of an expert.

Pure functions of a router's own tensors. Shape suffixes: N sequences, S tokens of one, T tokens
(N*S), E experts, K top_k, C choices (T*K).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def sequence_balance_loss(scores_NSE: Tensor, experts_NSK: Tensor) -> Tensor:
    """Returns the complementary sequence-wise loss of DeepSeek-V3 (2412.19437, equations 17 to 20).

    For each sequence the sum over experts of (share of the choices * E) * (mean share of the
    score); the mean over sequences, a scalar in the dtype of the scores: 1 when balanced, E / K
    when every token picks the same K experts and gives the rest no score. Only the scores carry
    a gradient.

    Args:
        scores_NSE: positive scores (sigmoid or softmax), float32, before any correction bias.
        experts_NSK: global ids of the chosen experts, int64.
    """
    num_sequences, num_tokens, num_experts = scores_NSE.shape
    choices_NC = experts_NSK.reshape(num_sequences, -1)
    counts_NE = scores_NSE.new_zeros(num_sequences, num_experts).scatter_add_(
        1, choices_NC, torch.ones_like(choices_NC, dtype=scores_NSE.dtype)
    )
    frequency_NE = counts_NE * (num_experts / max(1, choices_NC.shape[1]))
    shares_NSE = scores_NSE / scores_NSE.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    mean_share_NE = shares_NSE.sum(dim=1) / max(1, num_tokens)
    return (frequency_NE * mean_share_NE).sum(dim=1).mean()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Returns the mean over tokens of the squared log-sum-exp (ST-MoE, 2202.08906, equation 5)."""
    return logits_TE.float().logsumexp(dim=-1).square().sum() / max(1, len(logits_TE))


def attach_loss(x: Tensor, loss: Tensor, weight: float) -> Tensor:
    """Returns `x` unchanged; in backward `loss` gets the gradient `weight`, whatever `x` gets.

    So a loss made deep inside a model joins the total without a way out of it, and under ZeRO-3
    the hooks that bring a layer's weights back fire as they do for `x`.
    """
    return cast(Tensor, _AttachLoss.apply(x, loss, weight))  # type: ignore[no-untyped-call]


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.like = weight, (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return gradients[0], torch.full((), ctx.weight, dtype=dtype, device=device), None


def drop_over_capacity(
    weights_TK: Tensor, experts_TK: Tensor, num_experts: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Keeps each expert's `capacity` choices of largest weight; drops the rest.

    A dropped choice has expert -1 and weight 0; the weights of the token's other choices stay as
    they are (GShard). Equal weights: the earlier token stays. No host synchronisation.
    """
    choices_C, scores_C = experts_TK.flatten(), weights_TK.detach().flatten()
    by_score_C = scores_C.argsort(descending=True, stable=True)
    order_C = by_score_C[choices_C[by_score_C].argsort(stable=True)]
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=choices_C.device)
    counts_E.scatter_add_(0, choices_C, torch.ones_like(choices_C))
    first_E = counts_E.cumsum(0) - counts_E
    place_C = torch.arange(len(choices_C), device=choices_C.device) - first_E[choices_C[order_C]]
    dropped_C = torch.empty_like(choices_C, dtype=torch.bool)
    dropped_C[order_C] = place_C >= capacity
    dropped_TK = dropped_C.view_as(experts_TK)
    return weights_TK.masked_fill(dropped_TK, 0.0), experts_TK.masked_fill(dropped_TK, -1)
