"""Pure parts of launching: placement, command, environment, run folder, schedule, chart."""

from __future__ import annotations

from pathlib import Path

import pytest

from epctl.config import OptimSection, resolve_config
from epctl.errors import ConfigError, ResourceError
from epctl.launch.chart import braille_chart
from epctl.launch.command import launch_command, rank_environment
from epctl.launch.devices import Placement, count_gpus, place_ranks
from epctl.launch.ds_config import deepspeed_config
from epctl.launch.run_folder import choose_run_folder
from epctl.launch.supervise import EventTail
from epctl.runtime.mesh import Mesh, validate_expert_parallel
from epctl.runtime.schedule import rate_factor

NO_GPU = (0, "no nvidia-smi on this machine")
EIGHT = (8, "nvidia-smi lists 8")


@pytest.mark.parametrize(
    ("device", "num_ranks", "ep", "gpus", "expected"),
    [
        ("auto", None, 4, NO_GPU, ("cpu", 4)),
        ("auto", 2, 1, NO_GPU, ("cpu", 2)),
        ("auto", None, 4, EIGHT, ("cuda", 8)),
        ("auto", 4, 4, EIGHT, ("cuda", 4)),
        ("cpu", None, 2, EIGHT, ("cpu", 2)),
        ("cuda", None, 8, EIGHT, ("cuda", 8)),
    ],
)
def test_place_ranks(device, num_ranks, ep, gpus, expected) -> None:  # type: ignore[no-untyped-def]
    placement = place_ranks(device=device, num_ranks=num_ranks, ep=ep, gpus=gpus)
    assert (placement.device, placement.num_ranks) == expected


def test_placement_refusals_carry_the_numbers() -> None:
    with pytest.raises(ResourceError, match="`--ep 16` needs 16 GPUs, this machine offers 8"):
        place_ranks(device="auto", num_ranks=None, ep=16, gpus=EIGHT)
    with pytest.raises(ConfigError, match="no GPU"):
        place_ranks(device="cuda", num_ranks=None, ep=1, gpus=NO_GPU)


def test_visible_devices_limit_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_gpus() == (0, "CUDA_VISIBLE_DEVICES= names none")


@pytest.mark.parametrize(
    ("visible", "expected"), [("0,2", 2), ("0,-1,1", 1), ("-1,0", 0), ("0,1,2,3,4", 3)]
)
def test_visible_devices_end_at_the_first_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, expected: int
) -> None:
    write_nvidia_smi(tmp_path, "printf 'GPU 0: a\\nGPU 1: b\\nGPU 2: c\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus()[0] == expected


def test_a_broken_driver_is_the_reason_for_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "echo 'Driver/library version mismatch'; exit 18")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert count_gpus() == (0, "nvidia-smi failed: Driver/library version mismatch")


def write_nvidia_smi(folder: Path, body: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("num_ranks", "ep", "num_gpus", "hint"),
    [
        (None, 16, 8, "use `--ep 8`, or"),
        (None, 8, 6, "use `--ep 4 --num-ranks 4`, or"),
        (8, 2, 4, "use `--ep 2 --num-ranks 4`, or"),
    ],
)
def test_the_hint_for_too_few_gpus_works_as_typed(
    num_ranks: int | None, ep: int, num_gpus: int, hint: str
) -> None:
    gpus = (num_gpus, "nvidia-smi lists them")
    with pytest.raises(ResourceError) as caught:
        place_ranks(device="auto", num_ranks=num_ranks, ep=ep, gpus=gpus)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


def test_cpu_ranks_see_no_gpu_and_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    placement = Placement("cpu", 4, "")
    environment = rank_environment(placement, {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"})
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert rank_environment(placement, {"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "1"
    assert "DS_ACCELERATOR" not in rank_environment(Placement("cuda", 4, ""), {})


def test_launch_command_is_torchrun_behind_the_agent() -> None:
    command = launch_command(Path("/runs/a b"), Placement("cpu", 4, ""))
    assert command[1:4] == ["-m", "epctl.launch.agent", "/runs/a b"]
    assert command[-4:] == ["--module", "epctl.runtime.worker", "/runs/a b", "train"]
    assert "--nproc-per-node=4" in command


def test_run_folders_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = set()
    for _ in range(3):
        folder = choose_run_folder(None)
        folder.mkdir(parents=True)
        seen.add(folder)
    assert len(seen) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        choose_run_folder(str(tmp_path / "file"))


def test_a_run_folder_that_the_system_refuses_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot create run folder .*: File name too long"):
        choose_run_folder("a" * 300)


def test_event_tail_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = EventTail(path)
    assert list(tail) == []
    path.write_bytes(b'{"event": "a"}\n{"event"')
    assert list(tail) == [{"event": "a"}]
    path.write_bytes(b'{"event": "a"}\n{"event": "b"}\n')
    assert list(tail) == [{"event": "b"}]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1 / 3, 2 / 3, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.868198, 0.55, 0.231802]),
        ("wsd", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 0.55]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    optim = OptimSection(schedule=schedule, warmup_steps=2, decay_ratio=0.5)  # type: ignore[arg-type]
    assert [rate_factor(s, 6, optim) for s in range(6)] == pytest.approx(expected, abs=1e-6)


def test_schedule_never_leaves_its_bounds() -> None:
    for schedule in ("constant", "linear", "cosine", "wsd"):
        optim = OptimSection(schedule=schedule, warmup_steps=3)  # type: ignore[arg-type]
        factors = [rate_factor(step, 10, optim) for step in range(20)]
        assert all(0 < factor <= 1 for factor in factors)


def test_mesh_gives_contiguous_blocks_of_experts() -> None:
    blocks = [Mesh(rank, 8, 4, rank % 4).local_experts(64) for rank in range(8)]
    assert [(b.start, b.stop) for b in blocks[:4]] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert blocks[:4] == blocks[4:]
    assert [Mesh(rank, 8, 4, rank % 4).edp_rank for rank in range(8)] == [0] * 4 + [1] * 4
    with pytest.raises(ConfigError, match="4 does not divide the 10 routed experts") as caught:
        validate_expert_parallel(4, 8, 10)
    assert caught.value.hint == "legal sizes for this model: 1, 2, 5, 10"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_deepspeed_config_states_clipping_at_every_stage(zero: int) -> None:
    """An absent key means 1.0 in DeepSpeed; at ZeRO-0 epctl clips by itself."""
    config = resolve_config(flags={"parallel.zero": zero}).config
    document = deepspeed_config(config, bfloat16=True, on_cpu=False)
    assert document["gradient_clipping"] == (0.0 if zero == 0 else 1.0)
    assert document["zero_optimization"]["reduce_scatter"] is True
    assert "expert_parallel" not in document


def test_chart_of_a_run_that_diverged_leaves_out_what_is_not_finite() -> None:
    steps, losses = [1, 2, 3, 4], [5.0, 4.0, float("nan"), float("inf")]
    assert braille_chart(steps, losses) == braille_chart([1, 2], [5.0, 4.0])
    assert braille_chart([1, 2], [1.0, float("nan")]) == ""


def test_braille_chart_falls_from_left_to_right() -> None:
    chart = braille_chart([1, 2, 3], [3.0, 2.0, 1.0], width=10, height=4)
    lines = chart.splitlines()
    assert lines[0].startswith("   3.000 |")
    assert lines[3].startswith("   1.000 |")
    assert lines[0][10] != "\N{BRAILLE PATTERN BLANK}"
    assert lines[3][-1] != "\N{BRAILLE PATTERN BLANK}"
    assert lines[0][-1] == "\N{BRAILLE PATTERN BLANK}"
    assert braille_chart([1], [2.0]) == ""
