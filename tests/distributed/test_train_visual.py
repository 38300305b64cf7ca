"""`epctl train` on image and video chats: every layout takes the steps of a plain loop."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launch import run_ranks
from visual_models import write_chats, write_visual_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

# (model, sp, ep, zero, optimizer, recomputation): pairwise.
CASES = [
    ("qwen2_5_vl", 1, 1, 3, "adamw", "none"),
    ("qwen2_5_vl", 2, 1, 1, "muon", "none"),
    ("qwen2_5_vl", 4, 1, 2, "adamw", "full"),
    ("qwen2_5_vl", 2, 1, 0, "adamw", "none"),
    ("qwen3_vl_moe", 1, 2, 0, "muon", "none"),
    ("qwen3_vl_moe", 2, 2, 3, "muon", "full"),  # goes on in another layout after one step
    ("qwen3_vl_moe", 2, 4, 2, "muon", "none"),
]


def name_of(case: tuple[Any, ...]) -> str:
    model, sp, ep, zero, optim, recompute = case
    return f"{model}-sp{sp}-ep{ep}-zero{zero}-{optim}-{recompute}"


RESUMED = name_of(CASES[5])
# In these all ranks encode the images of all samples together.
SHARED = [name_of(CASES[0]), name_of(CASES[6])]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("visual")
    models = {name: write_visual_model(name, folder / name) for name in {c[0] for c in CASES}}
    chats = write_chats(folder / "chats")
    keys = ("sp", "ep", "zero", "optim", "recompute")
    cases = [
        {"name": name_of(c), "model": str(models[c[0]]), **dict(zip(keys, c[1:], strict=True))}
        for c in CASES
    ]
    for case in cases:
        case["share_images"] = case["name"] in SHARED
        if case["name"] == RESUMED:
            case["then"] = {"sp": 1, "ep": 4, "zero": 1}
    return run_ranks("visual_ranks", 4, folder, str(chats), json.dumps(cases), timeout=800)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_layout_takes_the_steps_of_a_plain_loop(
    results: list[dict[str, Any]], case: tuple[Any, ...]
) -> None:
    """Packed, cut over ranks, partitioned: against one document at a time in transformers."""
    for rank in results:
        found = rank[name_of(case)]
        for (loss, norm), (plain_loss, plain_norm) in zip(
            found["history"], found["plain"], strict=True
        ):
            assert loss == pytest.approx(plain_loss, rel=2e-6)
            assert norm == pytest.approx(plain_norm, rel=2e-5)
        error, name = found["worst"]
        assert error < 1e-5, name


def test_some_rank_has_no_image_and_some_a_clip(results: list[dict[str, Any]]) -> None:
    seen = [tuple(s) for rank in results for s in rank[name_of(CASES[0])]["seen"]]
    assert (False, False) in seen
    assert any(video for _, video in seen)


def test_a_run_resumed_in_another_layout_saves_what_transformers_loads(
    results: list[dict[str, Any]],
) -> None:
    """That its second step is the plain loop's own is the test above."""
    for rank in results:
        assert rank[RESUMED]["reload"] == {
            "equal": True, "same_names": True, "copied": [True, True],
        }  # fmt: skip
