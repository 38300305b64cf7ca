"""The grouped GEMMs of a gated MoE block, one tile of one expert a program.

Rows are sorted by expert (permute.py) and never padded. GEMMs that read tokens gather them in the
load, so the gathered copy is never stored. Weights, and operands that are already sorted, come by
TMA where the GPU has it. What is kept of the forward is the pre-activation H, [N, 2I] with gate
beside up; the scheme is SonicMoE's (arXiv 2512.14080, section 3).
Shape suffixes: see reference.py.

A tile may start less than a block before its expert's last row. The rows beyond are other
experts': loads may read them, and every store masks them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from epctl.kernels.permute import RoutingTables, zero_beyond
from epctl.kernels.tiles import Tile

# Widths that are multiples of this keep every TMA box inside its own expert along K.
TMA_WIDTH = 64

# Columns that the SwiGLU backward works on at a time.
SLICE = tl.constexpr(64)


@triton.jit
def _tile_position(num_row_tiles, num_columns, GROUP: tl.constexpr):
    """Rows tiles in groups of GROUP, column by column, so that a group's operands stay in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * num_columns) * GROUP
    size = min(num_row_tiles - first, GROUP)
    within = program % (GROUP * num_columns)
    return first + within % size, within // size


@triton.jit
def _load_tile(
    source,
    row,
    column,
    row_limit,
    column_limit,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    if USE_TMA:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < row_limit) & (columns[None, :] < column_limit)
        at = source + rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def _load_columns(at, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A [rows, COLUMNS] tile whose rows are all readable; `at` points to its column 0."""
    columns = column + tl.arange(0, COLUMNS)
    if WIDTH % COLUMNS == 0:
        tile = tl.load(at + columns[None, :])
    else:
        tile = tl.load(at + columns[None, :], mask=columns[None, :] < WIDTH, other=0.0)
    return tile


@triton.jit
def _tile_pointers(base, row, lane, columns, STRIDE: tl.constexpr):
    """Pointers into rows `row + lane`: one 64-bit base, then 32-bit offsets, to save registers."""
    return base + row.to(tl.int64) * STRIDE + (lane[:, None] * STRIDE + columns[None, :])


@triton.jit
def _gate_up_kernel(
    x_ptr,
    w1,
    w3,
    h_ptr,
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
    WRITE_H: tl.constexpr,
    WRITE_A: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile_position(max_tiles, tl.cdiv(INTERMEDIATE, BLOCK_N), GROUP_M)
    if tile_m >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile_m)
    row = tl.load(tile_row_ptr + tile_m)
    lane = tl.arange(0, BLOCK_M)
    exists = row + lane < tl.load(offsets_ptr + expert + 1)
    token = tl.load(pair_of_row_ptr + row + lane, mask=exists, other=0) // TOP_K
    x_at = x_ptr + token.to(tl.int64)[:, None] * HIDDEN
    first = expert * INTERMEDIATE + tile_n * BLOCK_N
    limit = (expert + 1) * INTERMEDIATE
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        x = _load_columns(x_at, k, HIDDEN, BLOCK_K)
        w = _load_tile(w1, first, k, limit, HIDDEN, HIDDEN, BLOCK_N, BLOCK_K, USE_TMA)
        gate = tl.dot(x, w.T, gate, input_precision=PRECISION)
        w = _load_tile(w3, first, k, limit, HIDDEN, HIDDEN, BLOCK_N, BLOCK_K, USE_TMA)
        up = tl.dot(x, w.T, up, input_precision=PRECISION)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = exists[:, None] & (column[None, :] < INTERMEDIATE)
    if WRITE_H:
        h_at = _tile_pointers(h_ptr, row, lane, column, 2 * INTERMEDIATE)
        tl.store(h_at, gate.to(h_ptr.dtype.element_ty), mask=inside)
        tl.store(h_at + INTERMEDIATE, up.to(h_ptr.dtype.element_ty), mask=inside)
    if WRITE_A:
        a = gate * tl.sigmoid(gate) * up
        a_at = _tile_pointers(a_ptr, row, lane, column, INTERMEDIATE)
        tl.store(a_at, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(
    a,
    w2,
    y_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    max_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile_position(max_tiles, tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    if tile_m >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile_m)
    row = tl.load(tile_row_ptr + tile_m)
    row_end = tl.load(offsets_ptr + expert + 1)
    first = expert * HIDDEN + tile_n * BLOCK_N
    limit = (expert + 1) * HIDDEN
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, INTERMEDIATE, BLOCK_K):
        left = _load_tile(a, row, k, row_end, INTERMEDIATE, INTERMEDIATE, BLOCK_M, BLOCK_K, USE_TMA)
        w = _load_tile(w2, first, k, limit, INTERMEDIATE, INTERMEDIATE, BLOCK_N, BLOCK_K, USE_TMA)
        y = tl.dot(left, w.T, y, input_precision=PRECISION)
    lane = tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row + lane < row_end)[:, None] & (column[None, :] < HIDDEN)
    y_at = _tile_pointers(y_ptr, row, lane, column, HIDDEN)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    da,
    weight,
    h_ptr,
    a_ptr,
    row,
    lane,
    exists,
    column,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes weighted A, and dH over H, for WIDTH columns; returns the row sums of dA * A.

    `da` is what the loss would feel of A if the router's weight were 1.
    """
    # In slices, since the tile's H, A and gradients do not fit in registers at once.
    if WIDTH > SLICE:
        HALF: tl.constexpr = WIDTH // 2
        left, right = da.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        sums = _swiglu_backward(
            left, weight, h_ptr, a_ptr, row, lane, exists, column, INTERMEDIATE, ROWS, HALF
        )
        column += HALF
        sums += _swiglu_backward(
            right, weight, h_ptr, a_ptr, row, lane, exists, column, INTERMEDIATE, ROWS, HALF
        )
    else:
        columns = column + tl.arange(0, WIDTH)
        inside = exists[:, None] & (columns[None, :] < INTERMEDIATE)
        h_at = _tile_pointers(h_ptr, row, lane, columns, 2 * INTERMEDIATE)
        gate = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_at + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        a = silu * up
        sums = tl.sum(da * a, 1)
        out = h_ptr.dtype.element_ty
        a_at = _tile_pointers(a_ptr, row, lane, columns, INTERMEDIATE)
        tl.store(a_at, (a * weight[:, None]).to(out), mask=inside)
        da = da * weight[:, None]
        # H gives way to its own gradient. Whoever writes an element may not be who read it above.
        tl.debug_barrier()
        tl.store(h_at, (da * up * (sigmoid + silu * (1.0 - sigmoid))).to(out), mask=inside)
        tl.store(h_at + INTERMEDIATE, (da * silu).to(out), mask=inside)
    return sums


@triton.jit
def _down_backward_kernel(
    dy_ptr,
    w2,
    h_ptr,
    a_ptr,
    weights_ptr,
    partial_ptr,
    pair_of_row_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    max_tiles,
    num_rows,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile_position(max_tiles, tl.cdiv(INTERMEDIATE, BLOCK_N), GROUP_M)
    if tile_m >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile_m)
    row = tl.load(tile_row_ptr + tile_m)
    lane = tl.arange(0, BLOCK_M)
    exists = row + lane < tl.load(offsets_ptr + expert + 1)
    pair = tl.load(pair_of_row_ptr + row + lane, mask=exists, other=0)
    dy_at = dy_ptr + (pair // TOP_K).to(tl.int64)[:, None] * HIDDEN
    first = expert * HIDDEN
    column = tile_n * BLOCK_N
    da = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        dy = _load_columns(dy_at, k, HIDDEN, BLOCK_K)
        w = _load_tile(
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
        da = tl.dot(dy, w, da, input_precision=PRECISION)
    weight = tl.load(weights_ptr + pair, mask=exists, other=0.0)
    sums = _swiglu_backward(
        da, weight, h_ptr, a_ptr, row, lane, exists, column, INTERMEDIATE, BLOCK_M, BLOCK_N
    )
    partial_at = partial_ptr + tile_n.to(tl.int64) * num_rows + row + lane
    tl.store(partial_at, sums, mask=exists)


@triton.jit
def _input_gradient_kernel(
    dh,
    w1,
    w3,
    dx_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    max_tiles,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile_position(max_tiles, tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    if tile_m >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile_m)
    row = tl.load(tile_row_ptr + tile_m)
    row_end = tl.load(offsets_ptr + expert + 1)
    first = expert * INTERMEDIATE
    limit = first + INTERMEDIATE
    column = tile_n * BLOCK_N
    WIDTH: tl.constexpr = 2 * INTERMEDIATE
    dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, INTERMEDIATE, BLOCK_K):
        left = _load_tile(dh, row, k, row_end, INTERMEDIATE, WIDTH, BLOCK_M, BLOCK_K, USE_TMA)
        w = _load_tile(w1, first + k, column, limit, HIDDEN, HIDDEN, BLOCK_K, BLOCK_N, USE_TMA)
        dx = tl.dot(left, w, dx, input_precision=PRECISION)
        left = _load_tile(
            dh, row, INTERMEDIATE + k, row_end, WIDTH, WIDTH, BLOCK_M, BLOCK_K, USE_TMA
        )
        w = _load_tile(w3, first + k, column, limit, HIDDEN, HIDDEN, BLOCK_K, BLOCK_N, USE_TMA)
        dx = tl.dot(left, w, dx, input_precision=PRECISION)
    lane = tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    inside = (row + lane < row_end)[:, None] & (columns[None, :] < HIDDEN)
    dx_at = _tile_pointers(dx_ptr, row, lane, columns, HIDDEN)
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient_kernel(
    sorted_rows,
    tokens_ptr,
    out_ptr,
    out_upper_ptr,
    pair_of_row_ptr,
    offsets_ptr,
    SORTED_WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    SORTED_IS_LEFT: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of `left^T right` summed over an expert's rows (varlen-K).

    With SORTED_IS_LEFT the sorted rows are dH, and their two halves go to two outputs.
    """
    LEFT_WIDTH: tl.constexpr = SORTED_WIDTH if SORTED_IS_LEFT else HIDDEN
    RIGHT_WIDTH: tl.constexpr = HIDDEN if SORTED_IS_LEFT else SORTED_WIDTH
    HALF: tl.constexpr = LEFT_WIDTH // 2 if SORTED_IS_LEFT else LEFT_WIDTH
    NUM_HALVES: tl.constexpr = LEFT_WIDTH // HALF
    expert = tl.program_id(1)
    tiles_of_half = tl.cdiv(HALF, BLOCK_M)
    tile_m, tile_n = _tile_position(
        tiles_of_half * NUM_HALVES, tl.cdiv(RIGHT_WIDTH, BLOCK_N), GROUP_M
    )
    half = tile_m // tiles_of_half
    left_in_half = tile_m % tiles_of_half * BLOCK_M
    left_column = half * HALF + left_in_half
    right_column = tile_n * BLOCK_N
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in range(begin, end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        exists = rows < end
        token = tl.load(pair_of_row_ptr + rows, mask=exists, other=0) // TOP_K
        at = tokens_ptr + token.to(tl.int64)[:, None] * HIDDEN
        if SORTED_IS_LEFT:
            columns = right_column + tl.arange(0, BLOCK_N)
        else:
            columns = left_column + tl.arange(0, BLOCK_M)
        inside = exists[:, None]
        if HIDDEN % (BLOCK_N if SORTED_IS_LEFT else BLOCK_M) != 0:
            inside = inside & (columns[None, :] < HIDDEN)
        gathered = tl.load(at + columns[None, :], mask=inside, other=0.0)
        if SORTED_IS_LEFT:
            left = _load_tile(
                sorted_rows,
                row,
                left_column,
                end,
                (half + 1) * HALF,
                SORTED_WIDTH,
                BLOCK_K,
                BLOCK_M,
                USE_TMA,
            )
            out = tl.dot(left.T, gathered, out, input_precision=PRECISION)
        else:
            right = _load_tile(
                sorted_rows,
                row,
                right_column,
                end,
                SORTED_WIDTH,
                SORTED_WIDTH,
                BLOCK_K,
                BLOCK_N,
                USE_TMA,
            )
            out = tl.dot(gathered.T, right, out, input_precision=PRECISION)
    out_rows = left_in_half + tl.arange(0, BLOCK_M)
    out_columns = right_column + tl.arange(0, BLOCK_N)
    inside = (out_rows[:, None] < HALF) & (out_columns[None, :] < RIGHT_WIDTH)
    base = expert.to(tl.int64) * HALF * RIGHT_WIDTH
    if half == 1:
        out_ptr = out_upper_ptr
    out_at = out_ptr + base + out_rows[:, None] * RIGHT_WIDTH + out_columns[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


def can_use_tma(tensors: tuple[Tensor, ...]) -> bool:
    """True when every tensor's rows can be read through a TMA descriptor on its device."""
    if tensors[0].is_cuda and torch.cuda.get_device_capability(tensors[0].device) < (9, 0):
        return False
    return all(
        tensor.shape[-1] % TMA_WIDTH == 0
        and tensor.shape[-2] % TMA_WIDTH == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def _operand(tensor: Tensor, rows: int, columns: int, use_tma: bool) -> Any:
    """A [rows, columns] window over `tensor` with its leading dimensions flattened."""
    if not use_tma:
        return tensor
    return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), [rows, columns])


def _options(tile: Tile, use_tma: bool, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "USE_TMA": use_tma,
        # float32 exists for exactness here, so it does not take the 10-bit tensor-core path.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _row_tables(tables: RoutingTables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tables.offsets_E, tables.tile_expert_M, tables.tile_row_M, tables.num_tiles_1


def gate_up(
    x_TD: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    tables: RoutingTables,
    top_k: int,
    tile: Tile,
    *,
    write_h: bool = True,
    write_a: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns the pre-activation H [N, 2I] and `silu(gate) * up` [N, I], empty where not asked."""
    num_rows, (_, intermediate, hidden) = len(tables.pair_of_row_N), w1_EID.shape
    h = x_TD.new_empty(num_rows if write_h else 0, 2 * intermediate)
    a = x_TD.new_empty(num_rows if write_a else 0, intermediate)
    use_tma = can_use_tma((w1_EID, w3_EID))
    max_tiles = len(tables.tile_row_M)
    _gate_up_kernel[(max_tiles * triton.cdiv(intermediate, tile.block_n),)](
        x_TD,
        _operand(w1_EID, tile.block_n, tile.block_k, use_tma),
        _operand(w3_EID, tile.block_n, tile.block_k, use_tma),
        h,
        a,
        tables.pair_of_row_N,
        *_row_tables(tables),
        max_tiles,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        TOP_K=top_k,
        WRITE_H=write_h,
        WRITE_A=write_a,
        **_options(tile, use_tma, x_TD.dtype),
    )
    return h, a


def down(a_NI: Tensor, w2_EDI: Tensor, tables: RoutingTables, tile: Tile) -> Tensor:
    """Returns each row's down projection [N, D], without the router's weight."""
    _, hidden, intermediate = w2_EDI.shape
    y_ND = a_NI.new_empty(len(a_NI), hidden)
    use_tma = can_use_tma((w2_EDI,))
    max_tiles = len(tables.tile_row_M)
    _down_kernel[(max_tiles * triton.cdiv(hidden, tile.block_n),)](
        _operand(a_NI, tile.block_m, tile.block_k, use_tma),
        _operand(w2_EDI, tile.block_n, tile.block_k, use_tma),
        y_ND,
        *_row_tables(tables),
        max_tiles,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        **_options(tile, use_tma, a_NI.dtype),
    )
    return y_ND


def down_backward(
    dy_TD: Tensor,
    w2_EDI: Tensor,
    h: Tensor,
    weights_TK: Tensor,
    tables: RoutingTables,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Overwrites H with its gradient; returns the weighted activation [N, I] and partial sums.

    The partial sums, float32 [column tiles, N], add up to the gradient of each row's weight: the
    inner product of A and the gradient it would have at weight 1.
    """
    num_rows, (_, hidden, intermediate) = len(h), w2_EDI.shape
    a_NI = h.new_empty(num_rows, intermediate)
    num_columns = triton.cdiv(intermediate, tile.block_n)
    partial_PN = torch.empty(num_columns, num_rows, dtype=torch.float32, device=h.device)
    use_tma = can_use_tma((w2_EDI,))
    max_tiles = len(tables.tile_row_M)
    _down_backward_kernel[(max_tiles * num_columns,)](
        dy_TD,
        _operand(w2_EDI, tile.block_k, tile.block_n, use_tma),
        h,
        a_NI,
        weights_TK,
        partial_PN,
        tables.pair_of_row_N,
        *_row_tables(tables),
        max_tiles,
        num_rows,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        TOP_K=weights_TK.shape[-1],
        **_options(tile, use_tma, h.dtype),
    )
    return a_NI, partial_PN


def input_gradient(
    dh: Tensor, w1_EID: Tensor, w3_EID: Tensor, tables: RoutingTables, tile: Tile
) -> Tensor:
    """Returns each row's gradient of the token it came from, [N, D]."""
    _, intermediate, hidden = w1_EID.shape
    dx_ND = dh.new_empty(len(dh), hidden)
    use_tma = can_use_tma((w1_EID, w3_EID))
    max_tiles = len(tables.tile_row_M)
    _input_gradient_kernel[(max_tiles * triton.cdiv(hidden, tile.block_n),)](
        _operand(dh, tile.block_m, tile.block_k, use_tma),
        _operand(w1_EID, tile.block_k, tile.block_n, use_tma),
        _operand(w3_EID, tile.block_k, tile.block_n, use_tma),
        dx_ND,
        *_row_tables(tables),
        max_tiles,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        **_options(tile, use_tma, dh.dtype),
    )
    return dx_ND


def down_weight_gradient(
    dy_TD: Tensor, a_NI: Tensor, w2_EDI: Tensor, tables: RoutingTables, top_k: int, tile: Tile
) -> Tensor:
    """Returns the gradient of w2 [E, D, I] from the weighted activation of `down_backward`."""
    dw2_EDI = torch.empty_like(w2_EDI)
    num_experts, hidden, intermediate = w2_EDI.shape
    use_tma = can_use_tma((w2_EDI,))
    zero_beyond(a_NI, tables.offsets_E, tile.block_k)
    grid = triton.cdiv(hidden, tile.block_m) * triton.cdiv(intermediate, tile.block_n)
    _weight_gradient_kernel[(grid, num_experts)](
        _operand(a_NI, tile.block_k, tile.block_n, use_tma),
        dy_TD,
        dw2_EDI,
        dw2_EDI,
        tables.pair_of_row_N,
        tables.offsets_E,
        SORTED_WIDTH=intermediate,
        HIDDEN=hidden,
        TOP_K=top_k,
        SORTED_IS_LEFT=False,
        **_options(tile, use_tma, a_NI.dtype),
    )
    return dw2_EDI


def gate_up_weight_gradient(
    dh: Tensor, x_TD: Tensor, w1_EID: Tensor, tables: RoutingTables, top_k: int, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of w1 and w3, both [E, I, D]."""
    dw1_EID, dw3_EID = torch.empty_like(w1_EID), torch.empty_like(w1_EID)
    num_experts, intermediate, hidden = w1_EID.shape
    use_tma = can_use_tma((w1_EID,))
    zero_beyond(dh, tables.offsets_E, tile.block_k)
    grid = 2 * triton.cdiv(intermediate, tile.block_m) * triton.cdiv(hidden, tile.block_n)
    _weight_gradient_kernel[(grid, num_experts)](
        _operand(dh, tile.block_k, tile.block_m, use_tma),
        x_TD,
        dw1_EID,
        dw3_EID,
        tables.pair_of_row_N,
        tables.offsets_E,
        SORTED_WIDTH=2 * intermediate,
        HIDDEN=hidden,
        TOP_K=top_k,
        SORTED_IS_LEFT=True,
        **_options(tile, use_tma, dh.dtype),
    )
    return dw1_EID, dw3_EID
