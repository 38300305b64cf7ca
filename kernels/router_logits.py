"""The router's projection with float32 logits, without a float32 copy of the tokens.

Shape suffixes: see reference.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _RouterLogits(torch.autograd.Function):
    """float32 logits that keep the tokens in their own dtype for the backward."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        if x_TD.is_cuda and x_TD.dtype == weight_ED.dtype and x_TD.dtype.itemsize == 2:
            # Products of 16-bit numbers are exact in float32, so no operand needs widening.
            return torch.mm(x_TD, weight_ED.T, out_dtype=torch.float32)
        return x_TD.float() @ weight_ED.float().T

    @staticmethod
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        if x_TD.is_cuda and x_TD.dtype == weight_ED.dtype and x_TD.dtype.itemsize == 2:
            rounded_TE = dlogits_TE.to(x_TD.dtype)
            return rounded_TE @ weight_ED, rounded_TE.T @ x_TD
        dx_TD = dlogits_TE @ weight_ED.float()
        return dx_TD.to(x_TD.dtype), (dlogits_TE.T @ x_TD.float()).to(weight_ED.dtype)


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Returns `x weight^T` in float32, [T, E].

    In bf16 and fp16 on a GPU the sums are float32 and the operands stay as they are, so what is
    kept for the backward is `x_TD` itself; elsewhere both are widened.
    """
    return cast(Tensor, _RouterLogits.apply(x_TD, weight_ED))  # type: ignore[no-untyped-call]
