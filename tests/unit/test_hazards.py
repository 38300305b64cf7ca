"""Hazards as data, the doctor's facts and what must never be in a report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from epctl.config import resolve_config
from epctl.errors import ConfigError, GateError
from epctl.launch import doctor, doctor_facts
from epctl.launch.devices import Placement
from epctl.launch.hazards import Hazard, advice, hazards_page, load_hazards
from epctl.launch.probe_run import ProbeResult

ROOT = Path(__file__).parents[2]
CPU = Placement("cpu", 2, "")


def plan(**flags: Any) -> dict[str, Any]:
    named = {key.replace("__", "."): value for key, value in flags.items()}
    return doctor.plan_facts(resolve_config(flags=named), CPU)


def test_page_is_generated_from_the_data() -> None:
    page = (ROOT / "docs" / "hazards.md").read_text("utf-8")
    assert page == hazards_page(), "run `python -m epctl.launch.hazards`"


def test_every_hazard_has_consequence_action_and_upstream() -> None:
    for hazard in load_hazards().values():
        assert hazard.consequence
        assert hazard.action
        assert hazard.upstream


def test_conditions_name_settings_and_facts_that_exist() -> None:
    known = plan()
    for hazard in load_hazards().values():
        for condition in hazard.blocks:
            assert set(condition) <= set(known), hazard.id
    with_typo = next(iter(load_hazards().values())).model_dump() | {"actoin": "x"}
    with pytest.raises(ValueError, match="actoin"):
        Hazard.model_validate(with_typo)


@pytest.mark.parametrize(
    ("hazard_id", "flags", "expected"),
    [
        ("router_in_bfloat16", {}, False),
        ("router_in_bfloat16", {"moe__implementation": "autoep"}, False),
        (
            "router_in_bfloat16",
            {"moe__implementation": "autoep", "train__precision": "bfloat16"},
            True,
        ),
        ("offload_drops_micro_batches", {"optim__offload": True, "parallel__zero": 2}, True),
        ("offload_drops_micro_batches", {"optim__offload": True, "parallel__zero": 3}, False),
        ("muon_sgd_at_zero0", {"optim__name": "deepspeed-muon", "parallel__zero": 0}, True),
        ("muon_sgd_at_zero0", {"optim__name": "muon", "parallel__zero": 0}, False),
        ("clipping_on_muon_update", {"optim__name": "deepspeed-muon"}, False),
    ],
)
def test_a_hazard_endangers_the_plans_it_names(
    hazard_id: str, flags: dict[str, Any], expected: bool
) -> None:
    assert load_hazards()[hazard_id].endangers(plan(**flags)) is expected


def test_auto_precision_is_bfloat16_on_gpus() -> None:
    facts = doctor.plan_facts(resolve_config(flags={}), Placement("cuda", 8, ""))
    assert facts["plan.precision"] == "bfloat16"
    assert plan()["plan.precision"] == "float32"
    assert load_hazards()["small_shared_memory"].endangers(facts)


def test_a_hazard_that_is_gone_retires_its_workaround() -> None:
    hazard = load_hazards()["expert_norm_averaged_zero0"]
    assert advice(hazard, "live") == f"worked around: {hazard.action}"
    assert "retired" in advice(hazard, "gone")


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("HF_TOKEN", "hf_abcdefghijklmnop", "(redacted)"),
        ("WANDB_API_KEY", "0123456789", "(redacted)"),
        ("EPCTL_NOTE", "use hf_abcdefghijklmnop here", "use (redacted) here"),
        (
            "HF_ENDPOINT",
            "https://user:pass@mirror.example/x",
            "https://(redacted)@mirror.example/x",
        ),
        ("NCCL_DEBUG", "INFO", "INFO"),
    ],
)
def test_secrets_are_redacted(name: str, value: str, shown: str) -> None:
    assert doctor_facts.redact(name, value) == shown


def test_versions_of_cuda_parts_whatever_cuda_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"nvidia-nccl-cu12": "2.27", "nvidia-cuda-nvrtc": "13.0", "nvidia-cublas": "13.1"}
    found = [
        SimpleNamespace(metadata={"Name": name}, version=version)
        for name, version in installed.items()
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    versions = doctor_facts.versions()
    assert versions["nccl"] == "2.27"
    assert versions["nvrtc"] == "13.0"
    assert "13.1" not in versions.values()


def test_environment_shows_what_steers_a_run_only() -> None:
    environment = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_abcdefghijk", "HOME": "/root"}
    assert doctor_facts.relevant_environment(environment) == {
        "HF_TOKEN": "(redacted)",
        "NCCL_DEBUG": "INFO",
    }


def test_only_old_locks_are_stale(tmp_path: Path) -> None:
    for name, age in (("fresh", 0), ("stale", 3600)):
        (tmp_path / name).mkdir()
        lock = tmp_path / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert doctor_facts.build_locks(environment) == [tmp_path / "stale" / "lock"]
    check = next(c for c in doctor_facts.checks(environment | OFFLINE) if c.name == "build locks")
    assert check.status == "warning"
    assert str(tmp_path / "stale" / "lock") in (check.hint or "")


OFFLINE = {"HF_HUB_OFFLINE": "1"}


def test_arch_list_suffix_and_little_space_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_facts, "SHARED_MEMORY_WANTED", 1 << 60)
    environment = {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a", "HF_HOME": str(tmp_path)} | OFFLINE
    found = {check.name: check for check in doctor_facts.checks(environment)}
    assert found["TORCH_CUDA_ARCH_LIST"].status == "warning"
    assert found["shared memory"].status == "warning"
    assert found["hub"].value == "not tried: HF_HUB_OFFLINE is set"


def test_hub_that_answers_and_hub_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        assert doctor_facts.hub_reachability({}).status == "ok"
    assert doctor_facts.hub_reachability({}).status == "warning"


def test_gpus_and_links_from_a_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = topo ]; then\n'
        '  printf "\\033[4m\\tGPU0\\tGPU1\\033[0m\\n"\n'
        '  printf "GPU0\\tX\\tNV18\\nGPU1\\tNV18\\tX\\n\\nLegend:\\n"\n'
        "else\n"
        '  echo "NVIDIA H100, 81559 MiB, 570.1, 9.0, 00000000:04:00.0"\n'
        "fi\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpu = doctor_facts.gpus()[0]
    assert (gpu["name"], gpu["compute_cap"]) == ("NVIDIA H100", "9.0")
    assert doctor_facts.links() == ["\tGPU0\tGPU1", "GPU0\tX\tNV18", "GPU1\tNV18\tX"]


def diagnosed(monkeypatch: pytest.MonkeyPatch, sink: Any, verdict: str, **flags: Any) -> Any:
    """Runs the doctor with every probe saying `verdict`."""
    output, stdout, stderr = sink
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretverysecret")

    def probe_all(ids: list[str], on_result: Any) -> list[ProbeResult]:
        results = [ProbeResult(hazard_id, verdict, "numbers", 0.1) for hazard_id in ids]
        for result in results:
            on_result(result)
        return results

    monkeypatch.setattr(doctor, "run_probes", probe_all)
    named = {key.replace("__", "."): value for key, value in flags.items()}
    resolved = resolve_config(flags={"parallel.device": "cpu", **named})
    doctor.run_doctor(resolved, output, only=None, probes=True)
    return stdout.getvalue(), stderr.getvalue()


def test_live_hazards_that_epctl_avoids_do_not_fail_the_plan(
    sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, progress = diagnosed(monkeypatch, sink, "live", parallel__zero=3)
    assert "live: default_clipping (#8068)" in text
    assert "verysecret" not in text + progress
    total = len(load_hazards())
    assert f"[{total}/{total}]" in progress


def test_exit_7_for_a_hazard_that_epctl_cannot_avoid(
    sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"optim__name": "deepspeed-muon", "parallel__zero": 0}
    with pytest.raises(GateError, match="`muon_sgd_at_zero0`") as caught:
        diagnosed(monkeypatch, sink, "live", **flags)
    assert caught.value.exit_code == 7
    diagnosed(monkeypatch, sink, "gone", **flags)


def test_a_failed_probe_is_said_aloud(sink: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, warnings = diagnosed(monkeypatch, sink, "failed", parallel__zero=3)
    assert "warning: probe default_clipping failed: numbers" in warnings


def test_json_has_id_verdict_action_upstream(sink: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from epctl.output import Mode

    sink[0].mode = Mode.JSON
    text, _ = diagnosed(monkeypatch, sink, "not probed here", parallel__zero=3)
    document = json.loads(text)
    row = document["hazards"][0]
    assert {"id", "verdict", "action", "upstream"} <= set(row)
    assert row["verdict"] == "not probed here: numbers"
    assert document["environment"]["HF_TOKEN"] == "(redacted)"
    assert {"versions", "machine", "gpus", "links", "checks"} <= set(document)


def test_unknown_hazard_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="unknown hazard `nope`") as caught:
        doctor.choose_hazards(["nope"])
    assert "stale_build_lock" in (caught.value.hint or "")


def test_probes_without_the_engine_say_what_they_need(
    sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NEEDED_BY_PROBES", ("no_such_library",))
    hazards = doctor.choose_hazards(["default_clipping"])
    found = doctor.diagnose(hazards, plan(), sink[0])
    assert found[0].document()["verdict"] == "not probed here: needs the `train` extra"


def test_ranks_of_different_software_refuse_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    from epctl.runtime import versions

    monkeypatch.setattr(versions, "differing_versions", list)
    versions.require_equal_versions()
    monkeypatch.setattr(
        versions, "differing_versions", lambda: ["torch is 2.13 on rank 0 and 2.14 on rank 8"]
    )
    with pytest.raises(ConfigError, match=r"torch is 2\.13 on rank 0 and 2\.14 on rank 8"):
        versions.require_equal_versions()
