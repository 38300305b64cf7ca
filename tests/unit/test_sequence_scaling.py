"""`epctl bench multimodal-sp` without ranks: the simulation of more, the long text, the table."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from epctl.bench import multimodal_sp
from epctl.bench.multimodal_sp_modes import MODES
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
from epctl.bench.multimodal_sp_workloads import (
    CPU,
    FIRST_WORD,
    GPU,
    GPU_GATE,
    IMAGE_ID,
    WORKLOADS,
    Size,
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


def test_workloads_and_modes_have_one_list_of_names() -> None:
    assert tuple(workload.name for workload in WORKLOADS) == multimodal_sp.NAMES
    assert MODES == multimodal_sp.MODES


@pytest.mark.parametrize(
    ("size", "num_tokens", "patches"),
    [(CPU, 1024, 2 * 24**2), (GPU_GATE, 1024, 2 * 24**2), (GPU, 131_072, 2 * 256**2)],
)
def test_the_long_text_has_exactly_its_tokens_and_words_around_its_images(
    size: Size, num_tokens: int, patches: int
) -> None:
    long = WORKLOADS[-1]
    _, inputs, rows = long.build(size)
    ids_S = inputs["input_ids"][0]
    assert (len(ids_S), rows, len(inputs["pixel_values"])) == (num_tokens, patches, patches)
    assert int((ids_S == IMAGE_ID).sum()) == patches // 4
    is_word_S = ids_S >= FIRST_WORD
    # Begins and ends of runs of words: three runs, none of them short.
    bounds = [0, *(is_word_S.diff().nonzero().flatten() + 1).tolist(), num_tokens]
    runs = [stop - start for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
    assert len(runs) == 3
    assert min(runs) > num_tokens // 5
    assert long.modes == ("aligned",)


def row(mode: str, ranks: int, **more: Any) -> dict[str, Any]:
    return {
        "workload": multimodal_sp.LONG,
        "model": "Qwen2.5-VL",
        "mode": mode,
        "ranks": ranks,
        "patches": 131_072,
        "tokens": 131_072,
        "gate": {"loss": 0.0, "gradient": 0.0},
        "gradient_error": 0.0,
        "ms": {"median": 4000.0, "low": 3900.0, "high": 4100.0},
        "tokens_per_second": 16_384.0,
        "speedup": None,
        "encoder_mib": 41_000.0,
        "total_mib": 104_000.0,
        "moved_mib": 6_000.0,
        "tower_moved_mib": 700.0,
        "vision_cost": 1.0,
    } | more


@pytest.fixture
def out_of_memory() -> dict[str, Any]:
    missing = ("ms", "tokens_per_second", "speedup", "encoder_mib", "total_mib", "moved_mib")
    missing += ("tower_moved_mib", "vision_cost")
    alone = row("whole", 1, **dict.fromkeys(missing), out_of_memory=True)
    return {
        "machine": {"device": "NVIDIA H200", "date": "2026-11-28"},
        "memory": "peak allocated",
        "speedup_of": "time",
        "rows": [alone, row("aligned", 2)],
        "scaling": [],
    }


def test_out_of_memory_has_its_row_and_no_number(out_of_memory: dict[str, Any]) -> None:
    text = io.StringIO()
    Console(file=text, width=160).print(multimodal_sp.table(out_of_memory))
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    place = lines.index("long text, 2 images whole x1 out of memory - - - - - - -")
    assert lines[place + 1].startswith("Qwen2.5-VL aligned x2 4,000 ±2% - 16,384 41,000 104,000")
    # Two rows are too few for what is told of a sample; it is told below them.
    assert lines[place + 2 : place + 4] == ["131,072 patches", "131,072 tokens"]


def test_out_of_memory_is_drawn_as_no_bar(out_of_memory: dict[str, Any]) -> None:
    figure = Figure()
    multimodal_sp.draw(out_of_memory, figure)
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [[0.0] * 5, [0.0] * 4 + [41_000.0], [0.0] * 4 + [6_000.0]]


@pytest.mark.parametrize(("gib", "left_out"), [(79, True), (139, False)])
def test_the_long_text_is_left_out_of_all_where_two_gpus_are_too_small(
    monkeypatch: pytest.MonkeyPatch, gib: int, left_out: bool
) -> None:
    monkeypatch.setattr(multimodal_sp, "_gpu_bytes", lambda: gib * 2**30)
    assert (multimodal_sp.LONG not in multimodal_sp._chosen((), "cuda")) == left_out
    assert multimodal_sp._chosen([multimodal_sp.LONG], "cuda") == [multimodal_sp.LONG]
    assert multimodal_sp._chosen((), "cpu") == list(multimodal_sp.NAMES)
