"""Cross-entropy of a large vocabulary, a block of logits at a time, made once.

Shape suffixes: T tokens, D hidden size, V vocabulary, R tokens of one block (a slice of T).

Blocks are cut along the tokens: a token's whole row of logits is there at once, so its gradient is
made in forward, from the same logits, and a step needs three products of the head and not four. The
gradient of the weight is added up over blocks in float32 and rounded once, in backward. What is
done to a block of logits beside products is one Triton kernel each for statistics and gradient
where there is a GPU: by torch it is seven passes over float32 copies.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epctl.kernels.dispatch import choose_implementation

IGNORED = -100


def chunked_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    num_rows: int,
    scale: float = 1.0,
    divisor: Tensor | float = 1.0,
) -> Tensor:
    """Returns the sum of `-log softmax(scale * x @ weight^T)[label]` over `divisor`, in float32.

    Args:
        x_TD: hidden states in the dtype of the weight; products are made in it, the rest in
            float32 (as `F.cross_entropy(logits.float())` of transformers).
        labels_T: int64, `IGNORED` (-100) where a token has no target.
        num_rows: tokens of one block; see `rows_within`.
        scale: of the logits (Granite divides them).
        divisor: of the sum, one element; divided by here, gradients are rounded at their own size.

    Gradients flow to `x_TD` and `weight_VD`; they are made here, and multiplied by that of the
    result in backward, which may run once. So in float16 a loss scale comes too late for them:
    give `divisor` what it was to make up for.
    """
    trains = torch.is_grad_enabled()  # never so in a Function's forward
    inputs = x_TD, weight_VD, labels_T, num_rows, scale, divisor, trains
    return cast(Tensor, _ChunkedCrossEntropy.apply(*inputs))  # type: ignore[no-untyped-call]


def rows_within(num_bytes: int, x_TD: Tensor, vocabulary: int) -> int:
    """Returns how many tokens a block may have for its logits to take `num_bytes`.

    Where the kernels run they exist in the dtype of `x_TD` alone, elsewhere in float32. Blocks are
    as equal as they can be: a short last one would be a slow product.
    """
    each = x_TD.element_size() if _runs_triton(x_TD) else 4
    most = max(1, num_bytes // (each * vocabulary))
    num_blocks = -(-len(x_TD) // most)
    return -(-len(x_TD) // max(1, num_blocks)) or 1


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        num_rows: int,
        scale: float,
        divisor: Tensor | float,
        trains: bool,
    ) -> Tensor:
        needs_x, needs_weight = (trains and needed for needed in ctx.needs_input_grad[:2])
        dx_TD = torch.empty_like(x_TD) if needs_x else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        factor_T = (labels_T != IGNORED).float() * scale / divisor
        losses, operations = [factor_T[:0]], _operations(x_TD)
        for first in range(0, len(x_TD), num_rows):
            x_RD, labels_R = x_TD[first : first + num_rows], labels_T[first : first + num_rows]
            logits_RV = x_RD @ weight_VD.t()
            lse_R, target_R = operations.statistics(logits_RV, labels_R, scale)
            losses.append(torch.where(labels_R != IGNORED, lse_R - target_R, 0.0))
            if not needs_x and not needs_weight:
                continue
            factor_R = factor_T[first : first + num_rows]
            dlogits_RV = operations.to_gradient_(logits_RV, labels_R, scale, lse_R, factor_R)
            if dx_TD is not None:
                torch.mm(dlogits_RV, weight_VD, out=dx_TD[first : first + num_rows])
            if dweight_VD is not None:
                _add_product(dweight_VD, dlogits_RV.t(), x_RD)
        ctx.save_for_backward(dx_TD, dweight_VD)
        ctx.dtype = weight_VD.dtype
        return torch.cat(losses).sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD, dweight_VD = ctx.saved_tensors
        if dx_TD is not None:
            dx_TD = dx_TD.mul_(factor)
        if dweight_VD is not None:
            dweight_VD = dweight_VD.mul_(factor).to(ctx.dtype)
        return dx_TD, dweight_VD, *(None,) * 5


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds `a @ b` to a float32 matrix without rounding it to their dtype first."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # which has no product of that kind
        total.addmm_(a.float(), b.float())


def statistics(logits_RV: Tensor, labels_R: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns each token's log-sum-exp and the logit of its label, in float32.

    Of a token without a label it means nothing. A label that is no word raises here; by Triton,
    which cannot, its logit is NaN.
    """
    wide_RV = logits_RV.float() if scale == 1.0 else logits_RV.float() * scale
    label_R1 = labels_R.masked_fill(labels_R == IGNORED, 0).unsqueeze(1)
    return wide_RV.logsumexp(dim=1), wide_RV.gather(1, label_R1).squeeze(1)


def to_gradient_(
    logits_RV: Tensor, labels_R: Tensor, scale: float, lse_R: Tensor, factor_R: Tensor
) -> Tensor:
    """Returns the gradient of a block of logits in their dtype; the block may be overwritten.

    Args:
        factor_R: float32, of each token's softmax minus its label.
    """
    wide_RV = logits_RV.float() if scale == 1.0 else logits_RV.float() * scale
    wide_RV = wide_RV.sub_(lse_R.unsqueeze(1)).exp_()
    one_R1 = (labels_R != IGNORED).to(wide_RV.dtype).unsqueeze(1)
    label_R1 = labels_R.masked_fill(labels_R == IGNORED, 0).unsqueeze(1)
    wide_RV.scatter_add_(1, label_R1, -one_R1)
    return wide_RV.mul_(factor_R.unsqueeze(1)).to(logits_RV.dtype)


def _runs_triton(x_TD: Tensor) -> bool:
    return choose_implementation(x_TD.device, x_TD.dtype).implementation == "triton"


def _operations(x_TD: Tensor) -> ModuleType:
    """Returns where a block's two operations are: Triton's module, or this one."""
    if _runs_triton(x_TD):
        from epctl.kernels import cross_entropy_triton  # late: Triton takes a second to load

        return cross_entropy_triton
    return sys.modules[__name__]
