"""Cross-entropy of a large vocabulary, a block of logits at a time.

Shape suffixes: T tokens, D hidden size, V vocabulary, C columns of one block (a slice of V).

Blocks are cut along the vocabulary, not along the tokens: a row of the weight gradient is then
made whole by one product, and nothing is summed in half precision over blocks. Logits are made
again in backward; between the two, one float32 number a token is kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

IGNORED = -100


def chunked_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, num_columns: int, scale: float = 1.0
) -> Tensor:
    """Returns the sum of `-log softmax(scale * x @ weight^T)[label]`, a float32 scalar.

    Args:
        x_TD: hidden states in the dtype of the weight; products are made in it, the rest in
            float32 (as `F.cross_entropy(logits.float())` of transformers).
        labels_T: int64, `IGNORED` (-100) where a token has no target.
        num_columns: vocabulary entries of one block; T * num_columns float32 logits exist.
        scale: of the logits (Granite divides them).

    Gradients flow to `x_TD` and `weight_VD`.
    """
    total = _ChunkedCrossEntropy.apply(x_TD, weight_VD, labels_T, num_columns, scale)  # type: ignore[no-untyped-call]
    return cast(Tensor, total)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_columns: int, scale: float
    ) -> Tensor:
        lse_T, target_T = _statistics(x_TD, weight_VD, labels_T, num_columns, scale)
        ctx.save_for_backward(x_TD, weight_VD, labels_T, lse_T)
        ctx.num_columns, ctx.scale = num_columns, scale
        return torch.where(labels_T != IGNORED, lse_T - target_T, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_VD, labels_T, lse_T = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        x_gradient_TD = torch.zeros_like(x_TD, dtype=torch.float32) if needs_x else None
        weight_gradient_VD = torch.empty_like(weight_VD) if needs_weight else None
        scale_T = gradients[0].float() * ctx.scale * (labels_T != IGNORED)
        for first in range(0, weight_VD.shape[0], ctx.num_columns):
            block_CD = weight_VD[first : first + ctx.num_columns]
            logits_TC = _logits(x_TD, block_CD, ctx.scale)
            d_logits_TC = logits_TC.sub_(lse_T.unsqueeze(1)).exp_()
            _subtract_one_at_targets(d_logits_TC, labels_T, first)
            d_logits_TC = d_logits_TC.mul_(scale_T.unsqueeze(1)).to(x_TD.dtype)
            if x_gradient_TD is not None:
                x_gradient_TD += d_logits_TC @ block_CD
            if weight_gradient_VD is not None:
                torch.mm(
                    d_logits_TC.t(), x_TD, out=weight_gradient_VD[first : first + len(block_CD)]
                )
        x_gradient = None if x_gradient_TD is None else x_gradient_TD.to(x_TD.dtype)
        return x_gradient, weight_gradient_VD, None, None, None


def _statistics(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_columns: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns (log-sum-exp, logit of the label) of every token in float32."""
    lse_T = x_TD.new_full((len(x_TD),), -torch.inf, dtype=torch.float32)
    target_T = torch.zeros_like(lse_T)
    for first in range(0, weight_VD.shape[0], num_columns):
        logits_TC = _logits(x_TD, weight_VD[first : first + num_columns], scale)
        lse_T = torch.logaddexp(lse_T, logits_TC.logsumexp(dim=1))
        inside_T, column_T = _columns_of_targets(labels_T, first, logits_TC.shape[1])
        found_T = logits_TC.gather(1, column_T.unsqueeze(1)).squeeze(1)
        target_T = torch.where(inside_T, found_T, target_T)
    return lse_T, target_T


def _logits(x_TD: Tensor, block_CD: Tensor, scale: float) -> Tensor:
    logits_TC = (x_TD @ block_CD.t()).float()
    return logits_TC if scale == 1.0 else logits_TC * scale


def _columns_of_targets(labels_T: Tensor, first: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Returns (whether the label is in the block, its column there or 0)."""
    column_T = labels_T - first
    inside_T = (column_T >= 0) & (column_T < num_columns)
    return inside_T, column_T.masked_fill(~inside_T, 0)


def _subtract_one_at_targets(probabilities_TC: Tensor, labels_T: Tensor, first: int) -> None:
    inside_T, column_T = _columns_of_targets(labels_T, first, probabilities_TC.shape[1])
    one_T1 = inside_T.to(probabilities_TC.dtype).unsqueeze(1)
    probabilities_TC.scatter_add_(1, column_T.unsqueeze(1), -one_T1)
