"""Every probe against the installed engine, and against the engine with its behaviour patched."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from epctl.launch.hazards import load_hazards
from epctl.launch.probe_run import ProbeResult, run_probes

pytestmark = pytest.mark.distributed
HAZARDS = list(load_hazards())
# What DeepSpeed 0.19.8 with transformers 5.23 is known to do, by running it.
GONE = {
    "bf16_optimizer_last_micro_batch",
    "offload_drops_micro_batches",
    "muon_adamw_under_zero_init",
    "muon_sgd_at_zero0",
    "muon_per_micro_batch_zero3",
    "correction_bias_lost",
    "route_scale_lost",
    "capacity_by_logits",
    "small_shared_memory",
    "library_versions_differ",
}
NOT_PROBED = {"cpu_adam_subgroup_drift"}  # unless its op happens to be built


@pytest.fixture(autouse=True)
def _rank_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture(scope="module")
def installed() -> dict[str, ProbeResult]:
    return {result.id: result for result in run_probes(HAZARDS, lambda result: None)}


@pytest.fixture(scope="module")
def patched() -> dict[str, ProbeResult]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        results = run_probes(HAZARDS, lambda result: None, module="probe_faults")
    return {result.id: result for result in results}


def test_every_hazard_has_a_probe_and_a_patch() -> None:
    from probe_faults import PATCHES

    from epctl.launch.probe import load_probes

    assert set(load_probes()) == set(HAZARDS) == set(PATCHES)


@pytest.mark.parametrize("hazard_id", HAZARDS)
def test_verdict_on_the_installed_engine(installed: dict[str, ProbeResult], hazard_id: str) -> None:
    if importlib.metadata.version("deepspeed") != "0.19.8":
        pytest.skip("expected verdicts are those of DeepSpeed 0.19.8")
    if hazard_id == "autoep_transformers_recorders" and not importlib.metadata.version(
        "transformers"
    ).startswith("5.23"):
        pytest.skip("the expected verdict is that of transformers 5.23")
    result = installed[hazard_id]
    if hazard_id in NOT_PROBED:
        assert result.verdict in ("not probed here", "gone"), result
    else:
        assert result.verdict == ("gone" if hazard_id in GONE else "live"), result
    assert result.seen


@pytest.mark.parametrize("hazard_id", HAZARDS)
def test_verdict_turns_with_the_behaviour(patched: dict[str, ProbeResult], hazard_id: str) -> None:
    """A planted fault is seen where the engine is sound, a mended one where it is not."""
    result = patched[hazard_id]
    expected = "live" if hazard_id in GONE | NOT_PROBED else "gone"
    assert result.verdict == expected, result
    if hazard_id == "cpu_adam_subgroup_drift":
        assert result.seen.endswith("sound op: gone")


def from_crashing(ids: list[str], silence_seconds: float = 20.0) -> dict[str, ProbeResult]:
    seen: list[ProbeResult] = []
    results = run_probes(ids, seen.append, module="probe_crashes", silence_seconds=silence_seconds)
    assert {r.id for r in seen} == {r.id for r in results} == set(ids)
    return {result.id: result for result in results}


def test_a_probe_that_kills_a_rank_costs_its_own_verdict_only() -> None:
    results = from_crashing(["before", "dies", "after"])
    assert results["before"].verdict == results["after"].verdict == "gone"
    assert results["dies"].verdict == "failed"
    assert results["dies"].seen == "rank 1 ended with 1: a rank said this last"


def test_a_probe_that_hangs_is_given_up() -> None:
    started = time.monotonic()
    results = from_crashing(["hangs", "after"], silence_seconds=4.0)
    assert results["hangs"].seen == "nothing happened for 4 s"
    assert results["after"].verdict == "gone"
    assert time.monotonic() - started < 40


def test_ranks_that_never_start_fail_all_probes_once() -> None:
    results = from_crashing(["early", "other"])
    assert {result.verdict for result in results.values()} == {"failed"}


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "epctl", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_probes_and_reports_as_json() -> None:
    result = doctor("--only", "default_clipping", "--device", "cpu", "--json")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)["hazards"][0]
    assert row["id"] == "default_clipping"
    assert row["verdict"] == "live"
    assert row["upstream"] == ["#8068"]


def test_command_exits_7_for_a_plan_in_danger() -> None:
    plan = ("--moe", "autoep", "--set", "train.precision=bfloat16", "--device", "cpu")
    result = doctor("--only", "router_in_bfloat16", *plan)
    assert result.returncode == 7
    assert "router_in_bfloat16" in result.stderr
    assert "ENDANGERS THIS PLAN" in result.stdout


def test_doctor_without_probes_never_loads_torch() -> None:
    program = (
        "import sys\n"
        "from epctl.cli import app\n"
        "try: app(['doctor', '--no-probes', '--json'])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "HEAVY []" in result.stderr


@pytest.mark.slow
def test_whole_doctor_is_fast() -> None:
    """The bar is 90 s on two quiet cores."""
    document = json.loads(doctor("--device", "cpu", "--json").stdout)
    assert document["seconds"] < 90
    assert len(document["hazards"]) == len(HAZARDS)
