"""How a grouped GEMM's program finds its tile and reads and writes it, by TMA or by pointers.

A tile may start less than a block before its expert's last row. The rows beyond are other
experts': loads may read them, and every store masks them.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import Window
from epctl.kernels.tiles import Tile, device_capability

# Widths that are multiples of this keep every TMA box inside its own expert along K.
TMA_WIDTH = 64


# Counts that follow the routing. Triton compiles a kernel for multiples of 16 and one for all other
# numbers; the rarer would come in the middle of a run, where one rank's seconds are all ranks'.
# Nothing here reads or writes faster for knowing it.
ROUTED_COUNTS = ("num_pairs", "num_chunks", "num_tokens", "num_rows", "max_tiles")
jit_for_routed = triton.jit(do_not_specialize=ROUTED_COUNTS)


@triton.jit
def tile_position(num_row_tiles, num_columns, GROUP: tl.constexpr):
    """Rows tiles in groups of GROUP, column by column, so that a group's operands stay in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * num_columns) * GROUP
    size = min(num_row_tiles - first, GROUP)
    within = program % (GROUP * num_columns)
    return first + within % size, within // size


@triton.jit
def load_tile(
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
def load_columns(at, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A [rows, COLUMNS] tile whose rows are all readable; `at` points to its column 0."""
    columns = column + tl.arange(0, COLUMNS)
    if WIDTH % COLUMNS == 0:
        tile = tl.load(at + columns[None, :])
    else:
        tile = tl.load(at + columns[None, :], mask=columns[None, :] < WIDTH, other=0.0)
    return tile


@triton.jit
def tile_pointers(base, row, lane, columns, STRIDE: tl.constexpr):
    """Pointers into rows `row + lane`: one 64-bit base, then 32-bit offsets, to save registers."""
    return base + row.to(tl.int64) * STRIDE + (lane[:, None] * STRIDE + columns[None, :])


@triton.jit
def store_tile(
    window,
    base,
    row,
    lane,
    column,
    values,
    row_end,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    """Writes `values` to rows from `row` on, none at or beyond `row_end` or column `WIDTH`.

    A tile that is whole leaves by TMA when TMA_STORE is set; `window` is its descriptor.
    """
    values = values.to(base.dtype.element_ty)
    columns = column + tl.arange(0, COLUMNS)
    at = tile_pointers(base, row, lane, columns, STRIDE)
    inside = (row + lane < row_end)[:, None] & (columns[None, :] < WIDTH)
    if TMA_STORE:
        # A TMA store knows the whole tensor's bounds, not the expert's and not gate's from up's.
        if (row + ROWS <= row_end) & (column + COLUMNS <= WIDTH):
            window.store([row, column], values)
        else:
            tl.store(at, values, mask=inside)
    else:
        tl.store(at, values, mask=inside)


def can_use_tma(tensors: tuple[Tensor, ...]) -> bool:
    """True when every tensor's rows can be read through a TMA descriptor on its device."""
    if tensors[0].is_cuda and device_capability(tensors[0].device) < (9, 0):
        return False
    return all(
        tensor.shape[-1] % TMA_WIDTH == 0
        and tensor.shape[-2] % TMA_WIDTH == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def store_window(tensor: Tensor, rows: int, columns: int, tile: Tile, use_tma: bool) -> Any:
    """A window to store [rows, columns] tiles through, None where stores go by pointers."""
    if not (use_tma and tile.tma_store and tensor.numel()):
        return None
    return Window(tensor, rows, columns)


def load_window(tensor: Tensor | None, rows: int, columns: int, use_tma: bool) -> Any:
    """A [rows, columns] window over `tensor`, its leading dimensions flattened; None of None."""
    if tensor is None or not use_tma:
        return tensor
    return Window(tensor, rows, columns)


@functools.cache
def launch_options(tile: Tile, use_tma: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the compile-time constants and launch settings that every tiled kernel takes.

    One dictionary for all calls with the same arguments: callers unpack it.
    """
    return {
        "USE_TMA": use_tma,
        "TMA_STORE": use_tma and tile.tma_store,
        # float32 exists for exactness here, so it does not take the 10-bit tensor-core path.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **({"maxnreg": tile.max_registers} if tile.max_registers else {}),
    }
