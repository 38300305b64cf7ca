"""What cross-entropy does to a block of logits, in Triton: read once, or rewritten in place.

Shape suffixes: R tokens of a block, V vocabulary.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch, next_power_of_2

BLOCK = 4096  # columns that a program holds at a time
NUM_WARPS = 8


def statistics(logits_RV: Tensor, labels_R: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `cross_entropy.statistics`."""
    num_tokens, vocabulary = logits_RV.shape
    lse_R = logits_RV.new_empty(num_tokens, dtype=torch.float32)
    target_R = torch.empty_like(lse_R)
    if num_tokens:
        launch(
            _statistics_kernel, (num_tokens,),
            logits_RV, labels_R, lse_R, target_R, vocabulary, scale,
            BLOCK=_block(vocabulary), num_warps=NUM_WARPS,
        )  # fmt: skip
    return lse_R, target_R


def to_gradient_(
    logits_RV: Tensor, labels_R: Tensor, scale: float, lse_R: Tensor, factor_R: Tensor
) -> Tensor:
    """See `cross_entropy.to_gradient_`."""
    num_tokens, vocabulary = logits_RV.shape
    if num_tokens:
        block = _block(vocabulary)
        launch(
            _gradient_kernel, (num_tokens, ceil_div(vocabulary, block)),
            logits_RV, labels_R, lse_R, factor_R, vocabulary, scale,
            BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return logits_RV


def _block(vocabulary: int) -> int:
    return min(BLOCK, next_power_of_2(vocabulary))


@triton.jit
def _statistics_kernel(
    logits_ptr, labels_ptr, lse_ptr, target_ptr, vocabulary, scale, BLOCK: tl.constexpr
):
    """One token: the sum of exponentials goes on from block to block of its row."""
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * vocabulary
    highest = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        logit = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32) * scale
        logit = tl.where(inside, logit, -float("inf"))
        higher = tl.maximum(highest, tl.max(logit))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logit - higher))
        highest = higher
    tl.store(lse_ptr + token, highest + tl.log(total))
    label = tl.load(labels_ptr + token)
    known = (label >= 0) & (label < vocabulary)
    target = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32) * scale
    tl.store(target_ptr + token, target)


@triton.jit
def _gradient_kernel(
    logits_ptr, labels_ptr, lse_ptr, factor_ptr, vocabulary, scale, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    at = logits_ptr + token * vocabulary + column
    logit = tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale
    probability = tl.exp(logit - tl.load(lse_ptr + token))
    wanted = tl.where(column == tl.load(labels_ptr + token), 1.0, 0.0)
    gradient = (probability - wanted) * tl.load(factor_ptr + token)
    tl.store(at, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
