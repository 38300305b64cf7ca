"""Bit-equal gradients fed to an owner give bit-equal updates, however the matrices were cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = ("cut", "spread")
# Whole matrices are mixed by themselves once they are large: here in one layout, not in the other.
CASES = [
    {"name": "cut", "kind": "owners", "layout": "cut"},
    {"name": "spread", "kind": "owners", "layout": "spread", "large": 1},
]
NUM_MATRICES = 4 + 3  # four Parameters of one matrix, a stack of three


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[Any]]]:
    found = {}
    for num_ranks in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"owners{num_ranks}")
        found[num_ranks] = (folder, run_ranks("muon_ranks", num_ranks, folder, json.dumps(CASES)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_weights_are_bit_equal_to_one_rank(
    outcome: dict[int, tuple[Path, list[Any]]], num_ranks: int, layout: str
) -> None:
    expected = torch.load(outcome[1][0] / "cut.pt", weights_only=True)
    found = torch.load(outcome[num_ranks][0] / f"{layout}.pt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [rank[layout]["copied"] for rank in outcome[num_ranks][1]] == [True] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_owners_share_the_matrices(
    outcome: dict[int, tuple[Path, list[Any]]], num_ranks: int
) -> None:
    for layout in LAYOUTS:
        ranks = [rank[layout] for rank in outcome[num_ranks][1]]
        assert sum(rank["num_owned"] for rank in ranks) == NUM_MATRICES
        assert all(rank["num_owned"] for rank in ranks)
        assert (sum(rank["num_sent_bytes"] for rank in ranks) > 0) == (num_ranks > 1)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_an_exchange_is_under_way_while_a_rank_orthogonalises(
    outcome: dict[int, tuple[Path, list[Any]]], num_ranks: int
) -> None:
    """Slices of the next chunk and updates of the one before; on every rank in the same order."""
    ranks = [rank["spread"] for rank in outcome[num_ranks][1]]
    num_travelling = ranks[0]["num_travelling"]
    assert num_travelling > 2
    assert {rank["num_travelling"] for rank in ranks} == {num_travelling}
    orders = []
    for rank in ranks:
        events = [tuple(event) for event in rank["events"]]
        under_way: set[int] = set()
        num_overlapped = 0
        for kind, number in events:
            if kind == "start":
                under_way.add(number)
                # The next chunk's slices, the last one's updates and those just issued.
                assert len(under_way) <= 3
            elif kind == "wait":
                under_way.remove(number)
            else:
                num_overlapped += bool(under_way)
        assert not under_way, "a step ends with nothing on its way"
        num_orthogonalized = sum(kind == "orthogonalize" for kind, _ in events)
        assert num_overlapped == num_orthogonalized > 0
        orders.append([event for event in events if event[0] != "orthogonalize"])
    assert all(order == orders[0] for order in orders)
    assert sum(kind == "start" for kind, _ in orders[0]) == 3 * 2 * num_travelling  # three steps
