"""Predictions of runs whose peaks are recorded in benchmarks/, for a test and for docs/plan.md."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epctl.config import OptimSection, resolve_config
from epctl.launch.cost import step_cost
from epctl.launch.cost_rates import Rates
from epctl.launch.memory import predict
from epctl.launch.memory_activations import moe_block_bytes
from epctl.launch.memory_settings import RankPlan, rank_plan
from epctl.launch.memory_shape import ModelShape, model_shape
from epctl.layout.catalog import catalog_source
from epctl.layout.detect import detect

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One measured number of bytes and its prediction."""

    what: str
    note: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return (self.predicted - self.measured) / self.measured


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((BENCHMARKS / "memory_recorded_202611.json").read_text())
    return loaded


def cut_shape(model: str, num_layers: int, optim: str = "muon") -> tuple[ModelShape, Any]:
    """Returns the shape of a catalog model's first layers, and the settings it was made with."""
    source = catalog_source(model)
    assert source is not None
    config = {**source.config, "num_hidden_layers": num_layers}
    tensors = {
        name: entry
        for name, entry in source.tensors.items()
        if not (found := re.match(r"model\.layers\.(\d+)\.", name)) or int(found[1]) < num_layers
    }
    cut = dataclasses.replace(source, config=config, tensors=tensors)
    return model_shape(detect(cut), config, OptimSection(name=optim)), config


def plan_of(run: dict[str, Any]) -> tuple[ModelShape, RankPlan]:
    optim = run["settings"].get("optim.name", "muon")
    shape, _ = cut_shape(run["model"], run["num_layers"], optim)
    settings = {"model.reference": run["model"], **run["settings"]}
    plan = rank_plan(resolve_config(flags=settings).config, run["num_ranks"], "cuda")
    if run["logits"] == "whole":  # before the loss was made in blocks
        plan = dataclasses.replace(plan, logits_bytes=math.inf)
    return shape, plan


def recorded_speeds() -> Iterator[Recorded]:
    """Yields seconds a step, measured and predicted with the documented rates."""
    for run in document()["runs"]:
        if "seconds_per_step" in run:
            cost = step_cost(*plan_of(run), Rates(), run["num_ranks"])
            yield Recorded(_label(run), run["note"], run["seconds_per_step"], cost.seconds)


def recorded_runs() -> Iterator[Recorded]:
    for run in document()["runs"]:
        shape, plan = plan_of(run)
        prediction = predict(shape, plan)
        assert shape.num_parameters == run["num_parameters"]
        what = _label(run)
        yield Recorded(what, run["note"], run["peak_gib"] * 2**30, prediction.peak_bytes)
        if "state_gib" in run:
            state = run["state_gib"] * 2**30
            yield Recorded(f"state of: {what}", run["note"], state, prediction.state_bytes)


def recorded_blocks() -> Iterator[Recorded]:
    for file in document()["blocks"]:
        result = json.loads((BENCHMARKS / file).read_text())
        shape = result["shape"]
        for row in result["rows"]:
            if row["implementation"] != "epctl":
                continue
            kept, peak = moe_block_bytes(tokens=row["tokens"], **shape)
            what = f"MoE block {result['shape_name']}, {row['tokens']:,} tokens, {row['routing']}"
            yield Recorded(f"{what}: kept", file, row["saved_mib"] * 2**20, kept)
            yield Recorded(f"{what}: peak", file, row["peak_mib"] * 2**20, peak)


def _label(run: dict[str, Any]) -> str:
    rows = run["settings"]["train.micro_batch_size"]
    return f"{run['what']}, {run['machine']}, {run['num_layers']} layers, micro-batch {rows}"
