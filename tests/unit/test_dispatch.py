"""Which ranks a token is sent to, and how many bytes that saves; no process group needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from host_reads import READING_METHODS, HostReads
from torch import Tensor

from epctl.errors import ResourceError
from epctl.kernels.row_messages import choices_by_rank
from epctl.runtime import dispatch
from epctl.runtime.dispatch import RowSplits

# Moonlight: rows of 2048 bfloat16, top-6 of 64; a row's metadata is 6 int32 ids, 6 float32 weights.
HIDDEN_BYTES, TOP_K, NUM_EXPERTS = 2048 * 2, 6, 64
METADATA_BYTES = TOP_K * (4 + 4)


def test_choices_are_counted_by_rank() -> None:
    experts = torch.tensor([[0, 1, 5], [4, 5, 6], [-1, 2, -1], [-1, -1, -1]])
    expected = [[2, 0, 1, 0], [0, 0, 2, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert choices_by_rank(experts, 2, 4).tolist() == expected


def test_no_tokens_need_nobody() -> None:
    assert choices_by_rank(torch.zeros(0, 3, dtype=torch.int64), 2, 4).shape == (0, 4)


@pytest.mark.parametrize(("ep", "bound", "expected_share"), [(4, 0.58, 0.558), (8, 0.78, 0.756)])
def test_bytes_against_one_row_an_expert(ep: int, bound: float, expected_share: float) -> None:
    """Random routing; dispatch with metadata and the way back, the reference without metadata."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, NUM_EXPERTS, generator=generator)
    experts = scores.topk(TOP_K).indices
    num_rows = int((choices_by_rank(experts, NUM_EXPERTS // ep, ep) > 0).sum())
    assert num_rows / experts.numel() == pytest.approx(expected_share, abs=0.003)
    moved = num_rows * (2 * HIDDEN_BYTES + METADATA_BYTES) + 2 * 2 * 8 * ep * ep  # and the counts
    assert moved / (experts.numel() * 2 * HIDDEN_BYTES) <= bound


def test_more_rows_than_allowed_are_refused_before_they_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    splits = RowSplits([1, 2], [300, 200], group=None)  # type: ignore[arg-type]
    dispatch._require_room(splits, 500, 64)
    dispatch._require_room(splits, None, 64)
    with pytest.raises(ResourceError, match=r"500 rows .* rank 3.* is 499 "):
        dispatch._require_room(splits, 499, 64)


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_host_waits_once_a_layer(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the counts, which say how much memory to take; forward, the way back and backward."""
    read: list[str] = []
    for name in READING_METHODS:
        own = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda *a, name=name, own=own: read.append(name) or own(*a)
        )
    x_TD = torch.randn(9, 16, requires_grad=True)
    weights_TK = torch.rand(9, 3, requires_grad=True)
    experts_TK = torch.rand(9, 8).topk(3).indices
    with HostReads() as reads:
        sent = dispatch.dispatch(x_TD, experts_TK, weights_TK, 8, alone)
        y_RD = sent.x_RD * sent.weights_RK.sum(dim=1, keepdim=True)
        dispatch.combine(y_RD, sent).backward(torch.ones(9, 16))
    assert [*read, *reads.found] == ["tolist"]
    assert x_TD.grad is not None
    assert weights_TK.grad is not None
