"""The full product behind `test_parity.py`; slow, its last run is dated in docs/testing.md."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from test_parity import LOSS_TOLERANCE, WEIGHT_TOLERANCE, case, load_weights, reference_name

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]


def full_grid(num_ranks: int) -> list[dict[str, Any]]:
    """Every legal (optimizer, ZeRO, EP, accumulation, clipping, layer) for so many ranks."""
    sizes = [ep for ep in (1, 2, 4) if num_ranks % ep == 0]
    cases = []
    for optim, zero, ep in itertools.product(("muon", "adamw"), (0, 1, 2, 3), sizes):
        cases += [case(optim, zero, ep, accumulation=count) for count in (1, 2)]
        if zero > 0:
            cases.append(case(optim, zero, ep, moe="autoep"))
        if optim == "muon":
            cases.append(case(optim, zero, ep, clipping=0.0))
    return cases


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("reference")
    cases = [case("muon", 1, 1), case("adamw", 1, 1), case("muon", 1, 1, clipping=0.0)]
    return run_ranks("parity_ranks", 1, folder, json.dumps(cases))[0], folder


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_full_grid(reference: tuple[dict[str, Any], Path], tmp_path: Path, num_ranks: int) -> None:
    expected, reference_folder = reference
    cases = full_grid(num_ranks)
    ranks = run_ranks("parity_ranks", num_ranks, tmp_path, json.dumps(cases), timeout=1500)
    for one in cases:
        name, wanted = one["name"], expected[reference_name(one)]
        for rank in ranks:
            assert rank[name]["losses"] == pytest.approx(wanted["losses"], rel=LOSS_TOLERANCE), name
            assert rank[name]["norms"] == pytest.approx(wanted["norms"], rel=LOSS_TOLERANCE), name
        weights = load_weights(reference_folder / reference_name(one))
        for key, weight in load_weights(tmp_path / name).items():
            distance = float((weights[key] - weight).norm())
            assert distance <= WEIGHT_TOLERANCE * float(weights[key].norm()), (name, key)
