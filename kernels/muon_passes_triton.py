"""Muon's passes over memory around the iteration, in Triton: each reads and writes once.

A program has one block of one matrix; a flat tensor is a matrix. Shape suffixes: B matrices of a
batch, M rows, N columns, P elements of a flat tensor, S blocks that a matrix is cut into.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch

BLOCK = 2048  # elements of a program
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
    _mix_(gradient_P, buffer_P, gradient_P, momentum, 1, nesterov, divisor, None)


def mix_matrices_(
    gradient_BMN: Tensor,
    buffer_BMN: Tensor,
    momentum: float,
    *,
    nesterov: bool,
    divisor: Tensor | None = None,
    out_BMN: Tensor | None = None,
) -> Tensor:
    """See `muon_passes.mix_matrices_`."""
    squares_BS = _empty_squares(gradient_BMN)
    out_BMN = gradient_BMN if out_BMN is None else out_BMN
    count = len(gradient_BMN)
    _mix_(gradient_BMN, buffer_BMN, out_BMN, momentum, count, nesterov, divisor, squares_BS)
    return squares_BS


def _mix_(
    gradient: Tensor,
    buffer: Tensor,
    direction: Tensor,
    momentum: float,
    num_matrices: int,
    nesterov: bool,
    divisor: Tensor | None,
    squares_BS: Tensor | None,
) -> None:
    if gradient.numel() == 0:
        return
    size = gradient.numel() // num_matrices
    num_blocks = ceil_div(size, BLOCK)
    launch(
        _mix_kernel, (num_matrices * num_blocks,),
        gradient, buffer, direction, gradient if divisor is None else divisor,
        gradient if squares_BS is None else squares_BS, size, num_blocks, momentum,
        HAS_DIVISOR=divisor is not None, NESTEROV=nesterov, HAS_SQUARES=squares_BS is not None,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def _empty_squares(x_BMN: Tensor) -> Tensor:
    num_blocks = ceil_div(x_BMN.shape[1] * x_BMN.shape[2], BLOCK)
    return x_BMN.new_empty(x_BMN.shape[0], num_blocks, dtype=torch.float64)


def normalize_into(x_BMN: Tensor, out_BMN: Tensor, squares_BS: Tensor | None = None) -> None:
    """See `muon_passes.normalize_into`."""
    num_matrices, size = x_BMN.shape[0], x_BMN.shape[1] * x_BMN.shape[2]
    if x_BMN.numel() == 0:
        return
    num_blocks = ceil_div(size, BLOCK)
    grid = (num_matrices * num_blocks,)
    if squares_BS is None:
        squares_BS = _empty_squares(x_BMN)
        launch(
            _squares_kernel, grid,
            x_BMN, squares_BS, size, num_blocks, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    inverse_B = torch.empty(num_matrices, dtype=torch.float64, device=x_BMN.device)
    launch(
        _inverse_kernel, (num_matrices,),
        squares_BS, inverse_B, num_blocks, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        _normalize_kernel, grid,
        x_BMN, inverse_B, out_BMN, size, num_blocks, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def apply_update_(
    weight_P: Tensor,
    update_P: Tensor,
    *,
    rate: float,
    scale: float,
    decay: float,
    copy_P: Tensor | None = None,
) -> None:
    """See `muon_passes.apply_update_`."""
    num_elements = weight_P.numel()
    if num_elements == 0:
        return
    launch(
        _apply_kernel, (ceil_div(num_elements, BLOCK),),
        weight_P, update_P, weight_P if copy_P is None else copy_P, num_elements,
        1 - rate * decay, rate * scale, HAS_COPY=copy_P is not None, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _place(size, num_blocks, BLOCK: tl.constexpr):
    """The matrix of a program, where its elements are, and which of them are of that matrix."""
    matrix = tl.program_id(0) // num_blocks
    within = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return matrix, matrix.to(tl.int64) * size + within, within < size


@triton.jit
def _mix_kernel(
    gradient_ptr,
    buffer_ptr,
    direction_ptr,
    divisor_ptr,
    squares_ptr,
    size,
    num_blocks,
    momentum,
    HAS_DIVISOR: tl.constexpr,
    NESTEROV: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, at, inside = _place(size, num_blocks, BLOCK)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        gradient /= tl.load(divisor_ptr)
    buffer = tl.load(buffer_ptr + at, mask=inside, other=0.0).to(tl.float32)
    average = buffer + (gradient - buffer) * (1 - momentum)
    tl.store(buffer_ptr + at, average.to(buffer_ptr.dtype.element_ty), mask=inside)
    direction = average
    if NESTEROV:
        direction = average - (average - gradient) * (1 - momentum)
    tl.store(direction_ptr + at, direction, mask=inside)
    if HAS_SQUARES:
        _store_squares(squares_ptr, direction)


@triton.jit
def _store_squares(squares_ptr, x):
    """Adds up squares in float64, where those of no float32 overflow or underflow."""
    wide = x.to(tl.float64)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(wide * wide))


@triton.jit
def _squares_kernel(x_ptr, squares_ptr, size, num_blocks, BLOCK: tl.constexpr):
    _, at, inside = _place(size, num_blocks, BLOCK)
    _store_squares(squares_ptr, tl.load(x_ptr + at, mask=inside, other=0.0))


@triton.jit
def _inverse_kernel(squares_ptr, inverse_ptr, num_blocks, BLOCK: tl.constexpr):
    """One over the norm of a matrix, in float64: that of a tiny norm does not fit in float32."""
    squares_ptr += tl.program_id(0).to(tl.int64) * num_blocks
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        total += tl.load(squares_ptr + block, mask=block < num_blocks, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    # An exactly zero matrix stays zero.
    tl.store(inverse_ptr + tl.program_id(0), 1.0 / tl.where(norm > 0, norm, 1.0))


@triton.jit
def _normalize_kernel(x_ptr, inverse_ptr, out_ptr, size, num_blocks, BLOCK: tl.constexpr):
    matrix, at, inside = _place(size, num_blocks, BLOCK)
    inverse = tl.load(inverse_ptr + matrix)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float64)
    normal = (x * inverse).to(tl.float32)
    tl.store(out_ptr + at, normal.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _apply_kernel(
    weight_ptr,
    update_ptr,
    copy_ptr,
    num_elements,
    kept,
    rate,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = (weight * kept - rate * update).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + at, weight, mask=inside)
    if HAS_COPY:
        tl.store(copy_ptr + at, weight.to(copy_ptr.dtype.element_ty), mask=inside)
