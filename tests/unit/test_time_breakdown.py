"""Every instant of profiled steps goes to one part, on traces made by hand and on a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epctl.errors import ConfigError
from epctl.runtime import time_breakdown as tb
from epctl.runtime.profile import (
    PROFILED_STEPS,
    WARM_UP_STEPS,
    StepProfiler,
    annotate,
    require_steps_to_profile,
)


def span(name: str, start: float, end: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": end - start, "pid": 1}


def steps(start: float, end: float, cat: str = "gpu_user_annotation") -> dict[str, Any]:
    return span(tb.STEP_MARK, start, end, cat)


def parts(events: list[dict[str, Any]]) -> dict[str, float]:
    found = tb.breakdown(events)
    assert sum(found.parts.values()) == pytest.approx(found.window)
    return dict(found.parts)


def test_work_hides_the_communication_beside_it() -> None:
    found = parts(
        [
            steps(0, 100),
            span("gemm", 0, 40),
            span("ncclDevKernel_SendRecv", 30, 60),
            span("ncclDevKernel_AllGather_RING_LL", 50, 80),
            span("gemm", 90, 130),  # goes on after the steps
        ]
    )
    assert found == {
        "optimizer": 0,
        "compute": 50,
        "expert exchange": 20,
        "ZeRO and other collectives": 20,
        "idle": 10,
    }


def test_kernels_in_the_optimizer_are_its_own() -> None:
    events = [
        steps(0, 50),
        span(tb.OPTIMIZER_MARK, 20, 40, "gpu_user_annotation"),
        span("gemm", 10, 30),
        span("nccl_AllToAll", 32, 36),
    ]
    found = parts(events)
    assert (found["optimizer"], found["compute"], found["expert exchange"]) == (10, 10, 4)


def numbered(event: dict[str, Any], correlation: int) -> dict[str, Any]:
    return event | {"args": {"correlation": correlation}}


def test_kernels_belong_to_what_launched_them() -> None:
    """The device marks the innermost annotation alone, of which torch has one in ours."""
    events = [
        steps(0, 20, "user_annotation"),
        span(tb.OPTIMIZER_MARK, 5, 15, "user_annotation"),
        steps(30, 40),
        span(tb.OPTIMIZER_MARK, 50, 52, "gpu_user_annotation"),
        numbered(span("cudaLaunchKernel", 1, 2, "cuda_runtime"), 1),
        numbered(span("gemm", 30, 50), 1),
        numbered(span("cudaLaunchKernel", 6, 7, "cuda_runtime"), 2),
        numbered(span("norm", 50, 52), 2),
        numbered(span("cuLaunchKernelEx", 8, 9, "cuda_driver"), 3),
        numbered(span("symmetric_product", 54, 90), 3),
        numbered(span("cudaLaunchKernel", 25, 26, "cuda_runtime"), 4),
        numbered(span("of the step after", 95, 99), 4),
    ]
    assert parts(events) == {
        "optimizer": 38,
        "compute": 20,
        "expert exchange": 0,
        "ZeRO and other collectives": 0,
        "idle": 2,
    }


def test_a_cpu_operator_that_communicates_is_no_work() -> None:
    events = [
        steps(0, 30, "user_annotation"),
        span("aten::mm", 0, 10, "cpu_op"),
        span("c10d::alltoall_base_", 12, 20, "cpu_op"),
        span("aten::empty", 13, 14, "cpu_op"),  # inside the exchange
        span("c10d::allreduce_", 20, 25, "cpu_op"),
        span("gloo:all_reduce", 21, 26, "user_annotation"),  # goes on in gloo's own thread
        span("gloo:all_to_all", 0, 9, "user_annotation"),  # hidden by the product
    ]
    found = parts(events)
    assert found["compute"] == 10
    assert found["expert exchange"] == 8
    assert found["ZeRO and other collectives"] == 6
    assert found["idle"] == 6


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no `epctl\.steps`"):
        tb.breakdown([span("gemm", 0, 1)])


pairs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), max_size=8)


@given(pairs, pairs)
def test_intervals_are_sets_of_instants(first: list[Any], second: list[Any]) -> None:
    a, b = tb.union(map(tuple, first)), tb.union(map(tuple, second))
    instants = [{n for s, e in side for n in range(int(s), int(e))} for side in (a, b)]
    for found, expected in (
        (tb.intersect(a, b), instants[0] & instants[1]),
        (tb.subtract(a, b), instants[0] - instants[1]),
        (tb.union(a + b), instants[0] | instants[1]),
    ):
        assert {n for s, e in found for n in range(int(s), int(e))} == expected
        assert tb.length(found) == len(expected)


def test_a_real_trace_of_this_machine(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "profile", 0, torch.device("cpu"), first_step=4)
    a = torch.randn(200, 200)
    seen = []
    for step in range(4, 4 + WARM_UP_STEPS + PROFILED_STEPS + 2):
        profiler.before(step)
        for _ in range(30):
            a @ a
        with annotate("optimizer"):
            for _ in range(30):
                a @ a
        seen.append(profiler.after(step))
    found = [result for result in seen if result is not None]
    assert len(found) == 1
    assert seen.index(found[0]) == WARM_UP_STEPS + PROFILED_STEPS - 1
    work = found[0].parts["compute"], found[0].parts["optimizer"]
    assert min(work) > 0.15 * found[0].window
    assert sum(share for _, _, share in found[0].rows()) == pytest.approx(1)
    assert json.loads((tmp_path / "profile/breakdown.json").read_text())["steps"] == PROFILED_STEPS
    assert (tmp_path / "profile/trace.json").stat().st_size > 1000


def test_a_run_too_short_to_profile_is_refused() -> None:
    require_steps_to_profile(105, first_step=100)
    with pytest.raises(ConfigError, match=r"needs 5 steps.*this run has 4"):
        require_steps_to_profile(104, first_step=100)


def test_other_ranks_are_not_profiled(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "profile", 1, torch.device("cpu"), first_step=0)
    for step in range(8):
        profiler.before(step)
        assert profiler.after(step) is None
    assert not (tmp_path / "profile").exists()
