"""The resume matrix at EP=8 on eight gloo ranks: `slow`, eight ranks are much for two cores."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_resume_topology import (
    Layout,
    Pair,
    assert_losses_go_on,
    assert_state_is_kept,
    pair_name,
    run_layouts,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1500)]

SOURCES: dict[str, Layout] = {
    "h": (8, 8, 3, "muon"),
    "i": (8, 8, 1, "adamw"),
    "j": (4, 4, 2, "muon"),
    "k": (2, 1, 3, "adamw"),
}
PAIRS: list[Pair] = [
    ("h", 4, 2, 2),
    ("h", 8, 4, 3),
    ("i", 2, 2, 3),
    ("i", 8, 8, 2),
    ("j", 8, 8, 3),
    ("j", 8, 2, 1),
    ("k", 8, 8, 1),
    ("k", 8, 8, 3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eight")
    run_layouts(folder, SOURCES, PAIRS, batch=8)
    return folder


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_eight_ranks_and_eight_way_experts(folder: Path, pair: Pair) -> None:
    assert_losses_go_on(folder, pair)
    assert_state_is_kept(folder, pair, SOURCES[pair[0]][3])
