"""Muon over ZeRO x EP x accumulation x clipping x a starved expert equals the one-rank run.

Float32, gloo, four steps with a schedule. Losses and norms agree to 1e-6, weights to 2e-6 and
summed updates to 1e-4, norm-wise relative for each tensor: the polynomial amplifies rounding in
the null space of a rank-poor gradient.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

LOSS_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 2e-6
UPDATE_TOLERANCE = 1e-4
CLIPPED, UNCLIPPED = 0.5, 0.0
BASELINES = list(itertools.product((CLIPPED, UNCLIPPED), (False, True)))


def case(
    zero: int, ep: int, accumulation: int, clipping: float, starved: bool, **more: Any
) -> dict[str, Any]:
    name = f"zero{zero}-ep{ep}-acc{accumulation}-clip{clipping}-{'starved' if starved else 'fed'}"
    return {
        "name": "-".join([name, *more.get("label", [])]),
        "zero": zero,
        "ep": ep,
        "accumulation": accumulation,
        "clipping": clipping,
        "starved": starved,
        **more,
    }


OFFLOAD = {"label": ["offload"], "flags": {"optim.offload": True}}
SMALL_SUB_GROUPS = {"label": ["sub3000"], "zero_options": {"sub_group_size": 3000}}

# Pairwise; the full product is below, marked slow.
PAIRWISE: dict[int, list[dict[str, Any]]] = {
    1: [
        case(1, 1, 4, CLIPPED, True),
        case(2, 1, 1, UNCLIPPED, False),
        case(3, 1, 4, UNCLIPPED, True),
    ],
    2: [
        case(0, 2, 4, CLIPPED, True),
        case(1, 1, 1, UNCLIPPED, True),
        case(1, 2, 4, UNCLIPPED, False, **OFFLOAD),
        case(2, 2, 4, CLIPPED, True, **OFFLOAD),
        case(3, 1, 4, CLIPPED, False),
        case(3, 2, 4, UNCLIPPED, True, **OFFLOAD),
        case(3, 2, 4, CLIPPED, True, **SMALL_SUB_GROUPS),
    ],
    4: [
        case(0, 1, 4, UNCLIPPED, True),
        case(0, 2, 1, CLIPPED, False),
        case(0, 4, 4, CLIPPED, True),
        case(1, 2, 4, UNCLIPPED, True),
        case(1, 4, 1, CLIPPED, True),
        case(2, 1, 1, CLIPPED, True),
        case(2, 2, 4, CLIPPED, True),
        case(2, 4, 4, UNCLIPPED, False),
        case(3, 1, 1, CLIPPED, True),
        case(3, 2, 4, UNCLIPPED, True),
        case(3, 4, 1, UNCLIPPED, False),
    ],
}
FULL = {
    num_ranks: [
        case(*values)
        for values in itertools.product((0, 1, 2, 3), eps, (1, 4), (CLIPPED, UNCLIPPED), (True,))
    ]
    for num_ranks, eps in {1: (1,), 2: (1, 2), 4: (1, 2, 4)}.items()
}


class Outcome:
    """Results of one launch a number of ranks, and the baselines of the same folder."""

    def __init__(
        self, folder: Path, cases: dict[int, list[dict[str, Any]]], timeout: float
    ) -> None:
        self.folder = folder
        baselines = [case(0, 1, 1, c, s, label=["base"], keep_initial=True) for c, s in BASELINES]
        self.results: dict[tuple[int, str], Any] = {}
        for num_ranks, run in cases.items():
            place = folder / str(num_ranks)
            place.mkdir()
            run = baselines + run if num_ranks == 1 else run
            ranks = run_ranks("muon_ranks", num_ranks, place, json.dumps(run), timeout=timeout)
            for each in run:
                self.results[num_ranks, each["name"]] = [rank[each["name"]] for rank in ranks]

    def baseline(self, run: dict[str, Any]) -> dict[str, Any]:
        return case(0, 1, 1, run["clipping"], run["starved"], label=["base"])

    def weights(self, num_ranks: int, name: str) -> dict[str, torch.Tensor]:
        files = sorted((self.folder / str(num_ranks) / name).glob("*.safetensors"))
        return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def pairwise(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("pairwise"), PAIRWISE, timeout=240)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("full"), FULL, timeout=1500)


def flatten(cases: dict[int, list[dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(num_ranks, run, id=f"{num_ranks}ranks-{run['name']}")
        for num_ranks, runs in cases.items()
        for run in runs
    ]


def check(outcome: Outcome, num_ranks: int, run: dict[str, Any]) -> None:
    base = outcome.baseline(run)
    expected, results = outcome.results[1, base["name"]][0], outcome.results[num_ranks, run["name"]]
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
        assert result["norms"] == pytest.approx(expected["norms"], rel=LOSS_TOLERANCE)
    before = outcome.weights(1, "initial")
    wanted = outcome.weights(1, base["name"])
    found = outcome.weights(num_ranks, run["name"])
    assert found.keys() == wanted.keys() == before.keys()
    for name, tensor in wanted.items():
        error = float((found[name] - tensor).norm())
        assert error <= WEIGHT_TOLERANCE * float(tensor.norm()), name
        update = float((tensor - before[name]).norm())
        assert error <= UPDATE_TOLERANCE * update or update == 0, name


@pytest.mark.parametrize(("num_ranks", "run"), flatten(PAIRWISE))
def test_equals_the_one_rank_run(pairwise: Outcome, num_ranks: int, run: dict[str, Any]) -> None:
    check(pairwise, num_ranks, run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("num_ranks", "run"), flatten(FULL))
def test_equals_the_one_rank_run_on_the_full_grid(
    full: Outcome, num_ranks: int, run: dict[str, Any]
) -> None:
    check(full, num_ranks, run)


def test_clipping_and_starving_change_the_run(pairwise: Outcome) -> None:
    """Otherwise the grid above would compare four times the same thing."""
    losses = [
        tuple(pairwise.results[1, case(0, 1, 1, c, s, label=["base"])["name"]][0]["losses"])
        for c, s in BASELINES
    ]
    assert len(set(losses)) == len(losses)


def test_every_matrix_has_one_owner(pairwise: Outcome) -> None:
    """23 dense matrices and 48 of experts: each is orthogonalised on exactly one rank."""
    for (num_ranks, name), results in pairwise.results.items():
        assert sum(result["num_owned_matrices"] for result in results) == 71, (num_ranks, name)


def test_the_schedule_reaches_every_group(pairwise: Outcome) -> None:
    for results in pairwise.results.values():
        for result in results:
            by_step = [{rate for _, rate in groups} for groups in result["rates"]]
            assert [len(rates) for rates in by_step] == [1] * len(by_step)
            assert [rates.pop() for rates in by_step] == pytest.approx([1e-3, 2e-3, 1.4e-3, 8e-4])
