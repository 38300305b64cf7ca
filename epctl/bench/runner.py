"""How a benchmark measures: warm-up, interleaved rounds, medians with spread, peak memory.

Rounds are interleaved, one measurement of every implementation in turn, because a GPU's clocks
drift: what is measured first would otherwise look faster than what is measured last.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

MEBIBYTE = 2**20


class Timing(NamedTuple):
    """Milliseconds: the median, and the range of the middle four fifths."""

    median: float
    low: float
    high: float


def timing(samples: list[float]) -> Timing:
    """Returns the median of `samples` and their 10th and 90th percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    )


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def time_interleaved(
    runs: dict[str, Callable[[], object]], device: torch.device, *, warm_up: int, rounds: int
) -> dict[str, Timing]:
    """Returns the time of each of `runs`; each round runs every one of them once."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(warm_up):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            # Twice, and the second counts: the first brings caches and clocks to this work.
            run()
            samples[name].append(_time_once(run, device))
    return {name: timing(values) for name, values in samples.items()}


def peak_memory(
    forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], object]
) -> tuple[float, float]:
    """Returns MiB held between forward and backward, and the peak of both, above what was there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = forward()
    saved = torch.cuda.memory_allocated() - before
    backward(result)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return saved / MEBIBYTE, peak / MEBIBYTE


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns FLOP/s of one large square product on `device`, the ceiling of this process."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = time_interleaved({"matmul": lambda: left @ right}, device, warm_up=3, rounds=15)
    return 2 * size**3 / (times["matmul"].median * 1e-3)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Returns what a reader needs to judge a figure: GPU, driver, versions, date."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["driver"] = _driver_version()
    try:
        import triton
    except ImportError:
        return facts
    return {**facts, "triton": triton.__version__}


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        completed = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return completed.stdout.splitlines()[0] if completed.stdout else "unknown"
