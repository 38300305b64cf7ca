"""Gradients of expert biases: sums over an expert's rows, in row order, so they are deterministic.

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

BLOCK_ROWS = 32
BLOCK_COLUMNS = 64


@triton.jit
def _row_sum_kernel(
    rows_ptr,
    row_weights_ptr,
    pair_of_row_ptr,
    offsets_ptr,
    first_rows_ptr,
    out_ptr,
    width,
    row_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of columns of one expert; its rows start at `first_rows_ptr` in the operand."""
    expert = tl.program_id(0)
    begin = tl.load(offsets_ptr + expert)
    count = tl.load(offsets_ptr + expert + 1) - begin
    first = tl.load(first_rows_ptr + expert)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, count, BLOCK_M):
        row = start + lane
        inside = (row < count)[:, None] & (columns < width)[None, :]
        at = rows_ptr + (first + row).to(tl.int64)[:, None] * row_stride + columns[None, :]
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if row_weights_ptr is not None:
            pair = tl.load(pair_of_row_ptr + begin + row, mask=row < count, other=0)
            weight = tl.load(row_weights_ptr + pair, mask=row < count, other=0.0)
            values = values * weight[:, None]
        total += tl.sum(values, axis=0)
    out_at = out_ptr + expert.to(tl.int64) * width + columns
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=columns < width)


def _row_sums(
    rows: Tensor, bias: Tensor, first_rows_E: Tensor, weights: Tensor | None, tables: RoutingTables
) -> Tensor:
    out = torch.empty_like(bias)
    num_experts, width = bias.shape
    launch(
        _row_sum_kernel,
        (num_experts, ceil_div(width, BLOCK_COLUMNS)),
        rows,
        weights,
        tables.pair_of_row_N,
        tables.offsets_E,
        first_rows_E,
        out,
        width,
        rows.stride(0),
        BLOCK_M=BLOCK_ROWS,
        BLOCK_N=BLOCK_COLUMNS,
    )
    return out


def gate_up_bias_gradient(dh: Tensor, biases: list[Tensor], tables: RoutingTables) -> list[Tensor]:
    """Returns the gradients of gate's and up's biases, or of up's alone, from that of H."""
    parts = dh.split(biases[0].shape[1], dim=1)
    return [
        _row_sums(part, bias, tables.offsets_E, None, tables)
        for part, bias in zip(parts, biases, strict=True)
    ]


def down_bias_gradient(
    dy: Tensor, b2_ED: Tensor, weights_TK: Tensor, tables: RoutingTables
) -> Tensor:
    """Returns the gradient of the down bias; `dy` is what `spread` returns."""
    return _row_sums(dy, b2_ED, tables.padded_offsets_E, weights_TK, tables)


def add_bias_to_weight_gradient(
    dweights_TK: Tensor, dy_TD: Tensor, b2_ED: Tensor, experts_TK: Tensor
) -> Tensor:
    """Returns the router weights' gradient with what the down bias adds: dy times that bias.

    The kernels find the rest from the activation alone, which the bias is no part of.
    """
    of_expert_TE = dy_TD.float() @ b2_ED.float().T
    added_TK = of_expert_TE.gather(1, experts_TK.clamp(min=0))
    return dweights_TK + torch.where(experts_TK >= 0, added_TK, 0.0)
