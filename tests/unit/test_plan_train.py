"""`epctl train` without `--ep` or `--zero`, and prediction beside measurement."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from epctl import cli
from epctl.config import ResolvedConfig, resolve_config
from epctl.errors import ResourceError
from epctl.launch import plan_train
from epctl.launch.devices import Placement
from epctl.launch.plan_train import (
    compared,
    compared_text,
    plan_run,
    predict_run,
    prediction_document,
    rank_bytes,
    read_prediction,
    run_shape,
    write_prediction,
)
from epctl.layout.catalog import catalog_source
from epctl.output import Mode, Output

MOONLIGHT = "moonshotai/Moonlight-16B-A3B"
SOURCE = catalog_source(MOONLIGHT)
GIBIBYTE = 2**30


def sink() -> tuple[Output, io.StringIO]:
    text = io.StringIO()
    return Output(Mode.HUMAN, stdout=io.StringIO(), stderr=text), text


def planned(
    monkeypatch: pytest.MonkeyPatch, gibibytes: float, gpus: int = 8, **flags: Any
) -> tuple[ResolvedConfig, str]:
    monkeypatch.setattr(plan_train, "gpu_memory", lambda: gibibytes * GIBIBYTE)
    monkeypatch.setattr(plan_train, "host_memory", lambda: 64.0 * GIBIBYTE)
    named = {key.replace("__", "."): value for key, value in flags.items()}
    resolved = resolve_config(flags={"model.reference": MOONLIGHT, **named})
    output, text = sink()
    placement = Placement("cuda", gpus, "a test")
    return plan_run(resolved, placement, SOURCE, output), text.getvalue()


def test_what_is_not_stated_is_planned_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, text = planned(monkeypatch, 80)
    assert resolved.sources["parallel.ep"] == resolved.sources["parallel.zero"] == "plan"
    assert resolved.config.parallel.num_ranks is None
    assert f"plan: ep {resolved.config.parallel.ep}, zero {resolved.config.parallel.zero}" in text
    assert "GiB predicted of 80.00 GiB a GPU" in text
    # One sequence a rank and step, as the defaults say.
    train = resolved.config.train
    assert train.micro_batch_size * train.gradient_accumulation_steps == 1
    # So that a resumed run keeps them.
    assert resolved.is_given("parallel.ep")


def test_what_is_stated_is_never_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    both, text = planned(monkeypatch, 80, parallel__ep=2, parallel__zero=3)
    assert (both.config.parallel.ep, both.config.parallel.zero, text) == (2, 3, "")
    one, _ = planned(monkeypatch, 80, parallel__ep=2)
    assert one.config.parallel.ep == 2
    assert one.sources["parallel.ep"] == "flag"
    assert one.sources["parallel.zero"] == "plan"
    kept, _ = planned(monkeypatch, 141, train__activation_checkpointing="full")
    assert kept.config.train.activation_checkpointing == "full"
    assert kept.sources["train.activation_checkpointing"] == "flag"


def test_the_tokens_of_a_step_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"train__gradient_accumulation_steps": 8, "train__sequence_length": 8192}
    resolved, _ = planned(monkeypatch, 80, **settings)
    train = resolved.config.train
    assert train.micro_batch_size * train.gradient_accumulation_steps == 8


def test_nothing_fits_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="nothing fits") as raised:
        planned(monkeypatch, 16, gpus=2)
    assert "state `--ep` and `--zero` to try all the same" in str(raised.value.hint)


def test_a_host_that_may_be_too_small_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_train, "host_memory", lambda: 1.0 * GIBIBYTE)
    resolved = resolve_config(flags={"model.reference": MOONLIGHT})
    output, text = sink()
    kept = plan_run(resolved, Placement("cpu", 2, "a test"), SOURCE, output)
    assert kept == resolved
    assert "warning: nothing fits" in text.getvalue()


def test_unknown_gpu_memory_leaves_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_train, "gpu_memory", lambda: None)
    resolved = resolve_config(flags={"model.reference": MOONLIGHT})
    output, text = sink()
    assert plan_run(resolved, Placement("cuda", 8, "a test"), SOURCE, output) == resolved
    assert "no plan" in text.getvalue()


def test_prediction_stands_beside_the_measurement(tmp_path: Path) -> None:
    config = resolve_config(flags={"parallel.ep": 2, "parallel.zero": 3}).config
    prediction = predict_run(config, Placement("cpu", 2, "a test"), None)
    state = rank_bytes(prediction)
    assert state["total"] == state["parameters"] + state["masters"] + state["optimizer_state"]
    assert read_prediction(tmp_path) is None
    write_prediction(tmp_path, prediction_document(prediction, "cpu"))
    document = read_prediction(tmp_path)
    assert document is not None
    event = compared(document, round(document["peak_bytes"] / 1.25))
    assert event["error"] == pytest.approx(0.25, abs=1e-4)
    assert "predicted (+25%)" in compared_text(event)


def test_the_embedded_model_has_a_shape() -> None:
    config = resolve_config(flags={}).config
    shape, layout = run_shape(config, None)
    assert (shape.num_experts, shape.num_layers, layout.ep_sizes[-1]) == (64, 4, 64)


def test_plan_command_speaks_json_and_fails_with_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = CliRunner().invoke
    arguments = ["plan", MOONLIGHT, "--gpus", "8", "--gpu-memory", "80GiB"]
    drawn = tmp_path / "front.png"
    found = json.loads(run(cli.app, [*arguments, "--json", "--png", str(drawn)]).stdout)
    assert found["options"][0]["needed_bytes"] <= found["gpu_memory_bytes"]
    assert found["command"].startswith(f"epctl train {MOONLIGHT} ")
    assert all(term["formula"] for term in found["terms"])
    assert drawn.stat().st_size > 10_000
    explained = run(cli.app, [*arguments, "--explain"]).stdout
    assert "allocated on the device" in explained
    assert "assumed" in explained
    swept = tmp_path / "sweep.png"
    sweep = run(cli.app, [*arguments, "--sweep", "gpus", "--json", "--png", str(swept)])
    assert len(json.loads(sweep.stdout)["sweep"]) == 15
    assert swept.stat().st_size > 10_000
    small = run(cli.app, [*arguments[:3], "1", "--gpu-memory", "8GiB"])
    assert small.exit_code == 6
    assert run(cli.app, [*arguments, "--sweep", "nodes"]).exit_code == 3
