"""The simulation of more ranks: what it must give where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from epctl.bench.multimodal_sp_scaling import (
    SIMULATED,
    Attention,
    Geometry,
    Rates,
    Share,
    attention_bytes,
    scaling,
    serial_seconds,
    share_at,
    simulated_seconds,
)
from epctl.runtime.sequence.cuts import LayerKind, Level
from epctl.runtime.sequence.heads import (
    elements_by_heads,
    elements_by_keys,
    place_heads,
    sent_elements,
)

FREE = 1e30  # bytes a second
ROWS = 4096
GEOMETRY = Geometry(
    tower=Attention(32, 16, 16, (80, 80, 80)),
    decoder=Attention(28, 28, 4, (128, 128, 128)),
    num_tokens=1024,
    levels=(Level("frame", (0, ROWS)), Level("window", tuple(range(0, ROWS + 1, 64)))),
    kinds=(LayerKind(4, (0, ROWS)), LayerKind(28, tuple(range(0, ROWS + 1, 64)))),
    linear_cost=3840.0,
    num_tiles=0,
    feature_elements=1024 * 3584,
    element_size=2,
)


def even(num_ranks: int, sent_bytes: float = 0.0) -> Share:
    return Share(num_ranks, 1 / num_ranks, 1 / num_ranks, sent_bytes)


def test_what_two_ranks_do_not_explain_stays_at_any_number_of_ranks() -> None:
    """0.6 s of 1 s on two ranks: 0.2 s are serial, so four take 0.4 s."""
    rates = Rates(1.0, 0.6, 2, 0.5, FREE)
    assert serial_seconds(rates, even(2)) == pytest.approx(0.2)
    assert simulated_seconds(rates, even(2), even(4)) == pytest.approx(0.4)


def test_ideal_ranks_halve_and_never_more() -> None:
    for shared in (0.5, 0.4):  # faster than half is noise, not a negative serial part
        rates = Rates(1.0, shared, 2, 0.3, FREE)
        assert simulated_seconds(rates, even(2), even(8)) == pytest.approx(1 / 8)


def test_bytes_take_their_time_and_are_not_called_serial() -> None:
    rates = Rates(1.0, 0.7, 2, 0.5, 100.0)
    assert serial_seconds(rates, even(2, 20.0)) == pytest.approx(0.0)
    assert simulated_seconds(rates, even(2, 20.0), even(4, 50.0)) == pytest.approx(0.75)


def test_the_simulation_agrees_with_what_it_was_made_from() -> None:
    rates = Rates(2.0, 1.3, 2, 0.4, 1e10)
    measured = share_at(GEOMETRY, 2)
    assert simulated_seconds(rates, measured, measured) == pytest.approx(1.3)


def test_windows_are_cut_and_the_tower_is_the_slower_the_fewer_pieces_there_are() -> None:
    shares = [share_at(GEOMETRY, n) for n in (2, *SIMULATED)]
    assert all(share.tower * share.num_ranks < 1.1 for share in shares)
    tiles = replace(GEOMETRY, levels=(), kinds=(), num_tiles=13)
    assert share_at(tiles, 8).tower == 2 / 13
    assert share_at(tiles, 64).tower == 1 / 13


@pytest.mark.parametrize(("heads", "kv"), [(28, 4), (16, 16), (7, 1), (6, 3)])
@pytest.mark.parametrize("sizes", [(5, 3), (8, 0, 7, 2), (3,) * 8])
def test_what_each_rank_sends_adds_up(heads: int, kv: int, sizes: tuple[int, ...]) -> None:
    dims = (24, 24, 16)
    placement = place_heads(heads, kv, len(sizes))
    assert sum(sent_elements(placement, kv, sizes, dims)) == elements_by_heads(
        placement, sizes, dims
    )
    assert sum(sent_elements(None, kv, sizes, dims)) == elements_by_keys(kv, sizes, dims)


def test_an_eighth_of_the_layers_sends_an_eighth_of_the_bytes() -> None:
    offsets = (0, ROWS // 2, ROWS)
    each, every = (
        attention_bytes(GEOMETRY.tower, n, offsets, causal=False, size=2) for n in (4, 32)
    )
    assert [8 * a for a in each] == every


def test_the_table_says_what_was_measured_and_what_was_not() -> None:
    result = scaling(GEOMETRY, Rates(1.0, 0.55, 2, 0.4, 1e9), {1: 1000.0, 2: 550.0})
    assert [(point["ranks"], point["source"]) for point in result["points"]] == [
        (1, "measured"),
        (2, "measured"),
        *((n, "simulated") for n in SIMULATED),
    ]
    assert [point["ms"] for point in result["points"][:2]] == [1000.0, 550.0]
    assert result["rates"]["bytes_per_second"] == 1e9
    few = scaling(replace(GEOMETRY, num_tokens=9), Rates(1.0, 0.55, 2, 0.4, 1e9), {1: 1.0, 2: 0.6})
    assert [point["ranks"] for point in few["points"]] == [1, 2, 4, 8]  # no more ranks than tokens
