"""Parts cover each tile of a symmetric result once, at the fewest panels."""

from __future__ import annotations

from collections import Counter

import pytest

from epctl.kernels.symmetric_schedule import num_parts, parts_of


@pytest.mark.parametrize("num_panels", [*range(1, 25), 63, 88])
def test_every_tile_is_in_one_part(num_panels: int) -> None:
    parts = parts_of(num_panels)
    tiles = Counter(tile for part in parts for tile in part.tiles())
    assert set(tiles) == {(i, j) for i in range(num_panels) for j in range(i + 1)}
    assert set(tiles.values()) == {1}


@pytest.mark.parametrize("num_panels", range(1, 25))
def test_at_most_one_tile_is_alone(num_panels: int) -> None:
    parts = parts_of(num_panels)
    assert len(parts) == num_parts(num_panels)
    alone = [part for part in parts if part.o1 == part.o2]
    assert len(alone) == num_panels * (num_panels + 1) // 2 % 2


def test_experts_of_moonlight_fill_an_h100() -> None:
    """Sixteen experts at a time: 33 parts each, four for every multiprocessor."""
    assert num_parts(1408 // 128) * 16 == 4 * 132
