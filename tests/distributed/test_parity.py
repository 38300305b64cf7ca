"""EP and ZeRO change where things live, never what is computed (float32, gloo).

Losses and gradient norms agree to 1e-6, weights after four steps to 2e-6 norm-wise relative, with
the one-rank run. One launch a number of ranks runs all its cases.
"""

from __future__ import annotations

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

# AdamW runs at 1e-3, its usual rate, and with an eps above what rounding leaves of a gradient that
# should be zero: below it, a single element moves by the rate times noise, whatever the topology
# (with 1e-8 weights part by 3e-7 to 2.3e-6 on one and the same processor, with 1e-6 by 6e-8).
ADAMW = {"optim": "adamw", "flags": {"optim.lr": 1e-3, "optim.eps": 1e-6}}


def case(optim: str, zero: int, ep: int, **options: Any) -> dict[str, Any]:
    extra = dict(ADAMW) if optim == "adamw" else {}
    name = "-".join([optim, f"zero{zero}", f"ep{ep}", *(f"{k}{v}" for k, v in options.items())])
    return {"name": name, "zero": zero, "ep": ep, **extra, **options}


# Pairwise over (optimizer, ZeRO, EP, accumulation, clipping, DeepSpeed's own layer, logits made in
# blocks of a few words, what is recomputed of layers and of experts, balance losses with moving
# biases).
CASES = {
    1: [
        case("muon", 1, 1),
        case("adamw", 1, 1),
        case("muon", 0, 1),
        case("muon", 3, 1, accumulation=2),
        case("adamw", 2, 1, accumulation=4),
        case("adamw", 3, 1),
        case("muon", 1, 1, clipping=0.0),
        case("muon", 2, 1, moe="autoep"),
        case("muon", 1, 1, logits_mib=0.002),
        case("muon", 1, 1, balance=True),
        case("muon", 3, 1, balance=True, accumulation=4),
    ],
    2: [
        case("muon", 1, 2),
        case("adamw", 2, 2),
        case("muon", 3, 2, accumulation=4),
        case("adamw", 3, 1),
        case("adamw", 1, 1, accumulation=2),
        case("muon", 2, 1),
        case("muon", 0, 2),
        case("muon", 2, 2, clipping=0.0),
        case("muon", 3, 2, experts="activation"),
        case("adamw", 2, 2, experts="activation", recompute="attention"),
        case("muon", 3, 2, logits_mib=0.002, recompute="attention"),
        case("adamw", 0, 1, logits_mib=0.002),
        case("muon", 0, 2, balance=True, accumulation=2),
    ],
    4: [
        case("muon", 1, 4),
        case("muon", 2, 2),
        case("muon", 3, 4),
        case("muon", 3, 1),
        case("adamw", 1, 2),
        case("adamw", 2, 4),
        case("adamw", 3, 2),
        case("adamw", 3, 4),
        case("muon", 0, 4),
        case("muon", 3, 4, recompute="moe"),
        case("muon", 3, 2, recompute="full"),
        case("adamw", 2, 4, recompute="except_attention"),
        case("muon", 3, 4, balance=True, recompute="moe"),
        case("muon", 2, 2, balance=True, accumulation=2),
        case("muon", 3, 2, accumulation=2),
        case("muon", 3, 2, moe="autoep"),
        case("muon", 1, 2, moe="autoep"),
    ],
}
REFERENCES = {
    ("muon", 0.5, False): "muon-zero1-ep1",
    ("adamw", 0.5, False): "adamw-zero1-ep1",
    ("muon", 0.0, False): "muon-zero1-ep1-clipping0.0",
    ("muon", 0.5, True): "muon-zero1-ep1-balanceTrue",
}


def reference_name(case: dict[str, Any]) -> str:
    options = (case.get("optim", "muon"), case.get("clipping", 0.5), case.get("balance", False))
    return REFERENCES[options]


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[list[Any], Path]]:
    collected = {}
    for num_ranks, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"ranks{num_ranks}")
        ranks = run_ranks("parity_ranks", num_ranks, folder, json.dumps(cases))
        collected[num_ranks] = (ranks, folder)
    return collected


ALL = [(num_ranks, case) for num_ranks, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(
    ("num_ranks", "case"), ALL, ids=[f"ranks{n}-{case['name']}" for n, case in ALL]
)
def test_every_layout_trains_alike(
    results: dict[int, tuple[list[Any], Path]], num_ranks: int, case: dict[str, Any]
) -> None:
    reference = results[1][0][0][reference_name(case)]
    for rank in results[num_ranks][0]:
        assert rank[case["name"]]["losses"] == pytest.approx(
            reference["losses"], rel=LOSS_TOLERANCE
        )
        assert rank[case["name"]]["norms"] == pytest.approx(reference["norms"], rel=LOSS_TOLERANCE)
    expected = load_weights(results[1][1] / reference_name(case))
    trained = load_weights(results[num_ranks][1] / case["name"])
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        distance = float((trained[name] - weight).norm() / weight.norm().clamp_min(1e-30))
        assert distance <= WEIGHT_TOLERANCE, name


def test_a_recomputation_ends_before_rows_travel_back(
    results: dict[int, tuple[list[Any], Path]],
) -> None:
    """Two MoE layers in every case: `moe` makes both again, whole layers are all but the last."""
    again = {"moe": 2, "full": 1, "except_attention": 1}
    recomputed = [(n, c) for n, c in ALL if c.get("recompute") in again and c["ep"] > 1]
    assert {case["recompute"] for _, case in recomputed} == set(again)
    for num_ranks, case in recomputed:
        for rank in results[num_ranks][0]:
            calls = rank[case["name"]]["calls"]
            assert calls["combine"] == 2 * 4 * case.get("accumulation", 1)
            assert calls["dispatch"] * 2 == calls["combine"] * (2 + again[case["recompute"]])


def test_training_moves_every_weight(results: dict[int, tuple[list[Any], Path]]) -> None:
    """The comparison above would be empty if nothing were trained: two optimizers must differ."""
    _, folder = results[1]
    muon, adamw = (load_weights(folder / f"{o}-zero1-ep1") for o in ("muon", "adamw"))
    same = [name for name in muon if torch.equal(muon[name], adamw[name])]
    assert all(name.endswith("e_score_correction_bias") for name in same)


def test_clipping_acts(results: dict[int, tuple[list[Any], Path]]) -> None:
    """Raw norms are above the bound of 0.5, so runs with and without clipping must part."""
    ranks, _ = results[1]
    assert min(ranks[0]["muon-zero1-ep1"]["norms"]) > 0.5
    clipped = ranks[0]["muon-zero1-ep1"]["losses"]
    assert clipped != ranks[0]["muon-zero1-ep1-clipping0.0"]["losses"]
