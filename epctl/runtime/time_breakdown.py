"""Where the time of profiled steps went, from the trace that torch's profiler writes. No torch.

Every instant of the window is given to one part, the first of `PARTS` that was busy: work hides the
communication beside it, so what is left to the exchange and to ZeRO is what the step waited for.
On a GPU trace the busy things are kernels, of the part that launched them; on a CPU trace operators
of the training thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epctl.runtime.ranges import trace_name

Interval = tuple[float, float]

# In the order in which an instant is given away.
PARTS = ("optimizer", "compute", "expert exchange", "ZeRO and other collectives", "idle")
STEP_MARK = trace_name("steps")  # the annotation around the profiled steps
OPTIMIZER_MARK = trace_name("optimizer")
KERNELS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
EXCHANGES = ("sendrecv", "alltoall", "all_to_all")
COLLECTIVES = ("nccl", "gloo:", "c10d::")


@dataclass(frozen=True)
class TimeBreakdown:
    """Microseconds of the window by part; they add up to the window."""

    window: float
    parts: Mapping[str, float]
    on_gpu: bool

    def rows(self) -> list[tuple[str, float, float]]:
        """Returns (part, milliseconds, share) in the order of `PARTS`."""
        whole = max(self.window, 1e-9)
        return [(part, self.parts[part] / 1e3, self.parts[part] / whole) for part in PARTS]


def read_breakdown(path: Path) -> TimeBreakdown:
    """Reads a Chrome trace (`torch.profiler`'s export_chrome_trace)."""
    return breakdown(json.loads(path.read_text("utf-8"))["traceEvents"])


def breakdown(events: Iterable[Mapping[str, Any]]) -> TimeBreakdown:
    """Returns the breakdown of the events inside the `epctl.steps` annotation.

    Raises ValueError if the trace has no such annotation.
    """
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    on_gpu = any(_is_busy(event) for event in spans)
    marks = [e for e in spans if e["name"] == STEP_MARK]
    if not marks:
        raise ValueError(f"the trace has no `{STEP_MARK}` annotation")
    window = _window(marks, spans, on_gpu=on_gpu)
    busy = _busy(spans, on_gpu=on_gpu)
    parts: dict[str, float] = {}
    taken: list[Interval] = []
    for part in PARTS[:-1]:
        fresh = subtract(clip(union(busy[part]), window), taken)
        parts[part] = length(fresh)
        taken = union([*taken, *fresh])
    total = window[1] - window[0]
    parts["idle"] = total - length(taken)
    return TimeBreakdown(total, parts, on_gpu)


def _window(
    marks: list[Mapping[str, Any]], spans: list[Mapping[str, Any]], *, on_gpu: bool
) -> Interval:
    """The annotation as the device saw it: kernels run after the host has gone on."""
    if not on_gpu:
        return _interval(marks[0])
    launched = _by_launch(spans, STEP_MARK)
    of_steps = [_interval(s) for s in spans if launched.get(_correlation(s)) and _is_busy(s)]
    if of_steps:
        return min(start for start, _ in of_steps), max(end for _, end in of_steps)
    on_device = [_interval(m) for m in marks if m.get("cat") == "gpu_user_annotation"]
    if on_device:
        return min(start for start, _ in on_device), max(end for _, end in on_device)
    ends = [_interval(s)[1] for s in spans if _is_busy(s)]
    start, end = _interval(marks[0])
    return start, max(end, *ends)


def _is_busy(span: Mapping[str, Any]) -> bool:
    return span.get("cat") in KERNELS


def _busy(spans: list[Mapping[str, Any]], *, on_gpu: bool) -> dict[str, list[Interval]]:
    is_launched_there = _by_launch(spans, OPTIMIZER_MARK) if on_gpu else {}
    annotation = "gpu_user_annotation" if on_gpu else "user_annotation"
    optimizer = _marked(spans, OPTIMIZER_MARK, annotation)
    busy: dict[str, list[Interval]] = {part: [] for part in PARTS[:-1]}
    for span in spans:
        if not _counts(span, on_gpu=on_gpu):
            continue
        part, interval = _part_of(str(span["name"])), _interval(span)
        there = is_launched_there.get(_correlation(span))
        if part != "compute":
            busy[part].append(interval)
        elif there is not None:
            busy["optimizer" if there else "compute"].append(interval)
        else:
            inside = intersect([interval], optimizer)
            busy["optimizer"] += inside
            busy["compute"] += subtract([interval], inside)
    if not on_gpu:  # a CPU operator that starts a collective holds others: no work of its own
        starts = union(_interval(s) for s in spans if str(s["name"]).startswith("c10d::"))
        for part in ("optimizer", "compute"):
            busy[part] = subtract(union(busy[part]), starts)
    return busy


def _marked(spans: list[Mapping[str, Any]], mark: str, category: str) -> list[Interval]:
    return union(_interval(s) for s in spans if s["name"] == mark and s.get("cat") == category)


def _by_launch(spans: list[Mapping[str, Any]], mark: str) -> dict[int | None, bool]:
    """Says of each launch, by its correlation, whether the host made it inside an annotation.

    What the profiler marks on the device itself is the innermost annotation's alone, and torch puts
    one of its own around an optimizer's step: of 150 ms of ours it showed 3.
    """
    inside = _marked(spans, mark, "user_annotation")
    found: dict[int | None, bool] = {}
    for span in spans:
        number = _correlation(span)
        if span.get("cat") in LAUNCHES and number is not None:
            start, _ = _interval(span)
            found[number] = any(begin <= start < end for begin, end in inside)
    return found


def _correlation(span: Mapping[str, Any]) -> int | None:
    """Returns the number that a kernel and its launch share."""
    number = (span.get("args") or {}).get("correlation")
    return number if isinstance(number, int) and number else None


def _counts(span: Mapping[str, Any], *, on_gpu: bool) -> bool:
    """True for a span that keeps something busy; gloo's threads mark their part of the work."""
    if on_gpu:
        return _is_busy(span)
    return span.get("cat") == "cpu_op" or str(span["name"]).startswith("gloo:")


def _part_of(name: str) -> str:
    lowered = name.lower()
    if not any(sign in lowered for sign in COLLECTIVES):
        return "compute"
    if any(sign in lowered for sign in EXCHANGES):
        return "expert exchange"
    return "ZeRO and other collectives"


def _interval(span: Mapping[str, Any]) -> Interval:
    start = float(span["ts"])
    return start, start + float(span["dur"])


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the same instants as sorted, disjoint intervals."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersect(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Returns the instants in both; each side sorted and disjoint."""
    found: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start = max(first[i][0], second[j][0])
        end = min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def subtract(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Returns the instants of `first` that are not in `second`; both sorted and disjoint."""
    left: list[Interval] = []
    j = 0
    for start, end in first:
        while j < len(second) and second[j][1] <= start:
            j += 1
        k = j
        while k < len(second) and second[k][0] < end:
            if second[k][0] > start:
                left.append((start, second[k][0]))
            start = max(start, second[k][1])
            k += 1
        if start < end:
            left.append((start, end))
    return left


def clip(intervals: list[Interval], window: Interval) -> list[Interval]:
    return intersect(intervals, [window])


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
