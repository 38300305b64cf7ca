"""`epctl bench muon`: shapes, counts, the gate before any number, and one clean document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epctl.bench import muon, muon_own, muon_products
from epctl.bench.muon_shapes import MatrixBatch, matrices_of_rank, parse_shapes
from epctl.errors import ConfigError, GateError
from epctl.kernels.newton_schulz import COEFFICIENTS, orthogonalize
from epctl.kernels.newton_schulz_cost import iteration_flops

TINY = {"shapes": ["2x24x40", "1x33x16"], "device": "cpu", "rounds": 2, "warm_up": 0}


def test_a_rank_of_moonlight_owns_what_the_model_has() -> None:
    """26 layers of 64 experts of three matrices over 8 ranks; 215 other matrices, shared out."""
    batches = matrices_of_rank("moonshotai/Moonlight-16B-A3B", 8)
    experts = [b for b in batches if {b.num_rows, b.num_columns} == {1408, 2048}]
    assert sum(b.num_owned for b in experts) == 624
    others = sum(b.num_owned for b in batches) - 624
    assert others * 8 == pytest.approx(215)
    assert all(b.num_measured <= 64 for b in batches)


def test_experts_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(ConfigError, match="64 experts: ep 7"):
        matrices_of_rank("moonshotai/Moonlight-16B-A3B", 7)


@pytest.mark.parametrize("text", ["64", "0x4x4", "4x4", "axbxc", "4x4x-4", ""])
def test_malformed_shapes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="BATCHxROWSxCOLUMNS"):
        parse_shapes([text])


def test_rows_have_gate_time_and_floor() -> None:
    result = muon.measure(**TINY, peers=["torch.optim.Muon"])
    assert {row["implementation"] for row in result["rows"]} == {
        "epctl",
        "epctl standard",
        "epctl gram",
        "torch.optim.Muon",
    }
    for row in result["rows"]:
        assert row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        own = row["implementation"].startswith("epctl")
        assert row["gate"]["error_full_rank"] < (1e-5 if own else 0.05)
        assert row["of_floor"] * row["ms"]["median"] == pytest.approx(row["floor_ms"])
    assert "GPU" in result["absent"]["epctl symmetric"]
    muon.table(result)


def test_products_have_rows_of_their_own() -> None:
    shapes = ["2x24x40", "2x40x24", "2x24x40"]
    result = muon.measure(shapes=shapes, device="cpu", rounds=1, warm_up=0, peers=(), products=True)
    rows = [row for row in result["rows"] if "error" in row]
    names = [f"{shape} {name}" for shape in shapes[:2] for name in ("X X^T", "R R", "Q X")]
    assert [row["batch"] for row in rows] == names
    assert {row["implementation"] for row in rows} == {"torch"}  # tiles are for a GPU
    assert all(row["error"] < 1e-6 for row in rows)
    by_name = {row["batch"]: row for row in rows}
    seconds = {name: row["ms"]["median"] / 1e3 for name, row in by_name.items()}
    flops = {name: row["tflops"] * 1e12 * seconds[name] for name, row in by_name.items()}
    assert flops["2x24x40 X X^T"] == pytest.approx(2 * 2 * 24 * 24 * 40)
    assert flops["2x40x24 R R"] == pytest.approx(2 * 2 * 24**3)
    assert flops["2x24x40 Q X"] == pytest.approx(2 * 2 * 24 * 24 * 40)
    for name in names:  # half of what is symmetric
        share = 1 if "Q" in name else 2
        floor = 1e-3 * by_name[name]["floor_ms"] * result["matmul_tflops"] * 1e12
        assert floor == pytest.approx(flops[name] / share)
    muon.table(result)


def test_a_wrong_product_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = muon_products.PRODUCTS[1]
    wrong = right._replace(by_torch=lambda o: right.by_torch(o).mul_(1.001))
    monkeypatch.setattr(muon_products, "PRODUCTS", (wrong,))
    with pytest.raises(GateError, match="torch at 2x24x40 R R"):
        muon.measure(**TINY, peers=(), products=True)


def test_the_whole_step_is_one_row_over_all_matrices() -> None:
    result = muon.measure(**TINY, peers=(), step=True)
    (row,) = [row for row in result["rows"] if row["batch"].startswith("step")]
    assert row["implementation"] == "epctl step, torch"
    assert "'triton' cannot run on cpu" in result["absent"]["epctl step, triton"]
    assert (row["num_matrices"], row["num_parameters"]) == (3, 2 * 24 * 40 + 33 * 16)
    flops = 2 * iteration_flops("gram", 24, 40) + iteration_flops("gram", 33, 16)
    assert row["tflops"] * 1e9 * row["ms"]["median"] == pytest.approx(flops)
    muon.table(result)


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_a_candidate_that_fails_has_no_number_and_the_rest_has(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(x_BMN: torch.Tensor) -> torch.Tensor:
        if fault == "broken":
            raise RuntimeError("out of shared memory")
        return orthogonalize(x_BMN) * 1.01

    found, absent = muon_own.implementations(torch.device("cpu"), ())
    candidate = muon_own.Implementation("new", run, "you", own=True)
    monkeypatch.setattr(muon, "implementations", lambda *args: ([*found, candidate], absent))
    result = muon.measure(**TINY, peers=())
    assert {row["implementation"] for row in result["rows"]} == {item.name for item in found}
    why = {"wrong": "gate red: new at 1x33x16", "broken": "RuntimeError: out of shared memory"}
    assert why[fault] in result["absent"]["new"]


def test_totals_weigh_each_shape_by_what_a_rank_owns() -> None:
    def row(batch: str, name: str, ms: float, measured: int, owned: float) -> dict[str, Any]:
        facts = {"batch": batch, "implementation": name, "ms": {"median": ms}}
        return {**facts, "num_measured": measured, "num_owned": owned}

    rows = [row("a", "x", 8.0, 4, 6), row("b", "x", 1.0, 1, 0.5), row("a", "y", 1.0, 4, 6)]
    assert muon._totals({"rows": rows}) == {"x": 12.5}  # y did not run at every shape


@pytest.mark.parametrize("fault", ["coefficients", "nan", "scale"])
def test_a_red_gate_gives_no_number(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: dict[str, Any] = {
        "coefficients": lambda x, **kw: orthogonalize(x, coefficients="jordan"),
        "nan": lambda x, **kw: orthogonalize(x) * float("nan"),
        "scale": lambda x, **kw: orthogonalize(x) * 1.01,
    }
    monkeypatch.setattr(muon_own, "own_iteration", faults[fault])
    with pytest.raises(GateError, match="epctl at 2x24x40"):
        muon.measure(**TINY, peers=())


def test_the_gate_is_the_polynomial_and_not_the_polar_factor() -> None:
    """A perfect polar factor is another function: its singular values are all one."""
    exact = muon_own.Implementation("polar", _polar, "you", own=True, candidate=False)
    with pytest.raises(GateError, match="error_full_rank"):
        muon.gate(exact, MatrixBatch(1, 24, 40, 1), torch.device("cpu"))
    assert "you" in COEFFICIENTS


def _polar(x_BMN: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(x_BMN, full_matrices=False)
    return left @ right


def test_json_is_one_document_whatever_a_peer_logs(tmp_path: Path) -> None:
    flags = ["--shape=2x24x40", "--device=cpu", "--rounds=1", "--peer=deepspeed-gram", "--json"]
    completed = subprocess.run(
        [
            sys.executable,
            "-m",
            "epctl",
            "bench",
            "muon",
            *flags,
            "--json",
            f"--png={tmp_path}/m.png",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1"},
    )
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout)
    names = {row["implementation"] for row in result["rows"]} | set(result["absent"])
    assert "deepspeed-gram" in names
    assert (tmp_path / "m.png").stat().st_size > 1000
