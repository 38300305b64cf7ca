"""The full product behind `test_parity.py`; slow, its last run is dated in docs/testing.md."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from test_parity import Found, case, require_parity, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(2400)]
OPTIONS: list[dict[str, Any]] = [
    {"accumulation": 1},
    {"accumulation": 2},
    {"recompute": "full"},
    {"capacity": 1.0},
]


def full_grid(num_ranks: int) -> list[dict[str, Any]]:
    """Every legal (optimizer, ZeRO, EP) with each option, DeepSpeed's layer and no clipping."""
    sizes = [ep for ep in (1, 2, 4) if num_ranks % ep == 0]
    cases = []
    for optim, zero, ep in itertools.product(("muon", "adamw"), (0, 1, 2, 3), sizes):
        cases += [case(optim, zero, ep, **options) for options in OPTIONS]
        if zero > 0:
            cases.append(case(optim, zero, ep, moe="autoep"))
        if optim == "muon":
            cases.append(case(optim, zero, ep, clipping=0.0))
    return cases


GRID = {num_ranks: full_grid(num_ranks) for num_ranks in (1, 2, 4)}
ALL = [(num_ranks, case) for num_ranks, cases in GRID.items() for case in cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_cases(GRID, tmp_path_factory.mktemp("grid"), 750)


@pytest.mark.parametrize(
    ("num_ranks", "case"), ALL, ids=[f"ranks{n}-{case['name']}" for n, case in ALL]
)
def test_full_grid(results: Found, num_ranks: int, case: dict[str, Any]) -> None:
    require_parity(results, num_ranks, case)
