"""Attention over intervals against one masked softmax; intervals from masks and positions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from epctl.errors import InputError
from epctl.runtime.sequence import attend as attend_module
from epctl.runtime.sequence import varlen as varlen_module
from epctl.runtime.sequence.attend import Rule, attend
from epctl.runtime.sequence.documents import Intervals, of_mask, of_offsets, of_positions
from epctl.runtime.sequence.loss import divisor, local_targets
from epctl.runtime.sequence.varlen import can_attend


def masked(q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, rule: Rule, first: int) -> Tensor:
    """The same by a full mask in float64; rows that see nothing are zero."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    query = torch.arange(q.shape[2])[:, None] + first
    key = torch.arange(k.shape[2])[None]
    allowed = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    for row, documents in enumerate(intervals):
        for a, b in documents:
            inside = (query >= a) & (query < b) & (key >= a) & (key < b)
            if rule.causal:
                inside &= key <= query
            if rule.window is not None:
                inside &= key > query - rule.window
            allowed[row] |= inside
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


CASES = [
    (Rule(causal=True), (((0, 21),), ((0, 21),)), 0, 21),
    (Rule(causal=True), (((0, 5), (5, 13), (13, 21)), ((4, 21),)), 0, 21),
    (Rule(causal=True), (((0, 5), (5, 13), (13, 21)), ((0, 9),)), 8, 7),
    (Rule(causal=True), (((0, 21),), ()), 14, 7),
    (Rule(causal=True, window=4), (((0, 21),), ((0, 6), (6, 21))), 0, 21),
    (Rule(causal=True, window=4), (((0, 21),), ((0, 6), (6, 21))), 9, 8),
    (Rule(causal=False), (((0, 7), (7, 14), (14, 21)), ((0, 1), (1, 21))), 0, 21),
    (Rule(causal=False), (((0, 7), (7, 14), (14, 21)), ((0, 1), (1, 21))), 5, 6),
    (Rule(causal=False), (((0, 7), (7, 14), (14, 21)),), 0, 21),
    (Rule(causal=True), (((0, 7), (7, 14), (14, 21)),), 0, 21),
    (Rule(causal=True, window=4), (((0, 7), (7, 14), (14, 21)),), 0, 21),
    (Rule(causal=True), ((), ()), 0, 21),
]


@pytest.mark.parametrize(("rule", "intervals", "first", "queries"), CASES)
def test_attend_equals_one_masked_softmax(
    rule: Rule, intervals: Intervals, first: int, queries: int
) -> None:
    torch.manual_seed(0)
    batch = len(intervals)
    q = torch.randn(batch, 4, queries, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(batch, 2, 21, 6, dtype=torch.float64, requires_grad=True)
    v = torch.randn(batch, 2, 21, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch, 4, queries, 5, dtype=torch.float64)
    found = attend(q, k, v, intervals, rule, first)
    expected = masked(q, k, v, intervals, rule, first)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for own, reference in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(own, reference)


def varlen(q, k, v, offsets_q, offsets_k, most_q, most_k, *, scale=None, window_size=(-1, -1)):
    """What torch's kernel computes, piece by piece; queries and keys of a piece end together."""
    left, right = window_size
    parts = []
    for (a, b), (c, d) in zip(
        pairwise(offsets_q.tolist()), pairwise(offsets_k.tolist()), strict=True
    ):
        assert b - a <= most_q
        assert d - c <= most_k
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)[None]
        allowed = torch.ones_like(place, dtype=torch.bool)
        if right >= 0:
            allowed &= place >= -right
        if left >= 0:
            allowed &= place <= left
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * (scale or q.shape[-1] ** -0.5)
        parts.append(
            torch.einsum(
                "hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), values
            )
        )
    return torch.cat(parts)


@pytest.mark.parametrize(("rule", "intervals", "first", "queries"), CASES[:-1])
def test_ragged_calls_equal_one_masked_softmax(
    rule: Rule, intervals: Intervals, first: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece i of the queries meets piece i of the keys, rows of no piece are zero."""
    calls = []

    def counted(*arguments, **settings):
        calls.append(arguments)
        return varlen(*arguments, **settings)

    monkeypatch.setattr(attend_module, "can_attend", lambda *_: True)
    monkeypatch.setattr(varlen_module, "flash_varlen", lambda: counted)
    test_attend_equals_one_masked_softmax(rule, intervals, first, queries)
    whole = queries == 21 and all(row == ((0, 21),) for row in intervals)
    frames = len(intervals) == 1  # pieces of one length go as a batch
    assert len(calls) == (not whole and not frames)


@pytest.mark.gpu
@pytest.mark.parametrize(("rule", "intervals", "first", "queries"), CASES)
def test_torchs_kernel_attends_to_the_same(
    rule: Rule, intervals: Intervals, first: int, queries: int
) -> None:
    torch.manual_seed(0)
    of_queries, of_keys = (len(intervals), 4, queries, 32), (len(intervals), 2, 21, 32)
    q, k, v, weights = (
        torch.randn(shape, device="cuda").bfloat16()
        for shape in (of_queries, of_keys, of_keys, of_queries)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert can_attend(q, k, v, rule.dropout)
    found = attend(*inputs, intervals, rule, first)
    wide = [x.detach().double().cpu().requires_grad_() for x in inputs]
    expected = masked(*wide, intervals, rule, first)
    gradients = torch.autograd.grad((found * weights).sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights.double().cpu()).sum(), wide)
    # Three roundings of bfloat16 (probabilities, result, gradients), 2^-8 each.
    for own, reference in zip((found, *gradients), (expected, *wanted), strict=True):
        distance = (own.double().cpu() - reference).norm()
        assert distance <= 3 * 2**-8 * reference.norm() + 1e-12


def test_rows_outside_everything_still_hang_on_the_inputs() -> None:
    """Behind them lie exchanges that every rank must enter in backward."""
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, ((),), Rule(causal=True))
    assert not out.any()
    assert all(g is not None for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_padding_left_right_and_none() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert of_mask(mask) == (((0, 3),), ((1, 4),), ((0, 4),), ())


def test_a_mask_with_a_hole_is_refused() -> None:
    with pytest.raises(InputError, match="keeps 2 of the 3 tokens"):
        of_mask(torch.tensor([[1, 0, 1, 0]]))


def test_documents_begin_where_positions_jump() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 7, 8]])
    assert of_positions(positions) == (((0, 3), (3, 5), (5, 6)), ((0, 6),))
    assert of_offsets((0, 3, 5)) == (((0, 3), (3, 5)),)


def test_targets_cross_the_cut() -> None:
    labels = torch.tensor([[5, 6, -100, 8, 9]])
    assert local_targets(labels, 0, 3).tolist() == [[6, -100, 8]]
    assert local_targets(labels, 3, 5).tolist() == [[9, -100]]
    assert divisor(labels, 2).item() == 1.5
    assert divisor(torch.full((1, 4), -100), 2).item() == 0.5
