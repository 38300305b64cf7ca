"""SwiGLU's middle, `silu(gate) * up`, in one pass each way; torch takes two, and three in backward.

Of it torch also keeps `silu(gate)`, which here is computed again. Shape suffixes: P elements.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from epctl.kernels.dispatch import choose_implementation


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_P: Tensor, up_P: Tensor) -> Tensor:
        from epctl.kernels import gated_product_triton

        gate_P, up_P = gate_P.contiguous(), up_P.contiguous()
        ctx.save_for_backward(gate_P, up_P)
        return gated_product_triton.product(gate_P, up_P)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        from epctl.kernels import gated_product_triton

        gate_P, up_P = ctx.saved_tensors
        return gated_product_triton.product_gradients(gate_P, up_P, gradients[0].contiguous())


def gated_product(gate_P: Tensor, up_P: Tensor) -> Tensor:
    """Returns `silu(gate) * up` in their dtype, of any shape; differentiable in both.

    The kernel computes in float32 and rounds once; torch rounds the activation too.
    """
    assert gate_P.shape == up_P.shape, (gate_P.shape, up_P.shape)
    choice = choose_implementation(gate_P.device, gate_P.dtype)
    if choice.implementation == "triton" and gate_P.dtype == up_P.dtype:
        return cast(Tensor, _GatedProduct.apply(gate_P, up_P))  # type: ignore[no-untyped-call]
    return F.silu(gate_P) * up_P
