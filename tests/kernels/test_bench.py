"""`epctl bench moe` on a CPU: the gate, the document and the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from epctl.bench import moe
from epctl.bench.command import run_case
from epctl.bench.moe_shapes import MOE_SHAPES, parse_shape
from epctl.errors import ConfigError, GateError, ResourceError

TINY = {"shape": "64,48,8,2", "device": "cpu", "warm_up": 1, "rounds": 2}


def test_bench_moe_writes_what_it_measured(tmp_path: Path) -> None:
    json_path, png_path = tmp_path / "moe.json", tmp_path / "moe.png"
    run_case(
        "moe",
        **TINY,
        tokens=[16, 32],
        routings=["natural", "zipf"],
        peers=["torch-grouped-mm"],
        json_path=json_path,
        png_path=png_path,
    )
    rows = json.loads(json_path.read_text())["rows"]
    assert len(rows) == 8
    assert {row["implementation"] for row in rows} == {"epctl", "torch-grouped-mm"}
    assert all(max(row["gate"].values()) < 1e-5 for row in rows)
    assert all(row["both_ms"]["median"] > 0 for row in rows)
    assert png_path.read_bytes().startswith(b"\x89PNG")


def test_bench_moe_prints_no_number_on_a_red_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = moe.moe_mlp
    monkeypatch.setattr(moe, "moe_mlp", lambda *arguments: honest(*arguments) * 1.05)
    with pytest.raises(GateError, match=r"gate red: \w+ is 5\.0e-02 off"):
        run_case("moe", **TINY, tokens=[16], peers=[])
    assert "TFLOP" not in capsys.readouterr().out


def test_bench_moe_leaves_out_a_peer_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from epctl.bench import peers

    honest = peers.grouped_mm.moe_mlp
    monkeypatch.setattr(peers.grouped_mm, "moe_mlp", lambda *arguments: honest(*arguments) + 1)
    result = run_case("moe", **TINY, tokens=[16], peers=["torch-grouped-mm"])
    assert "gate red" in result["absent"]["torch-grouped-mm"]
    assert [row["implementation"] for row in result["rows"]] == ["epctl"]


def test_routings_differ_in_load() -> None:
    shape = parse_shape("64,48,16,2")
    imbalance = {
        routing: moe.load_imbalance(
            moe.make_problem(shape, 512, routing, torch.device("cpu"), torch.float32)
        )
        for routing in ("balanced", "natural", "zipf")
    }
    assert imbalance["balanced"] <= imbalance["natural"] < imbalance["zipf"]
    assert imbalance["zipf"] > 2


def test_forward_flops_of_moonlight() -> None:
    # 6 T d n K, reference/moe.md: 3.40 TFLOP at 32,768 tokens.
    assert MOE_SHAPES["moonlight"].forward_flops(32768) == pytest.approx(3.40e12, rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": "8x7b"}, ConfigError, "neither a known name"),
        ({"shape": "64,48,8,9"}, ConfigError, "top-k <= experts"),
        ({"routings": ["even"]}, ConfigError, "routing 'even' is unknown; known: natural"),
        ({"peers": ["megablocks"]}, ConfigError, "peer 'megablocks' is unknown; known: deepspeed"),
        ({"tokens": [0]}, ConfigError, "at least one"),
        ({"device": "tpu"}, ConfigError, "device 'tpu' is unknown"),
        ({"shape": "moonlight", "tokens": [16384]}, ResourceError, "too much for a CPU"),
    ],
)
def test_bench_moe_refuses(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_case("moe", **{**TINY, "tokens": [16], **arguments})
