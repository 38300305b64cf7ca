"""Tokens to the rows of the places they go to, and back: each the other's backward.

Indexing sorts its indices in backward, and adding rows by index takes passes over [T, D] in
float32: with tables both ways a gather and a sum are one pass each, and deterministic.
Shape suffixes: T tokens, P places a token may go to, S rows, N pairs of place and token (P*T),
D columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from epctl.kernels import reference
from epctl.kernels.dispatch import choose_implementation


class TokenRows(NamedTuple):
    """Which token a row is of, int32 [S], and a token's row for each place, int32, -1 for none."""

    token_S: Tensor
    row_of_TP: Tensor

    def first(self, num_rows: int) -> TokenRows:
        """Returns the tables of `num_rows` rows, where there was room for more."""
        return TokenRows(self.token_S[:num_rows], self.row_of_TP)


def number_rows(goes_TP: Tensor, num_rows: int) -> tuple[TokenRows, Tensor]:
    """Returns the tables and each row's place, int32 [S]: place by place, tokens in their order.

    All on the device, without a host synchronisation.

    Args:
        goes_TP: whether a token goes to a place, bool.
        num_rows: how many of them are true, which the host must know, or more: then the last rows
            are of token 0.
    """
    num_tokens, num_places = goes_TP.shape
    goes_N = goes_TP.t().reshape(-1)
    row_N = goes_N.cumsum(0, dtype=torch.int32) - 1
    # Pairs without a row write into one row too many.
    target_N = row_N.masked_fill(~goes_N, num_rows).long()
    pair_N = torch.arange(len(goes_N), dtype=torch.int32, device=goes_TP.device)
    pair_S = pair_N.new_zeros(num_rows + 1).scatter_(0, target_N, pair_N)[:num_rows]
    row_of_TP = row_N.masked_fill(~goes_N, -1).view(num_places, num_tokens).t().contiguous()
    return TokenRows(pair_S % num_tokens, row_of_TP), pair_S // num_tokens


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tables: TokenRows, taken_SD: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tables)
        if taken_SD is not None:
            return taken_SD[: len(tables.token_S)]
        return x_TD.index_select(0, tables.token_S)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return add_rows(gradients[0], TokenRows(*ctx.saved_tensors)), None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, tables: TokenRows) -> Tensor:
        # Not saved: a recomputation would go on to here for integers that it does not change. Of a
        # recomputed layer they stay from forward to backward, 4 bytes a row and a token and place.
        ctx.tables = tables
        choice = choose_implementation(rows_SD.device, rows_SD.dtype)
        if choice.implementation != "triton":
            return reference.add_rows(rows_SD, tables.row_of_TP)
        from epctl.kernels.permute import combine

        row_of_TP = tables.row_of_TP
        return combine(rows_SD.contiguous(), row_of_TP.view(-1), None, row_of_TP.shape[1])[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return take_rows(gradients[0], ctx.tables), None


def take_rows(x_TD: Tensor, tables: TokenRows, taken_SD: Tensor | None = None) -> Tensor:
    """Returns each row's token, [S, D] in the dtype of `x_TD`; its backward is `add_rows`.

    Args:
        taken_SD: those rows, and perhaps more behind them, where they have been taken before.
    """
    return cast(Tensor, _TakeRows.apply(x_TD, tables, taken_SD))  # type: ignore[no-untyped-call]


def add_rows(rows_SD: Tensor, tables: TokenRows) -> Tensor:
    """Returns the sum of each token's rows, [T, D] in the dtype of `rows_SD`.

    Added in float32 in the order of places and rounded once; zero for a token that goes nowhere.
    Its backward is `take_rows`.

    Raises ValueError if `EPCTL_KERNELS` names what cannot run here.
    """
    return cast(Tensor, _AddRows.apply(rows_SD, tables))  # type: ignore[no-untyped-call]
