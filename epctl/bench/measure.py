"""How every benchmark measures: warm-up, interleaved rounds, median and spread, peak memory.

Rounds are interleaved, one measurement of every run in turn, because clocks and disks drift: what
is measured first would otherwise look faster than what is measured last. Nothing here imports
torch; a GPU's clock and memory are in device.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Run = Callable[[], object]

# Runs once and returns the seconds that it took.
Clock = Callable[[Run], float]


class Spread(NamedTuple):
    """A median and the range of the middle four fifths, in the unit of the samples.

    Up to six samples have no such percentiles: the range is then the lowest and the highest.
    """

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Returns the median of `samples` (at least one) and their 10th and 90th percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    )


def wall_clock(run: Run) -> float:
    """Runs `run` and returns its wall-clock seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sample_interleaved(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    warm_up: int = 0,
    lead_in: bool = True,
    clock: Clock = wall_clock,
    before: Callable[[str], object] = lambda name: None,
    after: Callable[[str, int, float], object] = lambda name, number, seconds: None,
) -> dict[str, list[float]]:
    """Returns the seconds of each of `runs`, one sample a round.

    Args:
        warm_up: untimed calls of each before the first round.
        lead_in: call each once, untimed, right before each timed call, which brings caches and
            clocks to its work. Off for what leaves something behind, such as a file.
        before: called with the name before each round's calls, untimed.
        after: called with the name, the round from 0 and the seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(warm_up):
            run()
    for number in range(rounds):
        for name, run in runs.items():
            before(name)
            if lead_in:
                run()
            samples[name].append(clock(run))
            after(name, number, samples[name][-1])
    return samples


def reset_peak_resident() -> bool:
    """Sets the process's peak resident memory to what is resident now; False if impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5\n", encoding="ascii")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """Returns the peak resident memory since the last reset (since the start, without /proc)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
