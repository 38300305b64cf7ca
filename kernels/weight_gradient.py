"""Weight gradients of the grouped GEMMs: products summed over an expert's rows (varlen-K).

The left operand is sorted by expert; the right one too, with each expert's rows padded by zeros to
a whole block (`permute.spread`), so both come by TMA and neither needs a mask.
Shape suffixes: see reference.py.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch
from epctl.kernels.permute import RoutingTables
from epctl.kernels.tile_access import (
    can_use_tma,
    launch_options,
    load_tile,
    load_window,
    store_tile,
    store_window,
    tile_position,
)
from epctl.kernels.tiles import Tile


@triton.jit
def _weight_gradient_kernel(
    sorted_rows,
    tokens,
    out,
    out_ptr,
    upper,
    upper_ptr,
    offsets_ptr,
    padded_offsets_ptr,
    SORTED_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    HALVES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of `sorted_rows^T tokens`, [SORTED_WIDTH, HIDDEN], of one expert.

    With two HALVES the columns of the sorted rows go to two outputs, as gate and up do. TRANSPOSED
    stores [HIDDEN, SORTED_WIDTH] instead.
    """
    WIDTH: tl.constexpr = SORTED_WIDTH // HALVES
    tiles_of_half = tl.cdiv(WIDTH, BLOCK_M)
    tile_m, tile_n = tile_position(tiles_of_half * HALVES, tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    half = tile_m // tiles_of_half
    out_row = tile_m % tiles_of_half * BLOCK_M
    left_column = half * WIDTH + out_row
    right_column = tile_n * BLOCK_N
    expert = tl.program_id(1)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    shift = tl.load(padded_offsets_ptr + expert) - begin
    padded_end = tl.load(padded_offsets_ptr + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in range(begin, end, BLOCK_K):
        right = load_tile(
            tokens,
            row + shift,
            right_column,
            padded_end,
            HIDDEN,
            HIDDEN,
            BLOCK_K,
            BLOCK_N,
            USE_TMA,
        )
        left = load_tile(
            sorted_rows,
            row,
            left_column,
            end,
            (half + 1) * WIDTH,
            SORTED_WIDTH,
            BLOCK_K,
            BLOCK_M,
            USE_TMA,
        )
        total = tl.dot(left.T, right, total, input_precision=PRECISION)
    if half == 1:
        out_ptr = upper_ptr
    if TRANSPOSED:
        # The expert's matrix is HIDDEN rows of WIDTH.
        first = expert * HIDDEN
        store_tile(
            out,
            out_ptr,
            first + right_column,
            tl.arange(0, BLOCK_N),
            out_row,
            total.T,
            first + HIDDEN,
            WIDTH,
            WIDTH,
            BLOCK_N,
            BLOCK_M,
            TMA_STORE,
        )
    else:
        first = expert * WIDTH
        if TMA_STORE and half == 1:
            store_tile(
                upper,
                out_ptr,
                first + out_row,
                tl.arange(0, BLOCK_M),
                right_column,
                total,
                first + WIDTH,
                HIDDEN,
                HIDDEN,
                BLOCK_M,
                BLOCK_N,
                TMA_STORE,
            )
        else:
            store_tile(
                out,
                out_ptr,
                first + out_row,
                tl.arange(0, BLOCK_M),
                right_column,
                total,
                first + WIDTH,
                HIDDEN,
                HIDDEN,
                BLOCK_M,
                BLOCK_N,
                TMA_STORE,
            )


def down_weight_gradient(
    dy: Tensor, a_NI: Tensor, w2_EDI: Tensor, tables: RoutingTables, tile: Tile
) -> Tensor:
    """Returns the gradient of w2 [E, D, I] from `spread` and `down_backward`."""
    dw2_EDI = torch.empty_like(w2_EDI)
    num_experts, hidden, intermediate = w2_EDI.shape
    use_tma = can_use_tma((w2_EDI,))
    out = store_window(dw2_EDI, tile.block_n, tile.block_m, tile, use_tma)
    grid = ceil_div(intermediate, tile.block_m) * ceil_div(hidden, tile.block_n)
    launch(
        _weight_gradient_kernel,
        (grid, num_experts),
        load_window(a_NI, tile.block_k, tile.block_m, use_tma),
        load_window(dy, tile.block_k, tile.block_n, use_tma),
        out,
        dw2_EDI,
        out,
        dw2_EDI,
        tables.offsets_E,
        tables.padded_offsets_E,
        SORTED_WIDTH=intermediate,
        HIDDEN=hidden,
        HALVES=1,
        TRANSPOSED=True,
        **launch_options(tile, use_tma, a_NI.dtype),
    )
    return dw2_EDI


def gate_up_weight_gradient(
    dh: Tensor, x: Tensor, w3_EID: Tensor, tables: RoutingTables, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of w1 and w3, both [E, I, D]; `x` is what `spread` returns.

    Without a gate `dh` is [N, I], and both are w3's.
    """
    num_experts, intermediate, hidden = w3_EID.shape
    halves = dh.shape[1] // intermediate
    dw1_EID = torch.empty_like(w3_EID)
    dw3_EID = torch.empty_like(w3_EID) if halves == 2 else dw1_EID
    use_tma = can_use_tma((w3_EID,))
    grid = halves * ceil_div(intermediate, tile.block_m) * ceil_div(hidden, tile.block_n)
    launch(
        _weight_gradient_kernel,
        (grid, num_experts),
        load_window(dh, tile.block_k, tile.block_m, use_tma),
        load_window(x, tile.block_k, tile.block_n, use_tma),
        store_window(dw1_EID, tile.block_m, tile.block_n, tile, use_tma),
        dw1_EID,
        store_window(dw3_EID, tile.block_m, tile.block_n, tile, use_tma),
        dw3_EID,
        tables.offsets_E,
        tables.padded_offsets_E,
        SORTED_WIDTH=halves * intermediate,
        HIDDEN=hidden,
        HALVES=halves,
        TRANSPOSED=False,
        **launch_options(tile, use_tma, dh.dtype),
    )
    return dw1_EID, dw3_EID
