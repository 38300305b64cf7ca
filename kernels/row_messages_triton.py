"""The two kernels of row_messages.py, a program a block of tokens; see there for the suffixes."""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch, next_power_of_2

LEAST_TOKENS = 64  # of a program
MOST_BLOCKS = 1024  # a program reads what every block before it counted


def _block(num_tokens: int) -> int:
    return max(LEAST_TOKENS, next_power_of_2(ceil_div(num_tokens, MOST_BLOCKS)))


def count(experts_TK: Tensor, num_local_experts: int, num_places: int) -> Tensor:
    """Returns rows and choices of each block of tokens for each place, int32 [P, 2, blocks]."""
    num_tokens, top_k = experts_TK.shape
    block = _block(num_tokens)
    num_blocks = ceil_div(num_tokens, block)
    counted = experts_TK.new_empty(num_places, 2, num_blocks, dtype=torch.int32)
    if num_blocks:
        launch(
            _count_kernel, (num_blocks,),
            experts_TK, counted, num_tokens, num_local_experts, num_places, num_blocks,
            K=top_k, BLOCK_K=next_power_of_2(top_k), BLOCK_T=block, num_warps=4,
        )  # fmt: skip
    return counted


def write(
    experts_TK: Tensor,
    weights_TK: Tensor,
    counted: Tensor,
    num_local_experts: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns token_S, row_of_TP and messages, int32; see `row_messages.write_messages`."""
    num_tokens, top_k = experts_TK.shape
    num_places, _, num_blocks = counted.shape
    token_S = counted.new_zeros(num_rows)
    row_of_TP = counted.new_empty(num_tokens, num_places)
    message_SC = counted.new_empty(num_rows, 2 * top_k)
    if num_blocks:
        launch(
            _write_kernel, (num_blocks,),
            experts_TK, weights_TK, counted, token_S, row_of_TP, message_SC,
            num_tokens, num_local_experts, num_places, num_blocks,
            K=top_k, BLOCK_K=next_power_of_2(top_k), BLOCK_T=_block(num_tokens),
            BLOCKS=next_power_of_2(num_blocks), num_warps=4,
        )  # fmt: skip
    return token_S, row_of_TP, message_SC


@triton.jit
def _load_choices(
    experts_ptr, num_tokens, num_local_experts,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Tokens of this program, places in their tables, expert ids and the place of each (or -1)."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    choice = tl.arange(0, BLOCK_K)
    at = token[:, None] * K + choice[None, :]
    inside = (token[:, None] < num_tokens) & (choice[None, :] < K)
    expert = tl.load(experts_ptr + at, mask=inside, other=-1).to(tl.int32)
    place = tl.where(expert >= 0, expert // num_local_experts, -1)
    return token, at, expert, place


@triton.jit
def _count_kernel(
    experts_ptr, counted_ptr, num_tokens, num_local_experts, num_places, num_blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    _, _, _, place = _load_choices(experts_ptr, num_tokens, num_local_experts, K, BLOCK_K, BLOCK_T)
    counted_ptr += tl.program_id(0)
    for p in range(num_places):
        here = tl.sum((place == p).to(tl.int32), axis=1)
        tl.store(counted_ptr, tl.sum((here > 0).to(tl.int32)))
        tl.store(counted_ptr + num_blocks, tl.sum(here))
        counted_ptr += 2 * num_blocks


@triton.jit
def _write_kernel(
    experts_ptr, weights_ptr, counted_ptr, token_ptr, row_of_ptr, message_ptr,
    num_tokens, num_local_experts, num_places, num_blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rows of a place follow those of the places before; within it those of the blocks before."""
    token, at, expert, place = _load_choices(
        experts_ptr, num_tokens, num_local_experts, K, BLOCK_K, BLOCK_T
    )
    choice = tl.arange(0, BLOCK_K)[None, :]
    is_choice = (token[:, None] < num_tokens) & (choice < K)
    bits = tl.load(weights_ptr + at, mask=is_choice, other=0.0).to(tl.int32, bitcast=True)
    block = tl.arange(0, BLOCKS)
    first = 0
    for p in range(num_places):
        rows = tl.load(counted_ptr + block, mask=block < num_blocks, other=0)
        before = first + tl.sum(tl.where(block < tl.program_id(0), rows, 0))
        first += tl.sum(rows)
        counted_ptr += 2 * num_blocks
        here = place == p
        goes = tl.sum(here.to(tl.int32), axis=1) > 0
        row = before + tl.cumsum(goes.to(tl.int32), axis=0) - 1
        tl.store(
            row_of_ptr + token * num_places + p, tl.where(goes, row, -1), mask=token < num_tokens
        )
        tl.store(token_ptr + row, token.to(tl.int32), mask=goes)
        to = message_ptr + row.to(tl.int64)[:, None] * (2 * K) + choice
        is_row = goes[:, None] & (choice < K)
        tl.store(to, tl.where(here, expert - p * num_local_experts, -1), mask=is_row)
        tl.store(to + K, bits, mask=is_row)
