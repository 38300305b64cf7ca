"""Muon's passes over memory around the iteration, in Triton: each reads and writes once.

Shape suffixes: B matrices of a batch, M rows, N columns, P elements of a flat tensor, S spans that
a matrix is cut into for its norm.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch, next_power_of_2

BLOCK = 2048  # elements of one step of a program
SPAN = 16 * BLOCK  # elements of a matrix whose squares one program adds up
NUM_WARPS = 8


def mix_momentum_(
    gradient_P: Tensor,
    buffer_P: Tensor,
    momentum: float,
    *,
    nesterov: bool,
    divisor: Tensor | None = None,
) -> None:
    """See `muon_passes.mix_momentum_`."""
    num_elements = gradient_P.numel()
    if num_elements == 0:
        return
    launch(
        _mix_kernel, (ceil_div(num_elements, BLOCK),),
        gradient_P, buffer_P, gradient_P if divisor is None else divisor, num_elements, momentum,
        HAS_DIVISOR=divisor is not None, NESTEROV=nesterov, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def normalize_into(x_BMN: Tensor, out_BMN: Tensor) -> None:
    """See `muon_passes.normalize_into`."""
    num_matrices, size = x_BMN.shape[0], x_BMN.shape[1] * x_BMN.shape[2]
    if x_BMN.numel() == 0:
        return
    num_spans = ceil_div(size, SPAN)
    squares_BS = torch.empty(num_matrices, num_spans, dtype=torch.float64, device=x_BMN.device)
    grid = (num_matrices, num_spans)  # only the first may be more than 65,535
    launch(
        _squares_kernel,
        grid,
        x_BMN,
        squares_BS,
        size,
        num_spans,
        SPAN=SPAN,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    launch(
        _normalize_kernel, grid,
        x_BMN, squares_BS, out_BMN, size, num_spans,
        SPAN=SPAN, BLOCK=BLOCK, NUM_SPANS=next_power_of_2(num_spans), num_warps=NUM_WARPS,
    )  # fmt: skip


def apply_update_(
    weight_P: Tensor, update_P: Tensor, *, rate: float, scale: float, decay: float
) -> None:
    """See `muon_passes.apply_update_`."""
    num_elements = weight_P.numel()
    if num_elements == 0:
        return
    launch(
        _apply_kernel, (ceil_div(num_elements, BLOCK),),
        weight_P, update_P, num_elements, 1 - rate * decay, rate * scale, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _mix_kernel(
    gradient_ptr,
    buffer_ptr,
    divisor_ptr,
    num_elements,
    momentum,
    HAS_DIVISOR: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        gradient /= tl.load(divisor_ptr)
    buffer = tl.load(buffer_ptr + at, mask=inside, other=0.0).to(tl.float32)
    average = buffer + (gradient - buffer) * (1 - momentum)
    tl.store(buffer_ptr + at, average.to(buffer_ptr.dtype.element_ty), mask=inside)
    direction = average
    if NESTEROV:
        direction = average - (average - gradient) * (1 - momentum)
    tl.store(gradient_ptr + at, direction, mask=inside)


@triton.jit
def _squares_kernel(x_ptr, squares_ptr, size, num_spans, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up squares in float64, where those of no float32 overflow or underflow."""
    matrix = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1)
    x_ptr += matrix * size
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, SPAN, BLOCK):
        at = span * SPAN + first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float64)
        total += x * x
    tl.store(squares_ptr + matrix * num_spans + span, tl.sum(total))


@triton.jit
def _normalize_kernel(
    x_ptr,
    squares_ptr,
    out_ptr,
    size,
    num_spans,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_SPANS: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1)
    lane = tl.arange(0, NUM_SPANS)
    squares = tl.load(squares_ptr + matrix * num_spans + lane, mask=lane < num_spans, other=0.0)
    norm = tl.sqrt(tl.sum(squares))
    # An exactly zero matrix stays zero; the inverse of a tiny norm does not fit in float32.
    inverse = 1.0 / tl.where(norm > 0, norm, 1.0)
    x_ptr += matrix * size
    out_ptr += matrix * size
    for first in range(0, SPAN, BLOCK):
        at = span * SPAN + first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float64)
        normal = (x * inverse).to(tl.float32)
        tl.store(out_ptr + at, normal.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _apply_kernel(weight_ptr, update_ptr, num_elements, kept, rate, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = weight * kept - rate * update
    tl.store(weight_ptr + at, weight.to(weight_ptr.dtype.element_ty), mask=inside)
