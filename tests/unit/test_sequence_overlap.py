"""Half of the heads attend while the other half travels, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epctl.runtime import dispatch
from epctl.runtime.sequence import attention
from epctl.runtime.sequence.attend import Rule
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.heads import halves, place_heads


def test_halves_share_no_head_and_leave_none_out() -> None:
    for heads, kv, ranks in ((16, 16, 4), (28, 4, 2), (32, 8, 4), (30, 30, 4), (6, 3, 1)):
        placement = place_heads(heads, kv, ranks)
        first, second = halves(placement, heads, kv)
        for rank in range(ranks):
            assert [*first.query[rank], *second.query[rank]] == [*placement.query[rank]]
            assert [*first.kv[rank], *second.kv[rank]] == [*placement.kv[rank]]
            assert second.kv_of_query(rank, heads, kv) in (
                None,
                [h // (heads // kv) - second.kv[rank].start for h in second.query[rank]],
            )


def test_a_single_key_head_does_not_travel_twice() -> None:
    placement = place_heads(28, 4, 4)
    assert halves(placement, 28, 4) == [placement]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plays the exchange of two ranks, and notes what begins and what is waited for, in order."""
    entries: list[str] = []

    class Work:
        def wait(self) -> None:
            entries.append("wait")

    def start(rows: Tensor, splits: Any) -> tuple[Tensor, Any]:
        entries.append("start")
        return rows.new_ones(sum(splits.received), *rows.shape[1:]), Work()

    whole = attention.attend

    def attend(*given: Any) -> Tensor:
        entries.append("attend")
        out = whole(*given)
        out.register_hook(lambda _: entries.append("attend back"))
        return out

    monkeypatch.setattr(dispatch, "_start", start)
    monkeypatch.setattr(attention, "attend", attend)
    return entries


def sharded(heads: int = 8) -> Tensor:
    rows = [torch.randn(1, heads, 6, 4, requires_grad=True) for _ in range(3)]
    group = SequenceGroup(0, 2, object())  # type: ignore[arg-type]
    return attention._sharded(*rows, (0, 6, 11), (((0, 11),),), Rule(causal=True), group)


def test_one_half_attends_while_the_other_travels(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "OVERLAPPED_BYTES", 0)
    out = sharded()
    assert out.shape == (1, 8, 6, 4)
    forward = "start start wait attend start wait attend start wait wait"
    assert log == forward.split()
    log.clear()
    out.sum().backward()
    back = [word.replace(" ", "-") for word in log]
    assert " ".join(back) == ("start start wait attend-back start wait attend-back start wait wait")


def test_a_short_exchange_goes_in_one_message(log: list[str]) -> None:
    assert sharded().shape == (1, 8, 6, 4)
    assert log == ["start", "wait", "attend", "start", "wait"]
