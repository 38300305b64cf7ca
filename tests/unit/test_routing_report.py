"""What a report says of experts: loads and dropped choices by layer, and the heat maps of them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity_ranks import tiny_config

from epctl.config import resolve_config
from epctl.launch.chart import _draw_map, heat_maps, write_load_png
from epctl.runtime.balance import routers_of, set_up_balance
from epctl.runtime.build import build_model
from epctl.runtime.mesh import Mesh
from epctl.runtime.routing_report import take_routing
from epctl.runtime.weights import RandomWeights

NUM_TOKENS, TOP_K = 48, 3


def engine_of(**moe: Any) -> Any:
    cpu = torch.device("cpu")
    weights = RandomWeights(seed=1, std=0.08)
    model: Any = build_model(
        tiny_config(), Mesh(0, 1, 1, 0), weights, dtype=torch.float32, device=cpu
    )
    config = resolve_config(flags={f"moe.{key}": value for key, value in moe.items()}).config
    model.epctl_balance = set_up_balance(model, config)
    return SimpleNamespace(module=model, device=cpu)


def forward(engine: Any) -> None:
    ids = torch.randint(0, 64, (2, NUM_TOKENS // 2), generator=torch.Generator().manual_seed(0))
    engine.module(input_ids=ids)


@pytest.mark.usefixtures("alone")
def test_choices_are_of_every_layer_and_expert_since_the_last_report() -> None:
    engine = engine_of()
    forward(engine)
    counted = [router.tokens_per_expert.tolist() for router in routers_of(engine.module)]
    routing = take_routing(engine)
    assert routing.choices == counted
    assert [sum(layer) for layer in routing.choices] == [NUM_TOKENS * TOP_K] * 2
    loads = [max(layer) / (sum(layer) / 8) for layer in counted]
    assert routing.facts["expert_loads"] == [round(load, 3) for load in loads]
    assert routing.facts["expert_load"] == round(max(loads), 3)
    assert routing.facts.keys() == {"expert_load", "expert_loads"}
    assert take_routing(engine).choices == [[0] * 8] * 2


@pytest.mark.usefixtures("alone")
def test_dropped_choices_are_told_by_layer() -> None:
    engine = engine_of(capacity_factor=0.5, z_loss=0.1)
    forward(engine)
    routers = routers_of(engine.module)
    value = sum(float(router.losses.total) for router in routers)
    routing = take_routing(engine)
    capacity = math.ceil(0.5 * NUM_TOKENS * TOP_K / 8)
    lost = [sum(max(0, count - capacity) for count in layer) for layer in routing.choices]
    assert min(lost) > 0
    shares = [round(number / (NUM_TOKENS * TOP_K), 6) for number in lost]
    assert routing.facts["drop_rates"] == shares
    assert routing.facts["drop_rate"] == pytest.approx(sum(shares) / 2, abs=1e-6)
    assert routing.facts["balance_loss"] == round(value, 6) > 0
    again = take_routing(engine)  # nothing has come since, and every layer keeps its place
    assert again.facts["drop_rates"] == [0.0, 0.0]
    assert again.choices == [[0] * 8] * 2


@pytest.mark.usefixtures("alone")
def test_choices_and_drops_add_up_over_ranks_and_losses_are_a_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks of which the other did the same; by position, so that no part is taken twice."""
    one, both = (engine_of(capacity_factor=0.5, z_loss=0.1) for _ in range(2))
    forward(one), forward(both)
    alone = take_routing(one)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.mul_(2))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    together = take_routing(both)
    assert together.facts == alone.facts
    assert together.choices == [[2 * count for count in layer] for layer in alone.choices]


def test_a_model_without_routers_has_no_load() -> None:
    engine = SimpleNamespace(module=torch.nn.Linear(2, 2), device=torch.device("cpu"))
    routing = take_routing(engine)
    assert math.isnan(routing.facts["expert_load"])
    assert routing.choices == []


def test_heat_maps_have_a_row_a_layer(tmp_path: Path) -> None:
    steps = [
        {"step": 1, "expert_loads": [1.5, 2.0, 1.0], "drop_rates": [0.1, 0.2, 0.0]},
        {"step": 8, "expert_loads": [1.25, 4.0, 1.0], "drop_rates": [0.0, 0.5, 0.0]},
    ]
    choices = [[6, 2], [8, 0, 4, 0], [0, 0]]  # the last met no token
    load, dropped, every = heat_maps(steps, choices)
    assert (load.steps, every.steps) == ([1, 8], [])
    assert load.values == [[1.5, 1.25], [2.0, 4.0], [1.0, 1.0]]
    assert dropped.values == [[0.1, 0.0], [0.2, 0.5], [0.0, 0.0]]
    assert every.values[1] == [8 / 3, 0.0, 4 / 3, 0.0]
    assert every.values[0][:2] == [1.5, 0.5]
    assert all(map(math.isnan, every.values[0][2:]))
    without = [{"step": 1, "expert_loads": [1.5]}]
    assert [drawn.title for drawn in heat_maps(without)] == [load.title]
    write_load_png(tmp_path / "load.png", steps, choices)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_where_nothing_is_dropped_the_map_is_of_the_lowest_color() -> None:
    from matplotlib.figure import Figure

    steps = [{"step": 1, "expert_loads": [1.0], "drop_rates": [0.0]}]
    panels = Figure().subplots(1, 2)
    for axes, drawn in zip(panels, heat_maps(steps), strict=True):
        _draw_map(axes, drawn)
    limits = [axes.get_images()[0].get_clim() for axes in panels]
    assert limits == [(1.0, 1.1), (0.0, 0.01)]
