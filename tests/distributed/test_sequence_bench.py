"""`epctl bench multimodal-sp` on two gloo ranks: gate, rows, what did not take part, a red gate.

And one rank alone that runs out of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epctl.bench import multimodal_sp
from epctl.bench.multimodal_sp_gate import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from epctl.bench.report import write_png
from epctl.errors import ConfigError, GateError, ResourceError

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    names = ["one large image", "8 images"]
    command = [sys.executable, "-m", "epctl", "bench", "multimodal-sp", "--device", "cpu"]
    command += [word for name in names for word in ("--workload", name)]
    command += ["--rounds", "1", "--json-file", str(folder / "sp.json")]
    command += ["--png", str(folder / "sp.png")]
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "sp.json").read_text()), done.stdout, folder


def rows_of(result: dict[str, Any], workload: str) -> dict[str, dict[str, Any]]:
    return {row["mode"]: row for row in result["rows"] if row["workload"] == workload}


def test_every_mode_is_gated_and_measured(result: tuple[dict[str, Any], str, Path]) -> None:
    document, text, folder = result
    assert [row["mode"] for row in document["rows"]] == 2 * ["whole", *multimodal_sp.MODES]
    for row in document["rows"]:
        assert row["gate"]["loss"] <= 1e-5
        assert row["gate"]["gradient"] <= 1e-4
        assert row["ms"]["median"] > 0
    assert "one large image" in text
    assert "aligned x2" in text
    assert (folder / "sp.png").read_bytes()[:4] == b"\x89PNG"


def test_aligned_cuts_send_less_and_keep_half(result: tuple[dict[str, Any], str, Path]) -> None:
    """One image of windows: a quarter of the layers talk, and each rank keeps half of the rows."""
    rows = rows_of(result[0], "one large image")
    assert rows["aligned"]["vision_cost"] < 1.1 < rows["units"]["vision_cost"]
    assert rows["replicate"]["vision_cost"] == 2.0
    assert 1.1 < rows["gcs"]["vision_cost"] < 2.0
    assert rows["aligned"]["moved_mib"] < 0.5 * rows["ulysses"]["moved_mib"]
    assert rows["aligned"]["encoder_mib"] < 0.55 * rows["whole"]["encoder_mib"]
    assert rows["gcs"]["encoder_mib"] > 1.2 * rows["aligned"]["encoder_mib"]


def test_more_ranks_are_simulated_from_this_run_and_marked(
    result: tuple[dict[str, Any], str, Path],
) -> None:
    document, text, _ = result
    assert "* is a simulation" in text
    for one in document["scaling"]:
        sources = {point["ranks"]: point["source"] for point in one["points"]}
        assert sources == {1: "measured", 2: "measured"} | dict.fromkeys(
            (4, 8, 16, 32, 64), "simulated"
        )
        assert 0 < one["rates"]["tower_share"] < 1
        assert one["rates"]["bytes_per_second"] > 0
        row = rows_of(document, one["workload"])["aligned"]
        two = one["points"][1]
        # The bytes that the simulation counts are those that were sent, up to features that
        # happened to be made where they were needed.
        assert row["moved_mib"] <= two["sent_mib"] * 1.01 <= row["moved_mib"] * 1.2
    fewer = rows_of(document, "one large image")
    assert fewer["aligned"]["tower_moved_mib"] <= fewer["ulysses"]["tower_moved_mib"] / 3.5


def test_deepspeed_is_shown_with_its_error_and_gets_no_number(
    result: tuple[dict[str, Any], str, Path],
) -> None:
    absent = result[0]["absent"]
    llava = absent["DeepSpeed's auto_wrap_model_for_sp on LLaVA-1.5"]
    assert llava.startswith("gate red: ")
    assert "gradients are off, the worst by" in llava
    qwen = absent["DeepSpeed's auto_wrap_model_for_sp on Qwen2.5-VL"]
    assert "no recognisable attention modules" in qwen


def test_a_severed_gradient_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multimodal_sp, "MODULE", "broken_bench_ranks")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(GateError, match=r"8 images, .*, 2 ranks: .*gradient 1\.0"):
        multimodal_sp.measure(workloads=["8 images"], device="cpu", rounds=1)


def test_one_rank_out_of_memory_is_shown_and_two_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of the failed step is kept (crowded_bench_ranks.py), nor is it tried again."""
    monkeypatch.setattr(multimodal_sp, "MODULE", "crowded_bench_ranks")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    result = multimodal_sp.measure(workloads=[multimodal_sp.LONG], device="cpu", rounds=1)
    whole, aligned = result["rows"]
    assert (whole["mode"], whole["ranks"], whole["out_of_memory"]) == ("whole", 1, True)
    missing = {key for key, value in whole.items() if value is None}
    assert missing >= {"ms", "speedup", "tokens_per_second", "total_mib"}
    assert (aligned["mode"], aligned["ranks"], aligned["tokens"]) == ("aligned", 2, 1024)
    assert "out_of_memory" not in aligned
    assert aligned["speedup"] is None
    assert min(aligned["ms"]["low"], aligned["tokens_per_second"], aligned["total_mib"]) > 0
    assert aligned["gate"]["loss"] <= LOSS_TOLERANCE
    assert aligned["gate"]["gradient"] <= GRADIENT_TOLERANCE
    assert result["scaling"] == []
    json.dumps(result, allow_nan=False)
    write_png(multimodal_sp, result, tmp_path / "sp.png")


def test_wrong_requests_are_refused_before_a_rank_starts() -> None:
    with pytest.raises(ConfigError, match="workload 'films' is unknown"):
        multimodal_sp.measure(workloads=["films"])
    with pytest.raises(ConfigError, match="two ranks"):
        multimodal_sp.measure(ranks=[1], device="cpu")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "") == "":
        with pytest.raises(ResourceError, match="this machine offers 0"):
            multimodal_sp.measure(device="cuda")
