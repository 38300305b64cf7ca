"""What cross-entropy does to a block of logits, in Triton: read once, or rewritten in place.

Shape suffixes: T tokens, C columns of one block of the vocabulary.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch, next_power_of_2

BLOCK = 4096  # columns that a program holds at a time
NUM_WARPS = 8


def add_statistics_(
    logits_TC: Tensor, labels_T: Tensor, first: int, scale: float, lse_T: Tensor, target_T: Tensor
) -> None:
    """See `cross_entropy.add_statistics_`."""
    num_tokens, num_columns = logits_TC.shape
    if logits_TC.numel() == 0:
        return
    launch(
        _statistics_kernel, (num_tokens,),
        logits_TC, labels_T, lse_T, target_T, num_columns, first, scale,
        BLOCK=_block(num_columns), num_warps=NUM_WARPS,
    )  # fmt: skip


def to_gradient_(
    logits_TC: Tensor, labels_T: Tensor, first: int, scale: float, lse_T: Tensor, factor_T: Tensor
) -> Tensor:
    """See `cross_entropy.to_gradient_`."""
    num_tokens, num_columns = logits_TC.shape
    if logits_TC.numel():
        block = _block(num_columns)
        launch(
            _gradient_kernel, (num_tokens, ceil_div(num_columns, block)),
            logits_TC, labels_T, lse_T, factor_T, num_columns, first, scale,
            BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return logits_TC


def _block(num_columns: int) -> int:
    return min(BLOCK, next_power_of_2(num_columns))


@triton.jit
def _statistics_kernel(
    logits_ptr, labels_ptr, lse_ptr, target_ptr, num_columns, first, scale, BLOCK: tl.constexpr
):
    """One token: its sum of exponentials goes on from that of the blocks before."""
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * num_columns
    highest = tl.load(lse_ptr + token)
    total = tl.where(highest == -float("inf"), 0.0, 1.0)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        logit = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32) * scale
        logit = tl.where(inside, logit, -float("inf"))
        higher = tl.maximum(highest, tl.max(logit))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logit - higher))
        highest = higher
    tl.store(lse_ptr + token, highest + tl.log(total))
    place = tl.load(labels_ptr + token) - first
    inside = (place >= 0) & (place < num_columns)
    target = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(target_ptr + token, target, mask=inside)


@triton.jit
def _gradient_kernel(
    logits_ptr, labels_ptr, lse_ptr, factor_ptr, num_columns, first, scale, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    at = logits_ptr + token * num_columns + column
    logit = tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale
    probability = tl.exp(logit - tl.load(lse_ptr + token))
    wanted = tl.where(column == tl.load(labels_ptr + token) - first, 1.0, 0.0)
    gradient = (probability - wanted) * tl.load(factor_ptr + token)
    tl.store(at, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
