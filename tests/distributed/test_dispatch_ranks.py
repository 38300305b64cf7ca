"""Exchanges between eight ranks, however uneven: what arrives, what flows back, how many bytes."""

from __future__ import annotations

from typing import Any

import pytest
from dispatch_ranks import CASES, EP_SIZES
from launch import run_ranks

pytestmark = pytest.mark.distributed

# Float32 against float64, relative to the largest element.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("dispatch_ranks", 8, tmp_path_factory.mktemp("dispatch"), timeout=120)


@pytest.mark.parametrize("recomputed", ["", ", recomputed"])
@pytest.mark.parametrize("ep", EP_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_any_exchange_is_the_dense_sum(
    ranks: list[dict[str, Any]], name: str, ep: int, recomputed: str
) -> None:
    for rank in ranks:
        found = rank[f"{name}, EP {ep}{recomputed}"]
        assert found.keys() == {"y", "dx", "dweights", "dw1", "dw2", "dw3"}
        assert {key: value for key, value in found.items() if not value <= TOLERANCE} == {}


@pytest.mark.parametrize(("ep", "bound"), [(2, 0.4), (4, 0.58), (8, 0.78)])
def test_bytes_that_ranks_hand_over(ranks: list[dict[str, Any]], ep: int, bound: float) -> None:
    """Moonlight's top-6 of 64, metadata and counts included, against one bare row an expert."""
    counted = [rank["bytes"][str(ep)] for rank in ranks]
    assert [c["moved"] for c in counted] == [c["wanted"] for c in counted]
    assert sum(c["moved"] for c in counted) <= bound * sum(c["row_an_expert"] for c in counted)
