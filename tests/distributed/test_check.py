"""`epctl train --check` is green on healthy code and red on each fault that users have met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from tiny_moonlight import write_tiny_moonlight

pytestmark = pytest.mark.distributed

# Two ranks a sample, so half as many places: the same rows a step.
SHARED = {"parallel.sp": 2, "train.micro_batch_size": 4}
HEALTHY: dict[str, dict[str, Any]] = {
    "ep4-zero3": {"ep": 4, "zero": 3},
    "ep2-zero2": {"ep": 2, "zero": 2},
    "ep1-zero1": {"ep": 1, "zero": 1},
    "ep2-zero0": {"ep": 2, "zero": 0},
    "ep4-zero3-recompute": {"ep": 4, "zero": 3, "more": {"train.activation_checkpointing": True}},
    "ep2-sp2-zero3": {"ep": 2, "zero": 3, "more": SHARED},
    "autoep-ep2-zero3": {"ep": 2, "zero": 3, "more": {"moe.implementation": "autoep"}},
    "ep2-zero3-offload": {"ep": 2, "zero": 3, "more": {"optim.offload": True}},
}
FAULTY: dict[str, dict[str, Any]] = {
    "route_scale_dropped": {"ep": 4, "zero": 3},
    "correction_bias_dropped": {"ep": 2, "zero": 3},
    "router_gradient_lost": {"ep": 2, "zero": 3},
    "router_in_bfloat16": {"ep": 4, "zero": 3},
    "expert_gradient_scaled_by_ep": {"ep": 2, "zero": 2},
    "expert_gradients_in_another_order": {"ep": 2, "zero": 3},
    "gradient_not_finite": {"ep": 2, "zero": 2},
    "norm_counting_experts_twice": {"ep": 2, "zero": 0},
    "clipping_by_own_experts": {"ep": 2, "zero": 0},
    "labels_cut_before_shifted": {"ep": 2, "zero": 2, "more": SHARED},
}
# What must be among the rows that differ, so that the table points at the cause.
POINTS_AT = {
    "route_scale_dropped": "loss, step 1",
    "correction_bias_dropped": "router choices, share of tokens",
    "router_gradient_lost": "gradient of router, step 1",
    "router_in_bfloat16": "gradient of router, step 1",
    "expert_gradient_scaled_by_ep": "gradient of experts, step 1",
    "expert_gradients_in_another_order": "gradient direction of experts, step 1",
    "gradient_not_finite": "gradient direction of attention, step 1",  # of all: none was seen
    "norm_counting_experts_twice": "gradient norm, step 1",
    "clipping_by_own_experts": "gradient of attention, step 1",
    "labels_cut_before_shifted": "loss, step 1",
}
FLAGS = {"optim.lr": 1e-3, "optim.warmup_steps": 0, "optim.schedule": "constant"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("check")
    model = str(write_tiny_moonlight(folder / "model"))
    cases = [
        {
            "name": name,
            "fault": name if name in FAULTY else "healthy",
            "model": model,
            "steps": 2,
            **case,
            "flags": FLAGS | case.get("more", {}),
        }
        for name, case in (HEALTHY | FAULTY).items()
    ]
    return run_ranks("check_ranks", 4, folder, json.dumps(cases))[0]


@pytest.mark.parametrize("name", HEALTHY)
def test_green_on_healthy_code(reports: dict[str, Any], name: str) -> None:
    report = reports[name]
    assert report["ok"], [row for row in report["rows"] if not row["ok"]]
    assert len(report["rows"]) > 15


@pytest.mark.parametrize("name", FAULTY)
def test_red_on_a_planted_fault(reports: dict[str, Any], name: str) -> None:
    report = reports[name]
    differing = [row["quantity"] for row in report["rows"] if not row["ok"]]
    assert not report["ok"]
    assert POINTS_AT[name] in differing


def test_a_norm_that_is_told_right_may_not_be_what_was_clipped_by(reports: dict[str, Any]) -> None:
    rows = {row["quantity"]: row for row in reports["clipping_by_own_experts"]["rows"]}
    assert rows["gradient norm, step 1"]["ok"]


def test_a_wrong_norm_is_not_blamed_on_the_first_loss(reports: dict[str, Any]) -> None:
    rows = {row["quantity"]: row for row in reports["norm_counting_experts_twice"]["rows"]}
    assert rows["loss, step 1"]["ok"]
    assert rows["router choices, share of tokens"]["ok"]


def test_a_report_names_the_layout(reports: dict[str, Any]) -> None:
    facts = reports["ep4-zero3"]
    assert (facts["ep"], facts["zero"], facts["num_ranks"]) == (4, 3, 4)
    assert {row["quantity"] for row in facts["rows"]} >= set(POINTS_AT.values())


def test_verdict_is_exit_code_7(tmp_path: Path, reports: dict[str, Any]) -> None:
    from epctl.errors import GateError, exit_code_of
    from epctl.launch.check_command import conclude
    from epctl.output import Mode, Output

    output = Output(Mode.QUIET)
    (tmp_path / "check.json").write_text(json.dumps(reports["ep4-zero3"]))
    conclude(tmp_path, output)
    (tmp_path / "check.json").write_text(json.dumps(reports["route_scale_dropped"]))
    with pytest.raises(GateError, match="ZeRO-3 does not train as the whole model") as caught:
        conclude(tmp_path, output)
    assert exit_code_of(caught.value) == 7


@pytest.mark.parametrize("name", HEALTHY)
def test_directions_are_those_of_the_whole_model(reports: dict[str, Any], name: str) -> None:
    """But for the rounding of the stored reference, which has a bound of its own."""
    found = [row for row in reports[name]["rows"] if "direction" in row["quantity"]]
    assert len(found) >= 6
    assert all(row["difference"] < 0.5 * 2**-18 for row in found), found


def test_a_gradient_of_the_right_length_may_point_elsewhere(reports: dict[str, Any]) -> None:
    rows = {r["quantity"]: r for r in reports["expert_gradients_in_another_order"]["rows"]}
    assert rows["gradient of experts, step 1"]["ok"]
    assert rows["gradient norm, step 1"]["ok"]
    assert rows["gradient direction of attention, step 1"]["ok"]
    assert rows["gradient direction of experts, step 1"]["difference"] > 0.5
