"""Shared experts run while tokens travel, once a forward, and never for other tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epctl.runtime import dispatch
from epctl.runtime.dispatch import RowSplits
from epctl.runtime.recompute import _recompute_forward
from epctl.runtime.shared_experts import run_shared_early

HERE = RowSplits([4], [4], group=None)  # type: ignore[arg-type]


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("shared")
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("shared's gradient")
        return 2 * gradients[0], None


class Shared(nn.Module):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.events = events

    def forward(self, x: Tensor) -> Tensor:
        return Marked.apply(x, self.events) * self.weight


class Block(nn.Module):
    """Routed experts are the exchange alone; `order` is when the block asks for shared ones."""

    def __init__(self, order: str, events: list[str]) -> None:
        super().__init__()
        self.shared_experts = Shared(events)
        self.order = order
        self.early = run_shared_early(self)

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.early is not None
        first = self.shared_experts(hidden) if self.order == "first" else 0
        if self.order == "interrupted":
            self.early.run_ahead()
            raise InterruptedError
        x_TD = hidden.view(-1, 3)
        finish = dispatch.start_exchange(x_TD, HERE)
        self.early.run_ahead()
        routed = finish().view(hidden.shape)
        asked = hidden * 1.5 if self.order == "other tokens" else hidden
        return routed + (first if self.order == "first" else self.shared_experts(asked))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each exchange leaves at `start` and is there at `arrive`."""
    seen: list[str] = []

    class Work:
        def wait(self) -> None:
            seen.append("arrive")

    def start(rows: Tensor, splits: RowSplits) -> tuple[Tensor, Work]:
        seen.append("start")
        return rows.clone(), Work()

    monkeypatch.setattr(dispatch, "_start", start)
    return seen


def run(block: Block) -> tuple[Tensor, Tensor]:
    hidden = torch.arange(12.0).view(2, 2, 3).requires_grad_()
    y = block(hidden)
    y.backward(torch.ones_like(y))
    assert hidden.grad is not None
    return y, hidden.grad


def test_they_run_while_tokens_and_gradients_travel(events: list[str]) -> None:
    y, gradient = run(Block("last", events))
    one_way = ["start", "shared", "arrive"]
    assert events == [*one_way, "start", "shared's gradient", "arrive"]
    torch.testing.assert_close(y.flatten(), 3 * torch.arange(12.0))
    torch.testing.assert_close(gradient, torch.full((2, 2, 3), 3.0))


def test_a_block_that_asks_first_is_served_first(events: list[str]) -> None:
    y, gradient = run(Block("first", events))
    assert events[:3] == ["shared", "start", "arrive"]
    assert events.count("shared") == events.count("shared's gradient") == 1
    torch.testing.assert_close(y.flatten(), 3 * torch.arange(12.0))
    torch.testing.assert_close(gradient, torch.full((2, 2, 3), 3.0))


@pytest.mark.filterwarnings("ignore:shared experts ran twice")
def test_other_tokens_are_computed_when_asked_for(events: list[str]) -> None:
    y, gradient = run(Block("other tokens", events))
    assert events.count("shared") == 2
    torch.testing.assert_close(y.flatten(), 4 * torch.arange(12.0))
    torch.testing.assert_close(gradient, torch.full((2, 2, 3), 4.0))
    with pytest.warns(UserWarning, match="ran twice"):
        Block("other tokens", events)(torch.ones(2, 2, 3))


def test_an_interrupted_forward_leaves_nothing_behind(events: list[str]) -> None:
    block = Block("interrupted", events)
    with pytest.raises(InterruptedError):
        block(torch.ones(2, 2, 3))
    assert block.early is not None
    assert block.early.tokens is None
    assert block.early.output is None


@pytest.mark.filterwarnings("ignore:shared experts ran twice")
@pytest.mark.parametrize("order", ["first", "last", "other tokens"])
def test_a_recomputed_forward_runs_them_in_the_same_order(events: list[str], order: str) -> None:
    plain, again = Block(order, events), Block(order, events)
    _recompute_forward(again)
    for _ in range(2):
        for got, wanted in zip(run(again), run(plain), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_parameters_keep_their_names_and_a_block_without_is_left_alone(events: list[str]) -> None:
    block = Block("last", events)
    assert [name for name, _ in block.named_parameters()] == ["shared_experts.weight"]
    assert list(block.state_dict()) == ["shared_experts.weight"]
    assert run_shared_early(nn.Linear(2, 2)) is None
