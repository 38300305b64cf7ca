"""The grouped GEMMs of a gated MoE block, one tile of one expert a program.

Rows are sorted by expert (permute.py) and never padded. GEMMs that read tokens gather them in the
load, so the gathered copy is never stored. Weights, and operands that are already sorted, come by
TMA where the GPU has it. What is kept of the forward is the pre-activation H, [N, 2I] with gate
beside up, or [N, I] where experts have no gate; the scheme is SonicMoE's (arXiv 2512.14080,
section 3).
Shape suffixes: see reference.py.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from epctl.kernels.activation import NO_BIASES, SWIGLU, Activation, ExpertBiases
from epctl.kernels.gate import (
    PRODUCT,
    SILU,
    add_bias,
    function_of,
    gate_backward,
    gate_constants,
    gated,
)
from epctl.kernels.launch import ceil_div, launch
from epctl.kernels.permute import RoutingTables
from epctl.kernels.tile_access import (
    can_use_tma,
    jit_for_routed,
    launch_options,
    load_columns,
    load_tile,
    load_window,
    store_tile,
    store_window,
    tile_position,
)
from epctl.kernels.tiles import Tile


@jit_for_routed
def _gate_up_kernel(
    x_ptr,
    w1,
    w3,
    b1_ptr,
    b3_ptr,
    h,
    h_ptr,
    a,
    a_ptr,
    pair_of_row_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    max_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    FUNCTION: tl.constexpr,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    WRITE_H: tl.constexpr,
    WRITE_A: tl.constexpr,
    USE_TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_position(max_tiles, tl.cdiv(INTERMEDIATE, BLOCK_N), GROUP_M)
    if tile_m >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile_m)
    row = tl.load(tile_row_ptr + tile_m)
    lane = tl.arange(0, BLOCK_M)
    row_end = tl.load(offsets_ptr + expert + 1)
    exists = row + lane < row_end
    token = tl.load(pair_of_row_ptr + row + lane, mask=exists, other=0) // TOP_K
    x_at = x_ptr + token.to(tl.int64)[:, None] * HIDDEN
    first = expert * INTERMEDIATE + tile_n * BLOCK_N
    limit = (expert + 1) * INTERMEDIATE
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        x = load_columns(x_at, k, HIDDEN, BLOCK_K)
        if GATED:
            w = load_tile(w1, first, k, limit, HIDDEN, HIDDEN, BLOCK_N, BLOCK_K, USE_TMA)
            gate = tl.dot(x, w.T, gate, input_precision=PRECISION)
        w = load_tile(w3, first, k, limit, HIDDEN, HIDDEN, BLOCK_N, BLOCK_K, USE_TMA)
        up = tl.dot(x, w.T, up, input_precision=PRECISION)
    column = tile_n * BLOCK_N
    if b1_ptr is not None:
        gate = add_bias(gate, b1_ptr, expert, column, INTERMEDIATE, BLOCK_N)
    if b3_ptr is not None:
        up = add_bias(up, b3_ptr, expert, column, INTERMEDIATE, BLOCK_N)
    if WRITE_H:
        H_WIDTH: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
        UP: tl.constexpr = H_WIDTH - INTERMEDIATE
        if GATED:
            store_tile(
                h,
                h_ptr,
                row,
                lane,
                column,
                gate,
                row_end,
                H_WIDTH,
                INTERMEDIATE,
                BLOCK_M,
                BLOCK_N,
                TMA_STORE,
            )
        store_tile(
            h,
            h_ptr,
            row,
            lane,
            column + UP,
            up,
            row_end,
            H_WIDTH,
            H_WIDTH,
            BLOCK_M,
            BLOCK_N,
            TMA_STORE,
        )
    if WRITE_A:
        if not GATED:
            hidden, _ = function_of(up, FUNCTION)
        elif FORM == PRODUCT and FUNCTION == SILU:
            hidden = gate * tl.sigmoid(gate) * up
        else:
            hidden, _, _ = gated(gate, up, FUNCTION, FORM, LIMIT, ALPHA)
        store_tile(
            a,
            a_ptr,
            row,
            lane,
            column,
            hidden,
            row_end,
            INTERMEDIATE,
            INTERMEDIATE,
            BLOCK_M,
            BLOCK_N,
            TMA_STORE,
        )


@jit_for_routed
def _down_kernel(
    a,
    w2,
    b2_ptr,
    y,
    y_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    max_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    USE_TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_position(max_tiles, tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    if tile_m >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile_m)
    row = tl.load(tile_row_ptr + tile_m)
    row_end = tl.load(offsets_ptr + expert + 1)
    first = expert * HIDDEN + tile_n * BLOCK_N
    limit = (expert + 1) * HIDDEN
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, INTERMEDIATE, BLOCK_K):
        left = load_tile(a, row, k, row_end, INTERMEDIATE, INTERMEDIATE, BLOCK_M, BLOCK_K, USE_TMA)
        w = load_tile(w2, first, k, limit, INTERMEDIATE, INTERMEDIATE, BLOCK_N, BLOCK_K, USE_TMA)
        total = tl.dot(left, w.T, total, input_precision=PRECISION)
    if b2_ptr is not None:
        total = add_bias(total, b2_ptr, expert, tile_n * BLOCK_N, HIDDEN, BLOCK_N)
    store_tile(
        y,
        y_ptr,
        row,
        tl.arange(0, BLOCK_M),
        tile_n * BLOCK_N,
        total,
        row_end,
        HIDDEN,
        HIDDEN,
        BLOCK_M,
        BLOCK_N,
        TMA_STORE,
    )


@jit_for_routed
def _down_backward_kernel(
    dy,
    w2,
    h,
    h_ptr,
    a,
    a_ptr,
    weights_ptr,
    partial_ptr,
    pair_of_row_ptr,
    padded_offsets_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    max_tiles,
    num_rows,
    FUNCTION: tl.constexpr,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    USE_TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICE: tl.constexpr,
):
    tile_m, tile_n = tile_position(max_tiles, tl.cdiv(INTERMEDIATE, BLOCK_N), GROUP_M)
    if tile_m >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile_m)
    row = tl.load(tile_row_ptr + tile_m)
    lane = tl.arange(0, BLOCK_M)
    row_end = tl.load(offsets_ptr + expert + 1)
    shift = tl.load(padded_offsets_ptr + expert) - tl.load(offsets_ptr + expert)
    first = expert * HIDDEN
    column = tile_n * BLOCK_N
    da = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        left = load_tile(
            dy, row + shift, k, row_end + shift, HIDDEN, HIDDEN, BLOCK_M, BLOCK_K, USE_TMA
        )
        w = load_tile(
            w2,
            first + k,
            column,
            first + HIDDEN,
            INTERMEDIATE,
            INTERMEDIATE,
            BLOCK_K,
            BLOCK_N,
            USE_TMA,
        )
        da = tl.dot(left, w, da, input_precision=PRECISION)
    exists = row + lane < row_end
    pair = tl.load(pair_of_row_ptr + row + lane, mask=exists, other=0)
    weight = tl.load(weights_ptr + pair, mask=exists, other=0.0)
    sums = gate_backward(
        da,
        weight,
        h,
        h_ptr,
        a,
        a_ptr,
        row,
        lane,
        row_end,
        column,
        FUNCTION,
        FORM,
        GATED,
        LIMIT,
        ALPHA,
        INTERMEDIATE,
        BLOCK_M,
        BLOCK_N,
        SLICE,
        TMA_STORE,
    )
    partial_at = partial_ptr + tile_n.to(tl.int64) * num_rows + row + lane
    tl.store(partial_at, sums, mask=exists)


@jit_for_routed
def _input_gradient_kernel(
    dh,
    w1,
    w3,
    dx,
    dx_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    max_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    GATED: tl.constexpr,
    USE_TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_position(max_tiles, tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    if tile_m >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile_m)
    row = tl.load(tile_row_ptr + tile_m)
    row_end = tl.load(offsets_ptr + expert + 1)
    first = expert * INTERMEDIATE
    limit = first + INTERMEDIATE
    column = tile_n * BLOCK_N
    WIDTH: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
    UP: tl.constexpr = WIDTH - INTERMEDIATE
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, INTERMEDIATE, BLOCK_K):
        if GATED:
            left = load_tile(dh, row, k, row_end, INTERMEDIATE, WIDTH, BLOCK_M, BLOCK_K, USE_TMA)
            w = load_tile(w1, first + k, column, limit, HIDDEN, HIDDEN, BLOCK_K, BLOCK_N, USE_TMA)
            total = tl.dot(left, w, total, input_precision=PRECISION)
        left = load_tile(dh, row, UP + k, row_end, WIDTH, WIDTH, BLOCK_M, BLOCK_K, USE_TMA)
        w = load_tile(w3, first + k, column, limit, HIDDEN, HIDDEN, BLOCK_K, BLOCK_N, USE_TMA)
        total = tl.dot(left, w, total, input_precision=PRECISION)
    store_tile(
        dx,
        dx_ptr,
        row,
        tl.arange(0, BLOCK_M),
        column,
        total,
        row_end,
        HIDDEN,
        HIDDEN,
        BLOCK_M,
        BLOCK_N,
        TMA_STORE,
    )


def _row_tables(tables: RoutingTables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tables.offsets_E, tables.tile_expert_M, tables.tile_row_M, tables.num_tiles_1


def gate_up(
    x_TD: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    tables: RoutingTables,
    top_k: int,
    tile: Tile,
    *,
    biases: ExpertBiases = NO_BIASES,
    activation: Activation = SWIGLU,
    write_h: bool = True,
    write_a: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns the pre-activation H and the activation [N, I], empty where not asked.

    H is [N, 2I], or [N, I] without `w1_EID`.
    """
    num_rows, (_, intermediate, hidden) = len(tables.pair_of_row_N), w3_EID.shape
    has_gate = w1_EID is not None
    h = x_TD.new_empty(num_rows if write_h else 0, (1 + has_gate) * intermediate)
    a = x_TD.new_empty(num_rows if write_a else 0, intermediate)
    use_tma = can_use_tma((w3_EID,) if w1_EID is None else (w1_EID, w3_EID))
    max_tiles = len(tables.tile_row_M)
    launch(
        _gate_up_kernel,
        (max_tiles * ceil_div(intermediate, tile.block_n),),
        x_TD,
        load_window(w1_EID, tile.block_n, tile.block_k, use_tma),
        load_window(w3_EID, tile.block_n, tile.block_k, use_tma),
        biases.gate_EI,
        biases.up_EI,
        store_window(h, tile.block_m, tile.block_n, tile, use_tma),
        h,
        store_window(a, tile.block_m, tile.block_n, tile, use_tma),
        a,
        tables.pair_of_row_N,
        *_row_tables(tables),
        max_tiles,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        TOP_K=top_k,
        **gate_constants(activation, has_gate=has_gate),
        WRITE_H=write_h,
        WRITE_A=write_a,
        **launch_options(tile, use_tma, x_TD.dtype),
    )
    return h, a


def down(
    a_NI: Tensor,
    w2_EDI: Tensor,
    tables: RoutingTables,
    tile: Tile,
    *,
    biases: ExpertBiases = NO_BIASES,
) -> Tensor:
    """Returns each row's down projection [N, D], without the router's weight."""
    _, hidden, intermediate = w2_EDI.shape
    y_ND = a_NI.new_empty(len(a_NI), hidden)
    use_tma = can_use_tma((w2_EDI,))
    max_tiles = len(tables.tile_row_M)
    launch(
        _down_kernel,
        (max_tiles * ceil_div(hidden, tile.block_n),),
        load_window(a_NI, tile.block_m, tile.block_k, use_tma),
        load_window(w2_EDI, tile.block_n, tile.block_k, use_tma),
        biases.down_ED,
        store_window(y_ND, tile.block_m, tile.block_n, tile, use_tma),
        y_ND,
        *_row_tables(tables),
        max_tiles,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        **launch_options(tile, use_tma, a_NI.dtype),
    )
    return y_ND


def down_backward(
    dy: Tensor,
    w2_EDI: Tensor,
    h: Tensor,
    a_NI: Tensor,
    weights_TK: Tensor,
    tables: RoutingTables,
    tile: Tile,
    *,
    activation: Activation = SWIGLU,
) -> Tensor:
    """Overwrites H with its gradient and `a_NI` with the weighted activation.

    `dy` is what `spread` returns. Returns partial sums, float32 [column tiles, N], that add up to
    the gradient of each row's weight: the inner product of A and its gradient at weight 1.
    """
    num_rows, (_, hidden, intermediate) = len(h), w2_EDI.shape
    num_columns = ceil_div(intermediate, tile.block_n)
    width = min(tile.slice_n, tile.block_n)
    partial_PN = torch.empty(num_columns, num_rows, dtype=torch.float32, device=h.device)
    use_tma = can_use_tma((w2_EDI,))
    max_tiles = len(tables.tile_row_M)
    launch(
        _down_backward_kernel,
        (max_tiles * num_columns,),
        load_window(dy, tile.block_m, tile.block_k, use_tma),
        load_window(w2_EDI, tile.block_k, tile.block_n, use_tma),
        store_window(h, tile.block_m, width, tile, use_tma),
        h,
        store_window(a_NI, tile.block_m, width, tile, use_tma),
        a_NI,
        weights_TK,
        partial_PN,
        tables.pair_of_row_N,
        tables.padded_offsets_E,
        *_row_tables(tables),
        max_tiles,
        num_rows,
        **gate_constants(activation, has_gate=h.shape[1] > intermediate),
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        SLICE=width,
        **launch_options(tile, use_tma, h.dtype),
    )
    return partial_PN


def input_gradient(
    dh: Tensor, w1_EID: Tensor | None, w3_EID: Tensor, tables: RoutingTables, tile: Tile
) -> Tensor:
    """Returns each row's gradient of the token it came from, [N, D]."""
    _, intermediate, hidden = w3_EID.shape
    dx_ND = dh.new_empty(len(dh), hidden)
    use_tma = can_use_tma((w3_EID,) if w1_EID is None else (w1_EID, w3_EID))
    max_tiles = len(tables.tile_row_M)
    launch(
        _input_gradient_kernel,
        (max_tiles * ceil_div(hidden, tile.block_n),),
        load_window(dh, tile.block_m, tile.block_k, use_tma),
        load_window(w1_EID, tile.block_k, tile.block_n, use_tma),
        load_window(w3_EID, tile.block_k, tile.block_n, use_tma),
        store_window(dx_ND, tile.block_m, tile.block_n, tile, use_tma),
        dx_ND,
        *_row_tables(tables),
        max_tiles,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        GATED=w1_EID is not None,
        **launch_options(tile, use_tma, dh.dtype),
    )
    return dx_ND
