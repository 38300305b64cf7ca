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
CASES = [{"name": layout, "kind": "owners", "layout": layout} for layout in LAYOUTS]
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


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_owners_share_the_matrices(
    outcome: dict[int, tuple[Path, list[Any]]], num_ranks: int
) -> None:
    for layout in LAYOUTS:
        ranks = [rank[layout] for rank in outcome[num_ranks][1]]
        assert sum(rank["num_owned"] for rank in ranks) == NUM_MATRICES
        assert all(rank["num_owned"] for rank in ranks)
        assert (sum(rank["num_sent_bytes"] for rank in ranks) > 0) == (num_ranks > 1)
