"""`epctl bench train` on gloo ranks: every implementation for real, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epctl.bench import train
from epctl.errors import ConfigError, GateError
from epctl.output import set_mode

pytestmark = pytest.mark.distributed

Run = tuple[dict[str, Any], str, Path]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "epctl", "bench", "train", "--device", "cpu", "--layers", "2"]
    command += ["--zero", "3", "--steps", "1", "--sequence-length", "32"]
    command += ["--json-file", str(folder / "t.json"), "--png", str(folder / "t.png")]
    environment = {**os.environ, "COLUMNS": "170", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "t.json").read_text()), done.stdout + done.stderr, folder


def test_every_implementation_is_gated_and_measured(result: Run) -> None:
    document, text, folder = result
    assert document["absent"] == {}
    names = [(r["optim"], r["implementation"], r["routing"]) for r in document["rows"]]
    assert names == [
        (optim, name, routing)
        for optim in ("muon", "adamw")
        for name in ("epctl", "deepspeed", "transformers")
        for routing in ("natural", "balanced")
    ]
    for row in document["rows"]:
        assert row["gate"]["loss"] <= 1e-5
        assert row["tokens_per_second"]["median"] > 0
        assert 0 < row["mfu"] < 1
    assert "gate against transformers' own model" in text
    assert "where a step goes on rank 0" in text
    assert re.search(r"ZeRO-3, muon: deepspeed, balanced: [\d,]+ tokens/s a rank, peak", text)
    assert (folder / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_epctls_rows_state_ratios_memory_and_their_gate(result: Run) -> None:
    for row in result[0]["rows"]:
        if row["implementation"] != "epctl":
            continue
        assert row["gate"].keys() == {"loss", "norm", "direction", "weights"}
        assert row["predicted_gib"] > 0.1
        for peer in ("deepspeed", "transformers"):
            assert row[f"speed_over_{peer}"] > 0
            assert row[f"memory_over_{peer}"] > 0


def test_balanced_routing_is_even_in_all_of_them(result: Run) -> None:
    for row in result[0]["rows"]:
        even = row["imbalance"] == pytest.approx(1.0, abs=0.05)
        assert even == (row["routing"] == "balanced")


def test_nothing_is_said_of_bfloat16_where_it_is_not_timed(result: Run) -> None:
    assert result[0]["gate_steps"] == 0
    assert result[0]["bfloat16_losses"] == {}


def test_where_a_step_goes_adds_up(result: Run) -> None:
    for row in result[0]["rows"]:
        if row["routing"] == "natural":
            parts = row["breakdown_ms"]
            assert parts["optimizer"] > 0 < parts["compute"]
            if row["implementation"] == "transformers":
                assert parts["expert exchange"] == 0


def measure_with(fault: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    set_mode()  # notes are looked for; another test may have silenced them
    monkeypatch.setattr(train, "MODULE", "failing_bench_ranks")
    monkeypatch.setenv("EPCTL_TEST_FAULT", fault)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return train.measure(device="cpu", layers=2, sequence_length=16, steps=1, **settings)


def test_a_failed_engine_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = measure_with(
        "engines", monkeypatch, zero=[2], optim=["adamw"], rounds=1, profile=False
    )
    rows = {(row["implementation"], row["routing"]): row for row in document["rows"]}
    assert rows.keys() == {("epctl", "natural"), ("epctl", "balanced"), ("deepspeed", "-")}
    reason, peak = rows["deepspeed", "-"]["failed"]
    assert reason.startswith("out of memory: Tried to allocate 20.00 GiB")
    assert peak.endswith(" at its peak")
    said = capsys.readouterr().err
    assert "epctl, natural: " in said
    assert "transformers, natural: " not in said  # red: no number, not even on the way
    where = "transformers at 2 ranks, EP 2, ZeRO-2, adamw"
    assert document["absent"][where].startswith("gate red: a loss is ")


def test_a_forgotten_route_scale_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GateError, match=r"gate red: 2 ranks, EP 2, ZeRO-3, muon: .* allowed"):
        measure_with("scale", monkeypatch, zero=[3], optim=["muon"], peers=())


IN_BFLOAT16: dict[str, Any] = {
    "zero": [3], "optim": ["muon"], "peers": (), "rounds": 1, "profile": False,
    "settings": ["train.precision=bfloat16"],
}  # fmt: skip


def test_twenty_steps_in_bfloat16_stay_with_the_whole_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = measure_with("none", monkeypatch, gate_steps=20, **IN_BFLOAT16)
    gate = document["rows"][0]["gate"]
    assert document["gate_steps"] == 20
    assert 0 < gate["bfloat16_loss"] <= 2e-3
    assert 0 < gate["bfloat16_direction"] < 1e-3
    assert gate["bfloat16_direction"] < gate["bfloat16_parts"] < 0.3
    losses = document["bfloat16_losses"]["2 ranks, EP 2, ZeRO-3, muon"]
    assert losses["unlearnt"] == len(losses["whole"]) == len(losses["epctl"]) == 20
    assert losses["whole"][-1] < 0.95 * losses["whole"][0]  # wrong updates would show


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("order", "direction of everything"),
        ("router", "direction of router"),  # a hundred thousandth of the whole
        ("nan", "direction of "),  # ZeRO skips the step: no optimizer sees any
    ],
)
def test_a_gradient_that_is_wrong_in_bfloat16_alone_stops_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, said: str
) -> None:
    with pytest.raises(GateError, match=rf"bfloat16 gradient {said}.*, step 1: .* allowed"):
        measure_with(fault, monkeypatch, **IN_BFLOAT16)
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(r"losses of steps in bfloat16: whole 5\.\d{4} 5\.\d{4}; epctl 5\.", told)


def test_updates_that_are_a_tenth_too_small_in_bfloat16_stop_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(GateError, match=r"bfloat16 loss, step \d+ \(.*\): .* allowed"):
        measure_with("rate", monkeypatch, gate_steps=20, **IN_BFLOAT16)


def test_steps_of_the_gate_that_nothing_takes_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="101 steps of the gate are more than 100"):
        train.measure(device="cpu", gate_steps=101)
    set_mode()
    monkeypatch.setattr(train._Run, "all", lambda self: None)
    monkeypatch.setattr(train, "_document", lambda run: {})
    train.measure(device="cpu", gate_steps=20)
    assert "`--gate-steps` is ignored" in capsys.readouterr().err
