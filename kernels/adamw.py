"""AdamW's step of one flat tensor: definition by torch's fused kernel, and one pass in Triton.

torch's goes over tensors in chunks made for many small ones and reaches half of the memory's rate
on one of hundreds of millions of elements; what the model computes with is written in the same
pass. Shape suffix: P elements of a flat tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from epctl.kernels.muon_passes import Implementation

# Elements that torch steps on at once: bounds the float32 copy of a gradient of another dtype.
PART_ELEMENTS = 2**26


class AdamWRule(NamedTuple):
    """What a step needs beside tensors; `step` counts this one, from 1."""

    step: int
    rate: float
    beta1: float
    beta2: float
    eps: float
    decay: float


def adamw_step_(
    weight_P: Tensor,
    gradient_P: Tensor,
    average_P: Tensor,
    square_P: Tensor,
    rule: AdamWRule,
    *,
    divisor: Tensor | None = None,
    copy_P: Tensor | None = None,
    implementation: Implementation = "torch",
) -> None:
    """Takes one step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) in float32, in place.

    All contiguous and, but for gradient and copy, float32.

    Args:
        gradient_P: of any floating dtype.
        average_P: the moving average of gradients.
        square_P: that of their squares.
        divisor: what the gradient is divided by first (clipping), float32, one element.
        copy_P: gets the new weight too, rounded to its dtype.
    """
    for tensor in (weight_P, gradient_P, average_P, square_P):
        assert tensor.is_contiguous()  # kernels go by places in memory
    divisor = None if divisor is None else divisor.to(weight_P.device)
    if implementation == "triton" and weight_P.is_cuda == gradient_P.is_cuda:
        from epctl.kernels.adamw_triton import step_  # late: Triton takes a second to load

        step_(weight_P, gradient_P, average_P, square_P, rule, divisor, copy_P)
        return
    for begin in range(0, weight_P.numel(), PART_ELEMENTS):
        parts = (
            x.view(-1)[begin : begin + PART_ELEMENTS]
            for x in (weight_P, gradient_P, average_P, square_P)
        )
        _torch_step_(rule, divisor, *parts)
    if copy_P is not None:
        copy_P.copy_(weight_P)


def _torch_step_(
    rule: AdamWRule,
    divisor: Tensor | None,
    weight_P: Tensor,
    gradient_P: Tensor,
    average_P: Tensor,
    square_P: Tensor,
) -> None:
    # The kernel wants the number of steps before this one beside the master, and counts it on.
    steps = torch.full((), float(rule.step - 1), dtype=torch.float32, device=weight_P.device)
    adamw(
        [weight_P],
        [gradient_P.to(weight_P.dtype)],
        [average_P],
        [square_P],
        [],
        [steps],
        fused=True,
        grad_scale=divisor,
        amsgrad=False,
        beta1=rule.beta1,
        beta2=rule.beta2,
        lr=rule.rate,
        weight_decay=rule.decay,
        eps=rule.eps,
        maximize=False,
    )
