"""What tokens send to the places of their experts: how many rows, which, and what each says.

By torch it is fifty small operators a layer and direction, and a GPU is through with each before
the host has started the next: two kernels here. The first counts, for the exchange of counts; the
second, which needs to know how many rows there are, numbers them and writes what they say.
Shape suffixes: T tokens, K top_k, P places (ranks of the ep group), S rows, one a token and place,
C columns of a message (2K).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from epctl.kernels.dispatch import choose_implementation
from epctl.kernels.token_rows import TokenRows, number_rows


class Choices(NamedTuple):
    """How many rows and how many choices go to each place, int64 [P, 2], and what was counted.

    Attributes:
        counted: by the reference each token's choices of each place, [T, P]; by Triton the rows
            and the choices of each block of tokens, [P, 2, blocks].
    """

    sent_P2: Tensor
    counted: Tensor


def count_choices(experts_TK: Tensor, num_local_experts: int, num_places: int) -> Choices:
    """Counts on the device, without a host synchronisation.

    Args:
        experts_TK: global expert ids, int64; -1 for a choice that was dropped. The block of place
            p starts at `p * num_local_experts`.
    """
    if _runs_triton(experts_TK):
        from epctl.kernels import row_messages_triton

        counted = row_messages_triton.count(experts_TK.contiguous(), num_local_experts, num_places)
        return Choices(counted.sum(dim=-1), counted)
    choices_TP = choices_by_rank(experts_TK, num_local_experts, num_places)
    sent_P2 = torch.stack(((choices_TP > 0).sum(dim=0), choices_TP.sum(dim=0)), dim=1)
    return Choices(sent_P2, choices_TP)


@torch.no_grad()
def write_messages(
    experts_TK: Tensor,
    weights_TK: Tensor,
    choices: Choices,
    num_local_experts: int,
    num_rows: int,
) -> tuple[TokenRows, Tensor]:
    """Returns the tables of rows, place by place, and a message a row, int32 [S, 2K].

    A message has the ids of the row's experts relative to the place, -1 for those of others, and
    after them the bits of all K weights.

    Args:
        weights_TK: float32.
        choices: of the same experts, by `count_choices`.
        num_rows: rows in all, which the host must know, or more: what is behind them is of token 0
            and says nothing.
    """
    assert weights_TK.dtype == torch.float32, weights_TK.dtype
    if _runs_triton(experts_TK):
        from epctl.kernels import row_messages_triton

        token_S, row_of_TP, message_SC = row_messages_triton.write(
            experts_TK.contiguous(),
            weights_TK.contiguous(),
            choices.counted,
            num_local_experts,
            num_rows,
        )
        return TokenRows(token_S, row_of_TP), message_SC
    tables, place_S = number_rows(choices.counted > 0, num_rows)
    local_SK = local_expert_ids(experts_TK[tables.token_S], place_S, num_local_experts)
    bits_SK = weights_TK[tables.token_S].view(torch.int32)
    return tables, torch.cat((local_SK.int(), bits_SK), dim=1)


def local_expert_ids(experts_SK: Tensor, rank_S: Tensor, num_local_experts: int) -> Tensor:
    """Returns ids relative to each row's destination rank, -1 for experts of other ranks.

    `experts_SK` holds *global* ids; the block of rank p starts at `p * num_local_experts`.
    """
    local_SK = experts_SK - rank_S.unsqueeze(1) * num_local_experts
    elsewhere = (local_SK < 0) | (local_SK >= num_local_experts)
    return local_SK.masked_fill(elsewhere, -1)


def choices_by_rank(experts_TK: Tensor, num_local_experts: int, num_ranks: int) -> Tensor:
    """Returns how many experts of each token are on each rank, [T, P] int32; -1 is nobody's."""
    counts_TP = torch.zeros(
        experts_TK.shape[0], num_ranks, dtype=torch.int32, device=experts_TK.device
    )
    chosen_TK = (experts_TK >= 0).int()
    return counts_TP.scatter_add_(1, experts_TK.clamp_min(0) // num_local_experts, chosen_TK)


def _runs_triton(experts_TK: Tensor) -> bool:
    return choose_implementation(experts_TK.device, torch.float32).implementation == "triton"
