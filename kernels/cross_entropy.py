"""Cross-entropy of a large vocabulary, a block of logits at a time.

Shape suffixes: T tokens, D hidden size, V vocabulary, C columns of one block (a slice of V).

Blocks are cut along the vocabulary, not along the tokens: a row of the weight gradient is then
made whole by one product, and nothing is summed in half precision over blocks. Logits are made
again in backward; between the two, one float32 number a token is kept. What is done to a block of
logits beside products is one Triton kernel each way where there is a GPU: by torch it is seven
passes over float32 copies.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from epctl.kernels.dispatch import choose_implementation

IGNORED = -100


def chunked_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, num_columns: int, scale: float = 1.0
) -> Tensor:
    """Returns the sum of `-log softmax(scale * x @ weight^T)[label]`, a float32 scalar.

    Args:
        x_TD: hidden states in the dtype of the weight; products are made in it, the rest in
            float32 (as `F.cross_entropy(logits.float())` of transformers).
        labels_T: int64, `IGNORED` (-100) where a token has no target.
        num_columns: vocabulary entries of one block; see `columns_within`.
        scale: of the logits (Granite divides them).

    Gradients flow to `x_TD` and `weight_VD`.
    """
    total = _ChunkedCrossEntropy.apply(x_TD, weight_VD, labels_T, num_columns, scale)  # type: ignore[no-untyped-call]
    return cast(Tensor, total)


def columns_within(num_bytes: int, x_TD: Tensor) -> int:
    """Returns how many vocabulary entries a block may have for its logits to take `num_bytes`.

    Where the kernels run they exist in the dtype of `x_TD` alone, elsewhere in float32.
    """
    each = x_TD.element_size() if _runs_triton(x_TD) else 4
    return max(1, num_bytes // (each * max(1, len(x_TD))))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_columns: int, scale: float
    ) -> Tensor:
        lse_T = x_TD.new_full((len(x_TD),), -torch.inf, dtype=torch.float32)
        target_T = torch.zeros_like(lse_T)
        add_statistics = _operations(x_TD).add_statistics_
        for first in range(0, weight_VD.shape[0], num_columns):
            logits_TC = x_TD @ weight_VD[first : first + num_columns].t()
            add_statistics(logits_TC, labels_T, first, scale, lse_T, target_T)
        ctx.save_for_backward(x_TD, weight_VD, labels_T, lse_T)
        ctx.num_columns, ctx.scale = num_columns, scale
        return torch.where(labels_T != IGNORED, lse_T - target_T, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_VD, labels_T, lse_T = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        x_gradient_TD = torch.zeros_like(x_TD, dtype=torch.float32) if needs_x else None
        weight_gradient_VD = torch.empty_like(weight_VD) if needs_weight else None
        factor_T = gradients[0].float() * ctx.scale * (labels_T != IGNORED)
        to_gradient = _operations(x_TD).to_gradient_
        for first in range(0, weight_VD.shape[0], ctx.num_columns):
            block_CD = weight_VD[first : first + ctx.num_columns]
            logits_TC = x_TD @ block_CD.t()
            d_logits_TC = to_gradient(logits_TC, labels_T, first, ctx.scale, lse_T, factor_T)
            if x_gradient_TD is not None:
                x_gradient_TD += d_logits_TC @ block_CD
            if weight_gradient_VD is not None:
                torch.mm(
                    d_logits_TC.t(), x_TD, out=weight_gradient_VD[first : first + len(block_CD)]
                )
        x_gradient = None if x_gradient_TD is None else x_gradient_TD.to(x_TD.dtype)
        return x_gradient, weight_gradient_VD, None, None, None


def add_statistics_(
    logits_TC: Tensor, labels_T: Tensor, first: int, scale: float, lse_T: Tensor, target_T: Tensor
) -> None:
    """Goes on with each token's log-sum-exp over a block, and takes the logit of its label.

    Args:
        logits_TC: a block that begins at vocabulary entry `first`; contiguous.
        lse_T: float32, of the blocks before (-inf before the first); changed in place.
        target_T: float32; changed in place where the label is in this block.
    """
    logits_TC = logits_TC.float() if scale == 1.0 else logits_TC.float() * scale
    torch.logaddexp(lse_T, logits_TC.logsumexp(dim=1), out=lse_T)
    inside_T, column_T = _columns_of_targets(labels_T, first, logits_TC.shape[1])
    found_T = logits_TC.gather(1, column_T.unsqueeze(1)).squeeze(1)
    target_T.copy_(torch.where(inside_T, found_T, target_T))


def to_gradient_(
    logits_TC: Tensor, labels_T: Tensor, first: int, scale: float, lse_T: Tensor, factor_T: Tensor
) -> Tensor:
    """Returns the gradient of a block of logits in their dtype; the block may be overwritten.

    Args:
        factor_T: float32, of each token's softmax minus its label.
    """
    wide_TC = logits_TC.float() if scale == 1.0 else logits_TC.float() * scale
    wide_TC = wide_TC.sub_(lse_T.unsqueeze(1)).exp_()
    inside_T, column_T = _columns_of_targets(labels_T, first, wide_TC.shape[1])
    one_T1 = inside_T.to(wide_TC.dtype).unsqueeze(1)
    wide_TC.scatter_add_(1, column_T.unsqueeze(1), -one_T1)
    return wide_TC.mul_(factor_T.unsqueeze(1)).to(logits_TC.dtype)


def _columns_of_targets(labels_T: Tensor, first: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Returns (whether the label is in the block, its column there or 0)."""
    column_T = labels_T - first
    inside_T = (column_T >= 0) & (column_T < num_columns)
    return inside_T, column_T.masked_fill(~inside_T, 0)


def _runs_triton(x_TD: Tensor) -> bool:
    return choose_implementation(x_TD.device, x_TD.dtype).implementation == "triton"


def _operations(x_TD: Tensor) -> ModuleType:
    """Returns where a block's two operations are: Triton's module, or this one."""
    if _runs_triton(x_TD):
        from epctl.kernels import cross_entropy_triton  # late: Triton takes a second to load

        return cross_entropy_triton
    return sys.modules[__name__]
