"""`--profile`: a trace of a few steps and a page that says where their time went."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from epctl.errors import ConfigError
from epctl.runtime.events import EventLog
from epctl.runtime.ranges import annotate, recorded, trace_name
from epctl.runtime.time_breakdown import TimeBreakdown, read_breakdown

WARM_UP_STEPS = 2
PROFILED_STEPS = 3

__all__ = ["StepProfiler", "annotate", "profiled", "require_steps_to_profile"]


@contextlib.contextmanager
def profiled(profiler: StepProfiler | None, step: int, events: EventLog) -> Iterator[None]:
    """Wraps a step; writes a `profile` event when the last profiled one is done."""
    if profiler is None:
        yield
        return
    profiler.before(step)
    yield
    result = profiler.after(step)
    if result is not None:
        rows = [{"part": p, "ms": round(ms, 3), "share": round(s, 4)} for p, ms, s in result.rows()]
        events.write("profile", steps=PROFILED_STEPS, rows=rows, folder=str(profiler.folder))


def require_steps_to_profile(num_steps: int, first_step: int) -> None:
    """Raises ConfigError if the run ends before the profiled steps do."""
    needed = WARM_UP_STEPS + PROFILED_STEPS
    if num_steps - first_step < needed:
        raise ConfigError(
            f"`--profile` needs {needed} steps ({WARM_UP_STEPS} to warm up, {PROFILED_STEPS} "
            f"traced); this run has {num_steps - first_step}",
            hint=f"--steps {first_step + needed}",
        )


class StepProfiler:
    """Profiles `PROFILED_STEPS` steps of rank 0, after `WARM_UP_STEPS` that are not typical.

    Leaves `trace.json` (for Perfetto or chrome://tracing) and `breakdown.json` in `folder`.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device, first_step: int) -> None:
        self.folder, self.rank, self.device = folder, rank, device
        self.first = first_step + WARM_UP_STEPS
        self.last = self.first + PROFILED_STEPS - 1
        self._stack = contextlib.ExitStack()
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Call before step `step` (from 0) of the run."""
        if step != self.first or self.rank != 0:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = self._stack.enter_context(torch.profiler.profile(activities=activities))
        self._stack.enter_context(recorded())
        self._stack.enter_context(torch.profiler.record_function(trace_name("steps")))

    def after(self, step: int) -> TimeBreakdown | None:
        """Call after step `step`; returns the breakdown when the last profiled one is done."""
        if step != self.last or self._profiler is None:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._stack.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json"
        self._profiler.export_chrome_trace(str(trace))
        self._profiler = None
        result = read_breakdown(trace)
        text = json.dumps({"steps": PROFILED_STEPS, **asdict(result)}, indent=2)
        (self.folder / "breakdown.json").write_text(text + "\n", encoding="utf-8")
        return result
