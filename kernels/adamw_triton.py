"""One pass of AdamW over memory, in Triton; see adamw.py."""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.adamw import AdamWRule
from epctl.kernels.launch import ceil_div, launch

BLOCK = 1024  # elements of a program, of five tensors
NUM_WARPS = 4


def step_(
    weight_P: Tensor,
    gradient_P: Tensor,
    average_P: Tensor,
    square_P: Tensor,
    rule: AdamWRule,
    divisor: Tensor | None,
    copy_P: Tensor | None,
) -> None:
    """See `adamw.adamw_step_`."""
    num_elements = weight_P.numel()
    if num_elements == 0:
        return
    launch(
        _step_kernel, (ceil_div(num_elements, BLOCK),),
        weight_P, gradient_P, average_P, square_P,
        gradient_P if divisor is None else divisor, weight_P if copy_P is None else copy_P,
        num_elements, 1 - rule.rate * rule.decay, rule.beta1, rule.beta2, rule.eps,
        rule.rate / (1 - rule.beta1**rule.step), 1 / math.sqrt(1 - rule.beta2**rule.step),
        HAS_DIVISOR=divisor is not None, HAS_COPY=copy_P is not None, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _step_kernel(
    weight_ptr,
    gradient_ptr,
    average_ptr,
    square_ptr,
    divisor_ptr,
    copy_ptr,
    num_elements,
    kept,
    beta1,
    beta2,
    eps,
    rate,
    root_scale,
    HAS_DIVISOR: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moments without their start at zero: `rate` and `root_scale` carry the corrections."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        gradient /= tl.load(divisor_ptr)
    average = tl.load(average_ptr + at, mask=inside, other=0.0)
    average += (gradient - average) * (1 - beta1)
    tl.store(average_ptr + at, average, mask=inside)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    square = beta2 * square + (1 - beta2) * gradient * gradient
    tl.store(square_ptr + at, square, mask=inside)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    weight = weight * kept - rate * average / (tl.sqrt(square) * root_scale + eps)
    tl.store(weight_ptr + at, weight, mask=inside)
    if HAS_COPY:
        tl.store(copy_ptr + at, weight.to(copy_ptr.dtype.element_ty), mask=inside)
