"""A save that fails on one rank fails on all, at once, and loses nothing that was there."""

from __future__ import annotations

from typing import Any

import pytest
from launch import run_ranks

pytestmark = pytest.mark.distributed

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks("save_ranks", 2, tmp_path_factory.mktemp("save"), timeout=180)


def test_a_disk_that_fills_up_between_two_gatherings_stops_every_rank(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["full_disk"]["raised"] == "ResourceError"
        assert "No space left on device" in rank["full_disk"]["message"]
        assert rank["full_disk"]["left"] == []


def test_an_unexpected_failure_keeps_its_type_and_stops_the_others(ranks: Ranks) -> None:
    assert ranks[0]["extras"] == {
        "raised": "ValueError",
        "message": "the tokenizer cannot be saved",
        "left": [],
    }
    assert ranks[1]["extras"]["raised"] == "RuntimeError"
    assert "rank 0: ValueError: the tokenizer" in ranks[1]["extras"]["message"]


def test_a_folder_that_cannot_be_made_is_a_resource_error_everywhere(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["staging"]["raised"] == "ResourceError"
        assert "Not a directory" in rank["staging"]["message"]


def test_the_earlier_model_stays_until_the_new_one_has_its_place(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["replace"]["raised"] == "ResourceError"
        assert rank["replace"]["left"] == ["model"]
        assert rank["kept"]
        assert rank["good"] == {"raised": "", "message": "", "left": ["model"]}
        assert "earlier" not in rank["replaced"]
        assert "model.safetensors.index.json" in rank["replaced"]
