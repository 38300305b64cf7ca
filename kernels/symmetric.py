"""Products of matrices that are known to be symmetric: half the tiles are computed, all are stored.

In Newton-Schulz every product but the last is one: X X^T, and products of polynomials of one Gram
matrix, which commute. Shape suffixes: B matrices of a batch, R rows and columns, K what is summed.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels import symmetric_hopper
from epctl.kernels.launch import Window, launch
from epctl.kernels.tiles import device_capability


class SymmetricTile(NamedTuple):
    """One launch: a tile is `block_m` rows by one or two times as many columns.

    `cuda`: by symmetric_hopper.cu, where these sizes are facts and no choice.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = True
    cuda: bool = False

    @property
    def label(self) -> str:
        """Sizes, warps, stages and how operands are read, as a benchmark names them."""
        sizes = f"{self.block_m}x{self.block_n}x{self.block_k}"
        how = " cuda" if self.cuda else " tma" if self.tma else ""
        return f"{sizes} w{self.num_warps} s{self.num_stages}{how}"

    def num_tiles(self, num_rows: int) -> int:
        """Returns the tiles of one matrix: those that touch its lower triangle."""
        ratio = self.block_n // self.block_m
        return sum(i // ratio + 1 for i in range(-(-num_rows // self.block_m)))


# Exact float32 dots run on the ordinary cores.
FLOAT32_TILE = SymmetricTile(64, 64, 32, num_warps=4, num_stages=2, tma=False)

# Of n^2, tiles compute 0.545 at n = 1408 with 128 x 128, 0.595 with 128 x 256, 0.694 with
# 256 x 256; 0.556 at n = 576 with 64 x 64, 0.617 with 64 x 128, 0.741 with 128 x 128. Two programs
# share a processor: one multiplies while the other writes (benchmarks/muon_h200_202611.md).
LARGE_TILE = SymmetricTile(128, 128, 64, num_warps=4, num_stages=3)
SMALL_TILE = SymmetricTile(64, 128, 64, num_warps=4, num_stages=4)
SMALL_ROWS = 640  # few tiles for all sizes: every further one compiles for seconds

# Two tiles with a panel in common, in CUDA C++: three panels fetched for two tiles, and results
# stored by warps of their own while the next ones are multiplied (symmetric_hopper.cu).
HOPPER_TILE = SymmetricTile(128, 256, 64, num_warps=12, num_stages=3, cuda=True)

# What `epctl bench muon --products` tries.
CANDIDATES = (
    HOPPER_TILE,
    LARGE_TILE,
    SymmetricTile(128, 128, 64, num_warps=8, num_stages=3),
    SymmetricTile(128, 128, 32, num_warps=4, num_stages=4),
    SymmetricTile(128, 256, 64, num_warps=8, num_stages=4),
    SMALL_TILE,
    SymmetricTile(64, 64, 64, num_warps=4, num_stages=4),
)


def choose_tile(num_rows: int, dtype: torch.dtype) -> SymmetricTile:
    """Returns the tile for symmetric results of `num_rows` rows."""
    if dtype.itemsize > 2:
        return FLOAT32_TILE
    return SMALL_TILE if num_rows <= SMALL_ROWS else LARGE_TILE


def symmetric_matmul(
    left_BRK: Tensor,
    right_BRK: Tensor,
    added_BRR: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor | None = None,
    tile: SymmetricTile | None = None,
) -> Tensor:
    """Returns `alpha * left @ right^T + beta * added`, which the caller knows to be symmetric.

    Each operand has rows or columns next to each other, so a transposed view costs no copy. The
    result is contiguous, in the dtype of `left`; sums are float32. One half is the other one
    mirrored, so it is symmetric to the bit. No operand may share memory with the result.

    Args:
        added_BRR: symmetric, or absent.
        out: where the result goes, contiguous; allocated if absent.
        tile: overrides `choose_tile`, and the choice between Triton and CUDA C++.

    Raises:
        ValueError: `tile` is the one in CUDA C++, which does not run here or on these operands.
    """
    if (
        tile is None
        and out is not None
        and symmetric_hopper.start_again(left_BRK, right_BRK, added_BRR, out, alpha, beta)
    ):
        return out
    num_matrices, num_rows, num_summed = left_BRK.shape
    assert right_BRK.shape == left_BRK.shape, right_BRK.shape
    assert num_rows * max(num_rows, num_summed) < 2**31, "offsets within a matrix are 32 bits"
    if out is None:
        out = left_BRK.new_empty(num_matrices, num_rows, num_rows)
    added = out if added_BRR is None else added_BRR
    assert added.shape == out.shape == (num_matrices, num_rows, num_rows), (added.shape, out.shape)
    assert out.is_contiguous()
    assert added.is_contiguous()
    if num_matrices == 0 or num_rows == 0:
        return out
    by_cuda = symmetric_hopper.is_faster(left_BRK) if tile is None else tile.cuda
    if by_cuda:
        if symmetric_hopper.fits(left_BRK, right_BRK, added_BRR, out):
            symmetric_hopper.symmetric_product(left_BRK, right_BRK, added_BRR, out, alpha, beta)
            return out
        if tile is not None:
            raise ValueError(f"{tile.label} does not run on {tuple(left_BRK.shape)} here")
    tile = tile or choose_tile(num_rows, left_BRK.dtype)
    transposed = left_BRK.stride(2) != 1
    use_tma = tile.tma and all(_has_window(x, transposed, tile) for x in (left_BRK, right_BRK))
    even = num_rows % tile.block_m == 0
    # A window that reached over a matrix would write into the next one.
    windows = use_tma and even and _has_window(out, False, tile)
    launch(
        _symmetric_kernel,
        (tile.num_tiles(num_rows), num_matrices),
        _window(left_BRK, transposed, tile.block_m, tile.block_k) if use_tma else left_BRK,
        _window(right_BRK, transposed, tile.block_n, tile.block_k) if use_tma else right_BRK,
        added,
        _window(out, False, tile.block_m, tile.block_m) if windows else out,
        num_rows,
        num_summed,
        *left_BRK.stride(),
        *right_BRK.stride(),
        alpha,
        beta,
        HAS_ADDED=added_BRR is not None,
        USE_TMA=use_tma,
        WINDOWS=windows,
        TRANSPOSED=transposed,
        EVEN=even and num_rows % tile.block_n == 0,
        EVEN_K=use_tma or (num_rows % tile.block_n == 0 and num_summed % tile.block_k == 0),
        PRECISION="ieee" if left_BRK.dtype == torch.float32 else "tf32",
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _has_window(x_BRK: Tensor, transposed: bool, tile: SymmetricTile) -> bool:
    """True when a TMA window over all matrices at once reads `x_BRK` right.

    Rows beyond a matrix are the next one's and only reach results that are not stored; what is
    summed beyond a matrix must be zero, which holds at the end of a row and of nothing else.
    """
    if x_BRK.is_cuda and device_capability(x_BRK.device) < (9, 0):
        return False
    stored = x_BRK.mT if transposed else x_BRK
    summed_fits = not transposed or x_BRK.shape[2] % tile.block_k == 0
    aligned = stored.shape[-1] * x_BRK.element_size() % 16 == 0 and x_BRK.data_ptr() % 16 == 0
    return stored.is_contiguous() and summed_fits and aligned


def _window(x_BRK: Tensor, transposed: bool, rows: int, summed: int) -> Any:
    stored = x_BRK.mT if transposed else x_BRK
    return Window(stored, summed, rows) if transposed else Window(stored, rows, summed)


@triton.jit
def _load(
    source,
    matrix,
    first_row,
    first_k,
    num_rows,
    num_summed,
    stride_b,
    stride_r,
    stride_k,
    USE_TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A [ROWS, BLOCK_K] tile of one matrix of an operand."""
    if USE_TMA:
        if TRANSPOSED:
            tile = source.load([matrix * num_summed + first_k, first_row]).T
        else:
            tile = source.load([matrix * num_rows + first_row, first_k])
    else:
        row = first_row + tl.arange(0, ROWS)
        k = first_k + tl.arange(0, BLOCK_K)
        base = source + matrix.to(tl.int64) * stride_b
        at = base + row[:, None] * stride_r + k[None, :] * stride_k
        if EVEN_K:
            tile = tl.load(at)
        else:
            inside = (row < num_rows)[:, None] & (k < num_summed)[None, :]
            tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def _added_tile(
    added_ptr,
    matrix,
    first_row,
    first_column,
    num_rows,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is added to a tile, as it is stored."""
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    base = added_ptr + matrix.to(tl.int64) * num_rows * num_rows
    at = base + row[:, None] * num_rows + column[None, :]
    if EVEN:
        tile = tl.load(at)
    else:
        inside = (row < num_rows)[:, None] & (column < num_rows)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def _store_block(
    total,
    out,
    matrix,
    first_row,
    first_column,
    num_rows,
    WINDOWS: tl.constexpr,
    EVEN: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Stores a square block and its mirror; of one on the diagonal the lower half decides.

    Nothing is stored of a block above the diagonal.
    """
    lane = tl.arange(0, SIDE)
    row, column = first_row + lane, first_column + lane
    value = total.to(out.dtype if WINDOWS else out.dtype.element_ty)
    if first_row == first_column:
        value = tl.where(row[:, None] >= column[None, :], value, value.T)
        _store_square(out, value, matrix, first_row, first_column, num_rows, WINDOWS, EVEN, SIDE)
    elif first_row > first_column:
        _store_square(out, value, matrix, first_row, first_column, num_rows, WINDOWS, EVEN, SIDE)
        _store_square(out, value.T, matrix, first_column, first_row, num_rows, WINDOWS, EVEN, SIDE)


@triton.jit
def _store_square(
    out,
    value,
    matrix,
    first_row,
    first_column,
    num_rows,
    WINDOWS: tl.constexpr,
    EVEN: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Stores a block at its place in one matrix."""
    if WINDOWS:
        out.store([matrix * num_rows + first_row, first_column], value)
    else:
        row, column = first_row + tl.arange(0, SIDE), first_column + tl.arange(0, SIDE)
        base = out + matrix.to(tl.int64) * num_rows * num_rows
        at = base + row[:, None] * num_rows + column[None, :]
        if EVEN:
            tl.store(at, value)
        else:
            inside = (row < num_rows)[:, None] & (column < num_rows)[None, :]
            tl.store(at, value, mask=inside)


@triton.jit
def _symmetric_kernel(
    left,
    right,
    added_ptr,
    out,
    num_rows,
    num_summed,
    left_stride_b,
    left_stride_r,
    left_stride_k,
    right_stride_b,
    right_stride_r,
    right_stride_k,
    alpha,
    beta,
    HAS_ADDED: tl.constexpr,
    USE_TMA: tl.constexpr,
    WINDOWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile that touches the lower triangle of one matrix, stored there and mirrored.

    Tiles of a row follow each other, so the row's own operand stays in L2. Offsets between
    matrices are 64 bits wide: 1,248 experts hold more than 2^31 elements.
    """
    matrix = tl.program_id(1)
    tile_row, tile_column = _triangle_place(tl.program_id(0), BLOCK_N // BLOCK_M)
    first_row = tile_row * BLOCK_M
    first_column = tile_column * BLOCK_N
    if HAS_ADDED:  # asked for before the first product, so that it is there after the last
        added = _added_tile(
            added_ptr, matrix, first_row, first_column, num_rows, EVEN, BLOCK_M, BLOCK_N
        )
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, num_summed, BLOCK_K):
        a = _load(
            left, matrix, first_row, first_k, num_rows, num_summed,
            left_stride_b, left_stride_r, left_stride_k,
            USE_TMA, TRANSPOSED, EVEN_K, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        b = _load(
            right, matrix, first_column, first_k, num_rows, num_summed,
            right_stride_b, right_stride_r, right_stride_k,
            USE_TMA, TRANSPOSED, EVEN_K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = tl.dot(a, b.T, total, input_precision=PRECISION)
    total *= alpha
    if HAS_ADDED:
        total += beta * added.to(tl.float32)
    if BLOCK_N == BLOCK_M:
        _store_block(total, out, matrix, first_row, first_column, num_rows, WINDOWS, EVEN, BLOCK_M)
    else:
        # Two square blocks side by side: what is stored and mirrored is a whole block or nothing.
        tl.static_assert(BLOCK_N == 2 * BLOCK_M)
        first, second = total.reshape(BLOCK_M, 2, BLOCK_M).permute(0, 2, 1).split()
        _store_block(first, out, matrix, first_row, first_column, num_rows, WINDOWS, EVEN, BLOCK_M)
        first_column += BLOCK_M
        _store_block(second, out, matrix, first_row, first_column, num_rows, WINDOWS, EVEN, BLOCK_M)


@triton.jit
def _triangle_place(index, RATIO: tl.constexpr):
    """Row and column of tile `index`, counted row by row; row i has `i // RATIO + 1` tiles.

    RATIO rows in turn have as many tiles each, so group p of them begins at RATIO * p(p + 1)/2.
    """
    place = index // RATIO
    # The root of a float may be off by one at a group's end: correct it both ways.
    group = ((tl.sqrt(8.0 * place.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    group = tl.where(group * (group + 1) // 2 > place, group - 1, group)
    group = tl.where((group + 1) * (group + 2) // 2 <= place, group + 1, group)
    within = index - RATIO * (group * (group + 1) // 2)
    return RATIO * group + within // (group + 1), within % (group + 1)
