"""Held-out loss and sampling of one rank, with an engine that only knows what to answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epctl.runtime import evaluate


class FixedEngine:
    """Answers every call with the same logits."""

    device = torch.device("cpu")

    def __init__(self, logits: list[float]) -> None:
        self.logits = torch.tensor([[logits]])
        self.training = True

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.logits, past_key_values=None)

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_still_gives_a_sample(value: float) -> None:
    engine = FixedEngine([value] * 4)
    sampled = evaluate.sample_continuation(engine, [1], 8, seed=0)
    assert len(sampled) == 8
    assert engine.training


def test_a_masked_token_is_never_sampled() -> None:
    engine = FixedEngine([0.0, float("-inf"), 0.0])
    assert set(evaluate.sample_continuation(engine, [1], 40, seed=0)) == {0, 2}
