"""Attention of one rank's queries over intervals of keys.

Shape suffixes: B batch, H query heads, J key/value heads, Q queries, K keys, D head size,
G intervals of one shape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from epctl.runtime.kept_attention import keeping
from epctl.runtime.sequence.documents import Intervals
from epctl.runtime.sequence.varlen import Span, attend_spans, can_attend


class Rule(NamedTuple):
    """How queries see the keys of their interval."""

    causal: bool
    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None  # keys a query sees, itself included


def attend(
    q_BHQD: Tensor,
    k_BJKD: Tensor,
    v_BJKD: Tensor,
    intervals: Intervals,
    rule: Rule,
    first_query: int = 0,
) -> Tensor:
    """Returns [B, H, Q, D of v]; rows outside every interval are zero.

    Args:
        intervals: in key rows; a query at row `first_query + i` attends within its interval.
        first_query: key row of the first query; 0 and Q = K when queries are not cut.
    """
    with keeping(rule.dropout):
        return _attend_intervals(q_BHQD, k_BJKD, v_BJKD, intervals, rule, first_query)


def _attend_intervals(
    q_BHQD: Tensor,
    k_BJKD: Tensor,
    v_BJKD: Tensor,
    intervals: Intervals,
    rule: Rule,
    first_query: int,
) -> Tensor:
    num_queries, num_keys = q_BHQD.shape[2], k_BJKD.shape[2]
    uncut = num_queries == num_keys
    if uncut and all(row == ((0, num_keys),) for row in intervals):
        return _attend_block(q_BHQD, k_BJKD, v_BJKD, rule)
    pieces = _pieces(intervals, first_query, num_queries, causal=rule.causal)
    if not pieces:
        # Zeros that hang on the inputs: the exchanges behind them run in backward on every rank.
        tie = sum(x[:, :, :0].sum() for x in (q_BHQD, k_BJKD, v_BJKD))
        zeros = v_BJKD.new_zeros(*q_BHQD.shape[:3], v_BJKD.shape[-1])
        return zeros + cast(Tensor, tie)
    if uncut and q_BHQD.shape[0] == 1 and _is_even(pieces, num_queries):
        return _attend_even(q_BHQD, k_BJKD, v_BJKD, len(pieces), rule)
    if can_attend(q_BHQD, k_BJKD, v_BJKD, rule.dropout):
        queries, keys = _spans(pieces, num_queries, num_keys)
        return attend_spans(
            q_BHQD, k_BJKD, v_BJKD, queries, keys,
            causal=rule.causal, window=rule.window, scaling=rule.scaling,
        )  # fmt: skip
    results = _attend_pieces(q_BHQD, k_BJKD, v_BJKD, pieces, rule)
    return _assemble(q_BHQD, v_BJKD, pieces, results)


class _Piece(NamedTuple):
    """Queries [start, stop) of a sequence, in local rows, and the keys they see."""

    row: int
    start: int
    stop: int
    first_key: int
    last_key: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.last_key - self.first_key


# A tower's layers have the same thousand windows: they are laid out once.
@functools.lru_cache(maxsize=64)
def _pieces(
    intervals: Intervals, first_query: int, num_queries: int, *, causal: bool
) -> tuple[_Piece, ...]:
    pieces = []
    for row, documents in enumerate(intervals):
        for first, last in documents:
            start = max(first - first_query, 0)
            stop = min(last - first_query, num_queries)
            if start < stop:
                last_key = stop + first_query if causal else last
                pieces.append(_Piece(row, start, stop, first, last_key))
    return tuple(pieces)


@functools.lru_cache(maxsize=64)
def _spans(
    pieces: tuple[_Piece, ...], num_queries: int, num_keys: int
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Returns the rows of each piece's queries and keys in tensors flattened over the batch."""
    queries = (Span(p.row * num_queries + p.start, p.shape[0]) for p in pieces)
    keys = (Span(p.row * num_keys + p.first_key, p.shape[1]) for p in pieces)
    return tuple(queries), tuple(keys)


@functools.lru_cache(maxsize=64)
def _is_even(pieces: tuple[_Piece, ...], num_rows: int) -> bool:
    """True where pieces of one length follow each other over all rows: frames, tiles, windows."""
    length = pieces[0].shape[0]
    places = range(0, num_rows, length)
    return length * len(pieces) == num_rows and all(
        p.start == p.first_key == place and p.shape == (length, length)
        for p, place in zip(pieces, places, strict=True)
    )


def _attend_even(
    q_1HQD: Tensor, k_1JKD: Tensor, v_1JKD: Tensor, num_pieces: int, rule: Rule
) -> Tensor:
    """Pieces as a batch, without copies: torch's fastest kernels take any strides."""
    q_GHQD, k_GJKD, v_GJKD = (
        x[0].view(x.shape[1], num_pieces, -1, x.shape[3]).transpose(0, 1)
        for x in (q_1HQD, k_1JKD, v_1JKD)
    )
    return _attend_block(q_GHQD, k_GJKD, v_GJKD, rule).transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _attend_pieces(
    q_BHQD: Tensor, k_BJKD: Tensor, v_BJKD: Tensor, pieces: Sequence[_Piece], rule: Rule
) -> list[Tensor]:
    """Returns each piece's [H, q, D]; pieces of one shape run as one batch."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, piece in enumerate(pieces):
        by_shape.setdefault(piece.shape, []).append(index)
    results: list[Tensor] = [q_BHQD] * len(pieces)
    for indices in by_shape.values():
        chosen = [pieces[index] for index in indices]
        q_GHQD = torch.stack([q_BHQD[p.row, :, p.start : p.stop] for p in chosen])
        k_GJKD = torch.stack([k_BJKD[p.row, :, p.first_key : p.last_key] for p in chosen])
        v_GJKD = torch.stack([v_BJKD[p.row, :, p.first_key : p.last_key] for p in chosen])
        attended = _attend_block(q_GHQD, k_GJKD, v_GJKD, rule)
        for index, result in zip(indices, attended.unbind(), strict=True):
            results[index] = result
    return results


def _assemble(
    q_BHQD: Tensor, v_BJKD: Tensor, pieces: Sequence[_Piece], results: list[Tensor]
) -> Tensor:
    """Lays the pieces back in their rows, zeros between them."""
    batch, num_heads, num_queries, _ = q_BHQD.shape
    head_size = v_BJKD.shape[-1]
    rows = []
    for row in range(batch):
        parts, place = [], 0
        for piece, result in zip(pieces, results, strict=True):
            if piece.row == row:
                parts += [v_BJKD.new_zeros(num_heads, piece.start - place, head_size), result]
                place = piece.stop
        parts.append(v_BJKD.new_zeros(num_heads, num_queries - place, head_size))
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows)


def _attend_block(q_BHQD: Tensor, k_BJKD: Tensor, v_BJKD: Tensor, rule: Rule) -> Tensor:
    """Attention of whole blocks; causal queries are the last of their keys."""
    num_queries, num_keys = q_BHQD.shape[2], k_BJKD.shape[2]
    if rule.causal and rule.window is not None and rule.window < num_keys:
        return _attend_window(q_BHQD, k_BJKD, v_BJKD, rule, rule.window)
    if not rule.causal or num_queries == num_keys or num_queries == 1:
        causal = rule.causal and num_queries > 1
        return F.scaled_dot_product_attention(
            q_BHQD,
            k_BJKD,
            v_BJKD,
            dropout_p=rule.dropout,
            is_causal=causal,
            scale=rule.scaling,
            enable_gqa=q_BHQD.shape[1] != k_BJKD.shape[1],
        )
    from torch.nn.attention.bias import causal_lower_right

    # A bias object, not a tensor: the flash kernels know it, so no mask exists on a GPU.
    mask = causal_lower_right(num_queries, num_keys)
    k_BHKD, v_BHKD = _repeated(q_BHQD, k_BJKD), _repeated(q_BHQD, v_BJKD)
    return F.scaled_dot_product_attention(
        q_BHQD, k_BHKD, v_BHKD, attn_mask=mask, dropout_p=rule.dropout, scale=rule.scaling
    )


def _attend_window(
    q_BHQD: Tensor, k_BJKD: Tensor, v_BJKD: Tensor, rule: Rule, window: int
) -> Tensor:
    """Sliding-window attention in blocks of queries: the mask is at most 2 * window wide."""
    num_queries, num_keys = q_BHQD.shape[2], k_BJKD.shape[2]
    shift = num_keys - num_queries
    k_BHKD, v_BHKD = _repeated(q_BHQD, k_BJKD), _repeated(q_BHQD, v_BJKD)
    block = max(window, 128)
    parts = []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        first_key = max(0, start + shift - window + 1)
        query = torch.arange(start + shift, stop + shift, device=q_BHQD.device)[:, None]
        key = torch.arange(first_key, stop + shift, device=q_BHQD.device)[None, :]
        mask = (key <= query) & (key > query - window)
        keys = slice(first_key, stop + shift)
        parts.append(
            F.scaled_dot_product_attention(
                q_BHQD[:, :, start:stop],
                k_BHKD[:, :, keys],
                v_BHKD[:, :, keys],
                attn_mask=mask,
                dropout_p=rule.dropout,
                scale=rule.scaling,
            )
        )
    return torch.cat(parts, dim=2)


def _repeated(q_BHQD: Tensor, k_BJKD: Tensor) -> Tensor:
    """Returns key or value heads repeated to one a query head."""
    times = q_BHQD.shape[1] // k_BJKD.shape[1]
    return k_BJKD if times == 1 else k_BJKD.repeat_interleave(times, dim=1)
