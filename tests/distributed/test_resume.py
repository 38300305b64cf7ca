"""`--resume`: k + k steps equal 2k steps, bit for bit, at the same topology on CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from tiny_moonlight import write_tiny_moonlight

pytestmark = pytest.mark.distributed

CASES: dict[str, dict[str, Any]] = {
    "muon-ep2-zero3": {"ep": 2, "zero": 3},
    "muon-ep1-zero2": {"ep": 1, "zero": 2, "flags": {"train.gradient_accumulation_steps": 2}},
    "adamw-ep2-zero1": {"ep": 2, "zero": 1, "optim": "adamw"},
    "muon-ep2-zero0": {"ep": 2, "zero": 0},
    "bf16-ep2-zero3": {"ep": 2, "zero": 3, "flags": {"train.precision": "bfloat16"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    model = write_tiny_moonlight(folder / "model")
    cases = [{"name": name, "model": str(model), **case} for name, case in CASES.items()]
    return run_ranks("train_model_ranks", 2, folder, "resume", json.dumps(cases))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("what", ["weights", "state", "random", "rows"])
def test_a_resumed_run_equals_the_unbroken_one(
    ranks: list[dict[str, Any]], name: str, what: str
) -> None:
    for rank in ranks:
        unbroken, resumed = rank[name][what]
        assert resumed == unbroken


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_rates_go_on_as_if_nothing_had_happened(
    ranks: list[dict[str, Any]], name: str
) -> None:
    unbroken, resumed = ranks[0][name]["metrics"]
    assert [step for step, *_ in unbroken] == [1, 2, 3, 4]
    assert resumed == unbroken


def test_epochs_and_ranks_see_different_rows(ranks: list[dict[str, Any]]) -> None:
    """The order test above would pass on rows that never change."""
    drawn = [rank["muon-ep2-zero3"]["rows"][0] for rank in ranks]
    assert len(set(drawn[0])) > 4
    assert not set(drawn[0]) & set(drawn[1])


def test_state_is_safetensors_and_json_only(ranks: list[dict[str, Any]], folder: Path) -> None:
    """What `--resume` opens can run no code."""
    assert ranks
    files = [p for p in folder.glob("*/broken/checkpoints/step-*/state/*") if p.is_file()]
    assert len(files) == 3 * len(CASES)
    assert {p.suffix for p in files} == {".safetensors", ".json"}
