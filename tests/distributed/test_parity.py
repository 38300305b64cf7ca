"""EP and ZeRO change where things live, never what is computed (float32, gloo).

Held against transformers' own model, whole on one rank (with balance losses: against epctl's run of
one rank). Losses and gradient norms agree to 1e-6, every tensor's first gradient to 1e-5, weights
after four steps to 2e-6, norm-wise relative. One launch a number of ranks runs all its cases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from parity_reference import gradient_errors
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 2e-6

# AdamW runs at 1e-3, its usual rate, and with an eps above what rounding leaves of a gradient that
# should be zero: below it, a single element moves by the rate times noise, whatever the topology
# (with 1e-8 weights part by 3e-7 to 2.3e-6 on one and the same processor, with 1e-6 by 6e-8).
ADAMW = {"optim": "adamw", "flags": {"optim.lr": 1e-3, "optim.eps": 1e-6}}


def case(optim: str, zero: int, ep: int, **options: Any) -> dict[str, Any]:
    extra = dict(ADAMW) if optim == "adamw" else {}
    name = "-".join([optim, f"zero{zero}", f"ep{ep}", *(f"{k}{v}" for k, v in options.items())])
    return {"name": name, "zero": zero, "ep": ep, **extra, **options}


# Pairwise over (optimizer, ZeRO, EP, accumulation, clipping, capacity, DeepSpeed's own layer,
# logits made in blocks of a few words, what is recomputed of layers and of experts, balance losses
# with moving biases).
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
        case("muon", 2, 1, capacity=1.0, accumulation=4),
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
        case("muon", 3, 2, capacity=1.0, accumulation=2),
        case("adamw", 2, 1, capacity=1.0),
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
        case("muon", 3, 4, capacity=1.0, recompute="full"),
        case("muon", 1, 4, capacity=1.0, experts="activation"),
        case("adamw", 3, 2, capacity=1.0, recompute="moe"),
        case("muon", 0, 4, capacity=0.5),
    ],
}
BALANCED = "muon-zero1-ep1-balanceTrue"
Found = dict[int, tuple[list[Any], Path]]


def reference_of(case: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """Returns the case of one rank that must come to the same; balance losses are epctl's own.

    A capacity is of one rank's micro-batch, so there the whole model gets as many.
    """
    if case.get("balance"):
        return {**case, "name": BALANCED}
    options = {key: case[key] for key in ("optim", "flags", "clipping", "capacity") if key in case}
    micro_batches = num_ranks * case.get("accumulation", 1) if "capacity" in case else 1
    shown = [f"{key}{options[key]}" for key in ("clipping", "capacity") if key in options]
    name = "-".join(["whole", case.get("optim", "muon"), *shown, f"by{micro_batches}"])
    return {**options, "name": name, "whole": True, "zero": 1, "ep": 1,
            "micro_batches": micro_batches}  # fmt: skip


def with_references(cases: list[dict[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    """Returns the cases for the ranks; of the whole model's they know where its gradients are."""
    return [
        case
        if case.get("balance")
        else {**case, "reference": reference_of(case, num_ranks)["name"]}
        for case in cases
    ]


def references(cases: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns what transformers' model is to be trained as, each once."""
    found = [reference_of(case, n) for n, some in cases.items() for case in some]
    return list({one["name"]: one for one in found if one.get("whole")}.values())


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(path)
    return weights


def run_cases(cases: dict[int, list[dict[str, Any]]], root: Path, timeout: float) -> Found:
    """Runs the whole model, then all cases; those of one rank are in the same launch."""
    found: Found = {}
    for num_ranks in sorted(cases):
        folder = root / f"ranks{num_ranks}"
        folder.mkdir()
        given = with_references(cases[num_ranks], num_ranks)
        if num_ranks == 1:
            given = references(cases) + given
        where = str(root / "ranks1")
        found[num_ranks] = (
            run_ranks("parity_ranks", num_ranks, folder, json.dumps(given), where, timeout=timeout),
            folder,
        )
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_cases(CASES, tmp_path_factory.mktemp("parity"), 180)


def require_parity(found: Found, num_ranks: int, case: dict[str, Any]) -> None:
    """Fails where the case is not its reference: losses, norms, first gradients, weights."""
    ranks, folder = found[num_ranks]
    reference, name = reference_of(case, num_ranks), case["name"]
    wanted = found[1][0][0][reference["name"]]
    for rank in ranks:
        assert rank[name]["losses"] == pytest.approx(wanted["losses"], rel=LOSS_TOLERANCE), name
        assert rank[name]["norms"] == pytest.approx(wanted["norms"], rel=LOSS_TOLERANCE), name
    expected = load_weights(found[1][1] / reference["name"])
    trained = load_weights(folder / name)
    assert trained.keys() == expected.keys()
    for key, weight in expected.items():
        distance = float((trained[key] - weight).norm() / weight.norm().clamp_min(1e-30))
        assert distance <= WEIGHT_TOLERANCE, (name, key)
    if reference.get("whole"):
        gradients = load_file(found[1][1] / reference["name"] / "gradients.safetensors")
        require_gradients(gradient_errors(ranks, name), gradients)


def require_gradients(
    errors: dict[str, tuple[float, float]], expected: dict[str, torch.Tensor]
) -> None:
    """Every element of every gradient was compared, once, and is right."""
    assert errors.keys() == expected.keys()
    norms = {key: float(gradient.double().norm()) for key, gradient in expected.items()}
    assert {key: norm for key, (_, norm) in errors.items()} == pytest.approx(norms, rel=1e-6)
    assert {key: e for key, (e, _) in errors.items() if not e <= GRADIENT_TOLERANCE} == {}


ALL = [(n, case) for n, cases in CASES.items() for case in cases if case["name"] != BALANCED]


@pytest.mark.parametrize(
    ("num_ranks", "case"), ALL, ids=[f"ranks{n}-{case['name']}" for n, case in ALL]
)
def test_every_layout_trains_alike(results: Found, num_ranks: int, case: dict[str, Any]) -> None:
    require_parity(results, num_ranks, case)


def test_a_recomputation_ends_before_rows_travel_back(results: Found) -> None:
    """Two MoE layers in every case: `moe` makes both again, whole layers are all but the last."""
    again = {"moe": 2, "full": 1, "except_attention": 1}
    recomputed = [(n, c) for n, c in ALL if c.get("recompute") in again and c["ep"] > 1]
    assert {case["recompute"] for _, case in recomputed} == set(again)
    for num_ranks, case in recomputed:
        for rank in results[num_ranks][0]:
            calls = rank[case["name"]]["calls"]
            assert calls["combine"] == 2 * 4 * case.get("accumulation", 1)
            assert calls["dispatch"] * 2 == calls["combine"] * (2 + again[case["recompute"]])


def test_training_moves_every_weight(results: Found) -> None:
    """The comparison above would be empty if nothing were trained: two optimizers must differ."""
    _, folder = results[1]
    muon, adamw = (load_weights(folder / f"{o}-zero1-ep1") for o in ("muon", "adamw"))
    same = [name for name in muon if torch.equal(muon[name], adamw[name])]
    assert all(name.endswith("e_score_correction_bias") for name in same)


@pytest.mark.parametrize("option", ["clipping0.0", "capacity1.0-by4", "capacity0.5-by4"])
def test_options_act(results: Found, option: str) -> None:
    """Raw norms are above the bound of 0.5, and choices are above capacity: runs must part."""
    whole = results[1][0][0]
    assert min(whole["whole-muon-by1"]["norms"]) > 0.5
    found = next(one for name, one in whole.items() if name.startswith(f"whole-muon-{option}"))
    assert found["losses"] != pytest.approx(whole["whole-muon-by1"]["losses"], rel=1e-5)
