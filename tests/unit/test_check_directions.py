"""How far two gradients point the same way, added up in pieces over ranks and parts."""

from __future__ import annotations

import pytest
import torch

from epctl.runtime import check_directions
from epctl.runtime.check_directions import NOTHING, WHOLE, Agreement, cosines


def test_pieces_and_ranks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks hold the same first half, so each counts half of it."""
    monkeypatch.setattr(check_directions, "AT_ONCE", 3)
    generator = torch.Generator().manual_seed(0)
    own, expected = torch.randn(2, 20, generator=generator).unbind()
    agree = check_directions._agreement
    found = {"experts": NOTHING, "attention": agree(own[10:], expected[10:], 4.0, 1.0)}
    for _ in range(2):
        found["experts"] += agree(own[:10], expected[:10], 4.0, 0.5)
    total = found["experts"] + found["attention"]
    assert total.own == pytest.approx(float((own / 4).square().sum()))
    assert total.reference == pytest.approx(float(expected.square().sum()))
    assert total.cosine == pytest.approx(float(torch.cosine_similarity(own, expected, dim=0)))


class Stored(dict[str, torch.Tensor]):
    """As an open safetensors file."""

    get_tensor = dict[str, torch.Tensor].__getitem__


def test_what_was_not_compared_agrees_with_nothing() -> None:
    stored = Stored(
        {"lm_head.weight": torch.ones(3), "model.layers.0.mlp.gate.weight": torch.ones(1)}
    )
    head, router = Agreement(6.0, 12.0, 3.0), Agreement(1.0, 1.0, 1.0)
    assert cosines({"head": head, "router": router}, stored) == {
        "head": 1.0, "router": 1.0, WHOLE: pytest.approx(7 / (13 * 4) ** 0.5)
    }  # fmt: skip
    twice, half = head + head, Agreement(3.0, 6.0, 1.5)
    for other in (twice, half, NOTHING):
        found = cosines({"head": other, "router": router}, stored)
        assert found == {"head": 0.0, "router": 1.0, WHOLE: 0.0}
    assert cosines({}, stored) == {"head": 0.0, "router": 0.0, WHOLE: 0.0}
    elsewhere = Agreement(0.0, 1.0, 0.0)  # a gradient that the reference has not
    assert cosines({"head": head, "router": router, "norms": elsewhere}, stored)["norms"] == 0.0


def test_nothing_agrees_with_nothing_and_with_nothing_else() -> None:
    assert NOTHING.cosine == 1
    assert Agreement(0.0, 0.0, 4.0).cosine == 0
    assert Agreement(0.0, 4.0, 0.0).cosine == 0
    assert Agreement(-4.0, 4.0, 4.0).cosine == -1


def test_what_is_not_finite_agrees_with_nothing() -> None:
    nan = float("nan")
    assert not Agreement(nan, nan, 4.0).cosine > 0.999
