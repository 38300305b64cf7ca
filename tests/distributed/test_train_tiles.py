"""`epctl train` on images of models of whole images and tiles: the steps of a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from tile_models import HERE, KINDS, SIZES, write_tile_model
from visual_models import write_chats

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

# (model, sp, ep, zero, optimizer, recomputation): pairwise.
CASES = [
    ("llava", 1, 1, 3, "adamw", "none"),
    ("llava", 4, 1, 1, "muon", "full"),
    ("llava", 2, 1, 0, "adamw", "none"),
    ("internvl", 1, 1, 2, "muon", "full"),
    ("internvl", 4, 1, 3, "muon", "none"),
    ("internvl_moe", 2, 2, 3, "muon", "full"),  # goes on in another layout after one step
    ("internvl_moe", 2, 4, 2, "muon", "none"),
    ("internvl_moe", 1, 2, 0, "adamw", "none"),
    ("llava_next", 2, 1, 3, "muon", "none"),
    ("llava_next", 1, 1, 1, "muon", "none"),
    ("llava_onevision", 2, 1, 2, "adamw", "full"),
    ("llava_onevision", 1, 1, 3, "adamw", "none"),
    ("idefics3", 2, 1, 3, "adamw", "none"),
    ("idefics3", 1, 1, 1, "adamw", "full"),
    ("smolvlm", 2, 1, 2, "muon", "none"),
    ("pixtral", 2, 1, 3, "muon", "none"),
    ("mistral3", 2, 1, 3, "adamw", "full"),
    ("mistral3", 1, 1, 1, "muon", "none"),
]


def name_of(case: tuple[Any, ...]) -> str:
    model, sp, ep, zero, optim, recompute = case
    return f"{model}-sp{sp}-ep{ep}-zero{zero}-{optim}-{recompute}"


RESUMED = {
    name_of(CASES[5]): {"sp": 1, "ep": 4, "zero": 1},
    name_of(CASES[2]): {"sp": 1, "zero": 2},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tiles")
    here = [c for c in CASES if c[0] in HERE]
    models = {name: write_tile_model(name, folder / name) for name in {c[0] for c in here}}
    chats = write_chats(folder / "chats", video=False, sizes=SIZES)
    keys = ("sp", "ep", "zero", "optim", "recompute")
    cases: list[dict[str, Any]] = [
        {"name": name_of(c), "model": str(models[c[0]]), **dict(zip(keys, c[1:], strict=True))}
        for c in here
    ]
    clips = write_chats(folder / "clips", sizes=SIZES)
    for case in cases:
        case["videos"] = Path(case["model"]).name == "internvl"
        if case["videos"]:
            case["chats"] = str(clips)
        if case["name"] in RESUMED:
            case["then"] = RESUMED[case["name"]]
    return run_ranks("visual_ranks", 4, folder, str(chats), json.dumps(cases), timeout=800)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_layout_takes_the_steps_of_a_plain_loop(
    results: list[dict[str, Any]], case: tuple[Any, ...]
) -> None:
    """Packed, cut over ranks, partitioned: against one document at a time in transformers."""
    if case[0] not in HERE:
        pytest.skip(f"transformers' processor of {case[0]} needs {KINDS[case[0]].needs}")
    for rank in results:
        found = rank[name_of(case)]
        for (loss, norm), (plain_loss, plain_norm) in zip(
            found["history"], found["plain"], strict=True
        ):
            assert loss == pytest.approx(plain_loss, rel=2e-6)
            assert norm == pytest.approx(plain_norm, rel=2e-5)
        error, name = found["worst"]
        assert error < 1e-5, name


@pytest.mark.parametrize("model", ["llava", "internvl", "llava_next"])
def test_some_rank_has_no_image(results: list[dict[str, Any]], model: str) -> None:
    names = [name_of(c) for c in CASES if c[0] == model and c[1] == 1]
    seen = [image for rank in results for name in names for image, _ in rank[name]["seen"]]
    assert False in seen
    assert True in seen


def test_clips_stand_among_images(results: list[dict[str, Any]]) -> None:
    names = [name_of(c) for c in CASES if c[0] == "internvl"]
    assert all(rank[name]["videos"] == 3 for rank in results for name in names)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_another_layout_saves_what_transformers_loads(
    results: list[dict[str, Any]], name: str
) -> None:
    """That its second step is the plain loop's own is the test above."""
    for rank in results:
        assert rank[name]["reload"] == {
            "equal": True, "same_names": True, "copied": [True] * 3,
        }  # fmt: skip
