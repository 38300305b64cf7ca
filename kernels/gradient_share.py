"""A share of a gradient added to a sum in one pass.

On an H200 it moves 3.9 TB/s where torch moves 3.2 (first), and 4.2 where torch moves 2.8 (added);
a copy of float32 moves 4.2 (benchmarks/train_h200x2_202611.md).

Shape suffixes: P elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epctl.kernels.dispatch import choose_implementation


@torch.no_grad()
def add_share_(total_P: Tensor, gradient_P: Tensor, share: float, *, first: bool) -> None:
    """Adds `share * gradient` to `total`, or with `first` puts it there; computed in float32.

    Args:
        total_P: contiguous, of any shape; may hold anything if `first`. Rounded to its dtype: exact
            where that is the gradient's, `first`, and the share a power of two.
        gradient_P: as many elements, in its own order.
    """
    assert total_P.numel() == gradient_P.numel(), (total_P.shape, gradient_P.shape)
    gradient_P = gradient_P.contiguous()
    choice = choose_implementation(total_P.device, total_P.dtype)
    if choice.implementation == "triton":
        from epctl.kernels import gradient_share_triton

        gradient_share_triton.add_share_(total_P, gradient_P, share, first)
        return
    gradient_P = gradient_P.view_as(total_P)
    if not first:
        total_P.add_(gradient_P, alpha=share)
    elif math.frexp(share)[0] == 0.5:  # a power of two: exact in any dtype
        torch.mul(gradient_P, share, out=total_P)
    else:
        total_P.copy_(gradient_P).mul_(share)
