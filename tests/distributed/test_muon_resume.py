"""DeepSpeed's save and load keep the next loss; DeepSpeed's own Muon runs for comparison."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launch import run_ranks

pytestmark = pytest.mark.distributed


def resume(name: str, zero: int, ep: int = 2, **more: Any) -> dict[str, Any]:
    return {"name": f"{name}-zero{zero}", "kind": "resume", "zero": zero, "ep": ep, **more}


BF16_MOMENTUM = {"bfloat16": True, "flags": {"optim.momentum_dtype": "bfloat16"}}
RESUMES = [
    resume("float32", 1),
    resume("float32", 2),
    resume("float32", 3),
    resume("replicated", 3, ep=1),
    resume("bf16", 1, **BF16_MOMENTUM),
    resume("bf16", 2, **BF16_MOMENTUM),
    resume("bf16", 3, **BF16_MOMENTUM),
    resume("offload", 2, flags={"optim.offload": True}),
]
UPSTREAM = [
    {"name": f"upstream-zero{zero}", "zero": zero, "ep": 2, "optim": "deepspeed-muon"}
    for zero in (0, 1, 2, 3)
]
ADAMW = {"name": "adamw", "zero": 1, "ep": 2, "optim": "adamw"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    cases = [*RESUMES, *UPSTREAM, ADAMW]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # upstream compiles its iteration: minutes on CPU
        return run_ranks("muon_ranks", 2, folder, json.dumps(cases), timeout=280)


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: str(case["name"]))
def test_resumed_run_has_the_same_losses(ranks: list[dict[str, Any]], case: dict[str, Any]) -> None:
    for rank in ranks:
        result = rank[case["name"]]
        assert result["resumed"] == result["straight"]
        assert result["straight"][0] != result["straight"][1]
        dtype = case.get("flags", {}).get("optim.momentum_dtype", "float32")
        assert result["momentum_dtypes"] == [f"torch.{dtype}"]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_deepspeeds_own_muon_trains_alike_at_every_stage(
    ranks: list[dict[str, Any]], zero: int
) -> None:
    result, reference = ranks[0][f"upstream-zero{zero}"], ranks[0]["upstream-zero1"]
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert result["losses"] != pytest.approx(ranks[0]["adamw"]["losses"], rel=1e-5)
    assert result["num_owned_matrices"] is None  # ours is not there
