"""Which row goes where, worked out on the device, and the sum that brings rows back to tokens.

A counting sort by expert, stable, without a host synchronisation: the host allocates by bounds
that it knows (the pairs held here, or every pair; every expert one part-filled tile), and the
device says how much of them is used. Three launches: count each chunk of pairs, turn counts into
positions, place.
Shape suffixes: see reference.py; M is the number of tiles that could be needed.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch, next_power_of_2
from epctl.kernels.tile_access import jit_for_routed

# Pairs that one program ranks against each other, all to all: 16 K comparisons in registers.
CHUNK = 128

# Rows that `spread` rounds an expert up to; the weight gradients' blocks divide it.
PADDING = 64


class RoutingTables(NamedTuple):
    """The sorted order. All int32, all on the device.

    Attributes:
        row_of_pair_N: the row of pair `token * K + choice`, -1 for a pair held elsewhere.
        padded_row_of_pair_N: the same where every expert starts at its padded offset.
        pair_of_row_N: its inverse; rows beyond the last used one are not written.
        offsets_E: [E + 1], first row of each expert, and the number of rows used.
        padded_offsets_E: [E + 1], the same with each expert's rows rounded up to PADDING.
        tile_expert_M: the expert of each tile of rows.
        tile_row_M: each tile's first row.
        num_tiles_1: how many tiles are used.
    """

    row_of_pair_N: Tensor
    padded_row_of_pair_N: Tensor
    pair_of_row_N: Tensor
    offsets_E: Tensor
    padded_offsets_E: Tensor
    tile_expert_M: Tensor
    tile_row_M: Tensor
    num_tiles_1: Tensor


def max_tiles(num_rows: int, num_experts: int, block_rows: int) -> int:
    """Returns the most tiles of `block_rows` rows that any routing of `num_rows` rows needs."""
    part_filled = min(num_experts, num_rows)
    return part_filled + max(0, num_rows - part_filled) // block_rows


@jit_for_routed
def _count_kernel(
    experts_ptr,
    counts_ptr,
    totals_ptr,
    num_pairs,
    num_chunks,
    NUM_EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    ids = tl.arange(0, EXPERT_BLOCK)
    count = tl.sum((expert[:, None] == ids[None, :]).to(tl.int32), axis=0)
    held = ids < NUM_EXPERTS
    tl.store(counts_ptr + ids * num_chunks + chunk, count, mask=held)
    tl.atomic_add(totals_ptr + ids, count, mask=held & (count > 0))


@jit_for_routed
def _position_kernel(
    counts_ptr,
    totals_ptr,
    offsets_ptr,
    padded_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    num_chunks,
    NUM_EXPERTS: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(0)
    ids = tl.arange(0, EXPERT_BLOCK)
    totals = tl.load(totals_ptr + ids, mask=ids < NUM_EXPERTS, other=0)
    tiles = (totals + TILE_ROWS - 1) // TILE_ROWS
    first_row = tl.sum(tl.where(ids < expert, totals, 0))
    first_tile = tl.sum(tl.where(ids < expert, tiles, 0))
    own_rows = tl.sum(tl.where(ids == expert, totals, 0))
    own_tiles = tl.sum(tl.where(ids == expert, tiles, 0))
    padded = (totals + PADDING - 1) // PADDING * PADDING
    tl.store(offsets_ptr + expert, first_row)
    tl.store(padded_offsets_ptr + expert, tl.sum(tl.where(ids < expert, padded, 0)))
    if expert == NUM_EXPERTS - 1:
        tl.store(offsets_ptr + NUM_EXPERTS, first_row + own_rows)
        tl.store(padded_offsets_ptr + NUM_EXPERTS, tl.sum(padded))
        tl.store(num_tiles_ptr, first_tile + own_tiles)
    lane = tl.arange(0, BLOCK)
    position = first_row
    for start in range(0, num_chunks, BLOCK):
        chunk = start + lane
        at = counts_ptr + expert * num_chunks + chunk
        count = tl.load(at, mask=chunk < num_chunks, other=0)
        tl.store(at, position + tl.cumsum(count, 0) - count, mask=chunk < num_chunks)
        position += tl.sum(count)
    for start in range(0, own_tiles, BLOCK):
        tile = start + lane
        used = tile < own_tiles
        tl.store(tile_expert_ptr + first_tile + tile, expert + tile * 0, mask=used)
        tl.store(tile_row_ptr + first_tile + tile, first_row + tile * TILE_ROWS, mask=used)


@jit_for_routed
def _place_kernel(
    experts_ptr,
    positions_ptr,
    offsets_ptr,
    padded_offsets_ptr,
    row_of_pair_ptr,
    padded_row_of_pair_ptr,
    pair_of_row_ptr,
    num_pairs,
    num_chunks,
    NUM_EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + lane
    exists = pair < num_pairs
    expert = tl.load(experts_ptr + pair, mask=exists, other=-1).to(tl.int32)
    held = (expert >= 0) & (expert < NUM_EXPERTS)
    earlier = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    first = tl.load(positions_ptr + expert * num_chunks + chunk, mask=held, other=0)
    row = tl.where(held, first + rank, -1)
    tl.store(row_of_pair_ptr + pair, row, mask=exists)
    padding = tl.load(padded_offsets_ptr + expert, mask=held, other=0)
    padding -= tl.load(offsets_ptr + expert, mask=held, other=0)
    tl.store(padded_row_of_pair_ptr + pair, row + padding, mask=exists)
    tl.store(pair_of_row_ptr + row, pair, mask=held)


def routing_tables(
    experts_TK: Tensor, num_experts: int, block_rows: int, num_rows: int
) -> RoutingTables:
    """Returns the stable order of (token, choice) pairs by expert, for tiles of `block_rows` rows.

    Ids outside 0 to `num_experts - 1` are pairs held elsewhere: they get no row.

    Args:
        num_rows: rows to allocate, no fewer than there are pairs held here.
    """
    pairs = experts_TK.contiguous()
    num_pairs = pairs.numel()
    num_chunks = ceil_div(num_pairs, CHUNK)
    num_tiles = max_tiles(num_rows, num_experts, block_rows)
    expert_block = next_power_of_2(num_experts)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": pairs.device}
    tables = RoutingTables(
        row_of_pair_N=torch.empty(num_pairs, **integers),
        padded_row_of_pair_N=torch.empty(num_pairs, **integers),
        pair_of_row_N=torch.empty(num_rows, **integers),
        offsets_E=torch.empty(num_experts + 1, **integers),
        padded_offsets_E=torch.empty(num_experts + 1, **integers),
        tile_expert_M=torch.empty(num_tiles, **integers),
        tile_row_M=torch.empty(num_tiles, **integers),
        num_tiles_1=torch.empty(1, **integers),
    )
    totals_E = torch.zeros(num_experts, **integers)
    counts = torch.empty(num_experts * num_chunks, **integers)
    if num_pairs:
        launch(
            _count_kernel,
            (num_chunks,),
            pairs,
            counts,
            totals_E,
            num_pairs,
            num_chunks,
            NUM_EXPERTS=num_experts,
            CHUNK=CHUNK,
            EXPERT_BLOCK=expert_block,
            num_warps=max(4, min(16, expert_block // 32)),
        )
    launch(
        _position_kernel,
        (num_experts,),
        counts,
        totals_E,
        tables.offsets_E,
        tables.padded_offsets_E,
        tables.tile_expert_M,
        tables.tile_row_M,
        tables.num_tiles_1,
        num_chunks,
        NUM_EXPERTS=num_experts,
        EXPERT_BLOCK=expert_block,
        TILE_ROWS=block_rows,
        PADDING=PADDING,
        BLOCK=1024,
    )
    if num_pairs:
        launch(
            _place_kernel,
            (num_chunks,),
            pairs,
            counts,
            tables.offsets_E,
            tables.padded_offsets_E,
            tables.row_of_pair_N,
            tables.padded_row_of_pair_N,
            tables.pair_of_row_N,
            num_pairs,
            num_chunks,
            NUM_EXPERTS=num_experts,
            CHUNK=CHUNK,
        )
    return tables


@jit_for_routed
def _spread_kernel(
    tokens_ptr,
    out_ptr,
    padded_row_of_pair_ptr,
    offsets_ptr,
    padded_offsets_ptr,
    wide_ptr,
    narrow_ptr,
    num_tokens,
    num_rows,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if program < num_tokens:
        token = program.to(tl.int64)
        values = tl.load(tokens_ptr + token * HIDDEN + column, mask=column < HIDDEN, other=0.0)
        for choice in tl.static_range(TOP_K):
            row = tl.load(padded_row_of_pair_ptr + token * TOP_K + choice).to(tl.int64)
            limit = tl.where(row >= 0, HIDDEN, 0)
            tl.store(out_ptr + row * HIDDEN + column, values, mask=column < limit)
    elif program < num_tokens + NUM_EXPERTS:
        # One program for each expert's padding, which is shorter than a block of rows.
        expert = program - num_tokens
        used = tl.load(offsets_ptr + expert + 1) - tl.load(offsets_ptr + expert)
        start = tl.load(padded_offsets_ptr + expert) + used
        zeros = tl.zeros((BLOCK,), dtype=out_ptr.dtype.element_ty)
        at = out_ptr + start.to(tl.int64) * HIDDEN + column
        for _ in range(start, tl.load(padded_offsets_ptr + expert + 1)):
            tl.store(at, zeros, mask=column < HIDDEN)
            at += HIDDEN
    elif WIDE > 0:
        # One program for each row of the block after the last used one, if the tensors have it.
        row = tl.load(offsets_ptr + NUM_EXPERTS).to(tl.int64) + program - num_tokens - NUM_EXPERTS
        zero = tl.zeros((BLOCK,), dtype=out_ptr.dtype.element_ty)
        wide = tl.where(row < num_rows, WIDE, 0)
        narrow = tl.where(row < num_rows, NARROW, 0)
        for start in range(0, WIDE, BLOCK * tl.num_programs(1)):
            tl.store(wide_ptr + row * WIDE + start + column, zero, mask=start + column < wide)
            tl.store(narrow_ptr + row * NARROW + start + column, zero, mask=start + column < narrow)


def spread(
    tokens_TD: Tensor,
    tables: RoutingTables,
    top_k: int,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns each row's token at the expert's padded offset, and zeros in the padding.

    A token is read once and written for each of its choices: a gather would read it as often.

    Args:
        beside: two tensors of rows, the wider first, in which the block of rows after the last
            used one is zeroed: weight gradients multiply them by the padding's zeros, and what an
            allocation happens to hold may be NaN.
    """
    num_rows, (num_tokens, hidden) = len(tables.pair_of_row_N), tokens_TD.shape
    num_experts = tables.offsets_E.numel() - 1
    num_padded = num_rows + min(num_experts, num_rows) * (PADDING - 1)
    out = tokens_TD.new_empty(ceil_div(num_padded, PADDING) * PADDING, hidden)
    block = min(2048, next_power_of_2(hidden))
    wide, narrow = (None, None) if beside is None else beside
    num_programs = num_tokens + num_experts + (0 if beside is None else PADDING)
    launch(
        _spread_kernel,
        (num_programs, ceil_div(hidden, block)),
        tokens_TD,
        out,
        tables.padded_row_of_pair_N,
        tables.offsets_E,
        tables.padded_offsets_E,
        wide,
        narrow,
        num_tokens,
        num_rows,
        HIDDEN=hidden,
        TOP_K=top_k,
        NUM_EXPERTS=num_experts,
        WIDE=0 if wide is None else wide.shape[1],
        NARROW=0 if narrow is None else narrow.shape[1],
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
    return out


@jit_for_routed
def _combine_kernel(
    rows_ptr,
    weights_ptr,
    row_of_pair_ptr,
    out_ptr,
    partial_ptr,
    dweights_ptr,
    num_rows,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if NUM_PARTS > 0 and tl.program_id(1) == 0:
        part = tl.arange(0, PART_BLOCK)
        for choice in tl.static_range(TOP_K):
            pair = token * TOP_K + choice
            pair_row = tl.load(row_of_pair_ptr + pair).to(tl.int64)
            parts = tl.where(pair_row >= 0, NUM_PARTS, 0)
            at = partial_ptr + part.to(tl.int64) * num_rows + pair_row
            tl.store(dweights_ptr + pair, tl.sum(tl.load(at, mask=part < parts, other=0.0)))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(row_of_pair_ptr + token * TOP_K + choice).to(tl.int64)
        # A pair held elsewhere adds nothing, also where its weight is not finite.
        limit = tl.where(row >= 0, HIDDEN, 0)
        value = tl.load(rows_ptr + row * HIDDEN + column, mask=column < limit, other=0.0)
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * TOP_K + choice)
            total += tl.where(row >= 0, weight, 0.0) * value.to(tl.float32)
        else:
            total += value.to(tl.float32)
    tl.store(
        out_ptr + token * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=column < HIDDEN
    )


def combine(
    rows_ND: Tensor,
    row_of_pair_N: Tensor,
    weights_TK: Tensor | None,
    top_k: int,
    partial_PN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the sum of each token's rows, [T, D], times its float32 weights if given.

    With `partial_PN`, P partial sums for each row, also returns their totals for each choice,
    float32 [T, K]: the gradient of the router's weights, for one launch less.
    """
    num_tokens, (num_rows, hidden) = row_of_pair_N.numel() // top_k, rows_ND.shape
    out_TD = rows_ND.new_empty(num_tokens, hidden)
    num_parts = 0 if partial_PN is None else len(partial_PN)
    dweights_TK = None
    if partial_PN is not None:
        dweights_TK = partial_PN.new_empty(num_tokens, top_k)
    block = min(2048, next_power_of_2(hidden))
    launch(
        _combine_kernel,
        (num_tokens, ceil_div(hidden, block)),
        rows_ND,
        weights_TK,
        row_of_pair_N,
        out_TD,
        partial_PN,
        dweights_TK,
        num_rows,
        HIDDEN=hidden,
        TOP_K=top_k,
        WEIGHTED=weights_TK is not None,
        NUM_PARTS=num_parts,
        PART_BLOCK=next_power_of_2(max(1, num_parts)),
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
    return out_TD, dweights_TK
