"""Products of matrices that are known to be symmetric: half the tiles are computed, all are stored.

In Newton-Schulz every product but the last is one: X X^T, and products of polynomials of one Gram
matrix, which commute. Shape suffixes: B matrices of a batch, R rows and columns, K what is summed.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Moonlight's 1,408 rows are eleven tiles of 128; tiles of 256 would compute a third for nothing.
BLOCK, SMALL_BLOCK = 128, 64
SMALL_ROWS = 640  # up to here 128 wastes more than its better reuse gives
BLOCK_K = 64


def symmetric_matmul(
    left_BRK: Tensor,
    right_BKR: Tensor,
    added_BRR: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """Returns `alpha * left @ right + beta * added`, which the caller knows to be symmetric.

    Any strides, so a transposed view costs no copy; contiguous, in the dtype of `left`; sums in
    float32. The upper triangle is the lower one mirrored, so the result is symmetric to the bit.

    Args:
        added_BRR: symmetric, or absent.
    """
    num_matrices, num_rows, num_summed = left_BRK.shape
    assert right_BKR.shape == (num_matrices, num_summed, num_rows), right_BKR.shape
    out_BRR = torch.empty(
        num_matrices, num_rows, num_rows, dtype=left_BRK.dtype, device=left_BRK.device
    )
    if num_matrices == 0 or num_rows == 0:
        return out_BRR
    block = SMALL_BLOCK if num_rows <= SMALL_ROWS else BLOCK
    num_tiles = triton.cdiv(num_rows, block)
    added = left_BRK if added_BRR is None else added_BRR
    _symmetric_kernel[(num_tiles * (num_tiles + 1) // 2, num_matrices)](
        left_BRK,
        right_BKR,
        added,
        out_BRR,
        num_rows,
        num_summed,
        *left_BRK.stride(),
        *right_BKR.stride(),
        *added.stride(),
        alpha,
        beta,
        HAS_ADDED=added_BRR is not None,
        PRECISION="ieee" if left_BRK.dtype == torch.float32 else "tf32",
        BLOCK=block,
        BLOCK_K=BLOCK_K,
        num_warps=4 if block == SMALL_BLOCK else 8,
        num_stages=4,
    )
    return out_BRR


@triton.jit
def _symmetric_kernel(
    left_ptr,
    right_ptr,
    added_ptr,
    out_ptr,
    num_rows,
    num_summed,
    left_stride_b,
    left_stride_r,
    left_stride_k,
    right_stride_b,
    right_stride_k,
    right_stride_r,
    added_stride_b,
    added_stride_r,
    added_stride_c,
    alpha,
    beta,
    HAS_ADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile on or below the diagonal of one matrix, stored there and mirrored.

    Tiles of a row follow each other, so the row's own operand stays in L2.
    """
    matrix = tl.program_id(1).to(tl.int64)
    tile_row, tile_column = _triangle_place(tl.program_id(0))
    row = tile_row * BLOCK + tl.arange(0, BLOCK)
    column = tile_column * BLOCK + tl.arange(0, BLOCK)
    summed = tl.arange(0, BLOCK_K)
    left_ptr += matrix * left_stride_b
    right_ptr += matrix * right_stride_b
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for first in range(0, num_summed, BLOCK_K):
        k = first + summed
        inside = k < num_summed
        left = tl.load(
            left_ptr + row[:, None] * left_stride_r + k[None, :] * left_stride_k,
            mask=(row < num_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + k[:, None] * right_stride_k + column[None, :] * right_stride_r,
            mask=inside[:, None] & (column < num_rows)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    total *= alpha
    stored = (row < num_rows)[:, None] & (column < num_rows)[None, :]
    # Of a tile on the diagonal only what is on or below it counts; the rest is its mirror.
    stored &= row[:, None] >= column[None, :]
    if HAS_ADDED:
        place = row[:, None] * added_stride_r + column[None, :] * added_stride_c
        added = tl.load(added_ptr + matrix * added_stride_b + place, mask=stored, other=0.0)
        total += beta * added.to(tl.float32)
    value = total.to(out_ptr.dtype.element_ty)
    out_ptr += matrix * num_rows * num_rows
    tl.store(out_ptr + row[:, None] * num_rows + column[None, :], value, mask=stored)
    tl.store(out_ptr + column[None, :] * num_rows + row[:, None], value, mask=stored)


@triton.jit
def _triangle_place(index):
    """Row and column of tile `index` when the lower triangle is counted row by row."""
    # The root of a float may be off by one at a row's end: correct it both ways.
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2
