"""`epctl bench compare A.json B.json`: the same benchmark twice, row by row, metric by metric."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl.errors import InputError
from epctl.output import out

if TYPE_CHECKING:
    from rich.table import Table

# What of a machine must be equal for a difference to be the code's.
MACHINE_KEYS = ("device", "driver", "torch", "triton", "num_cpus", "file_system")


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured value; `low` and `high` are its spread where the benchmark states one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Change:
    """One metric of one row in both results. `within_spread`: their ranges overlap."""

    row: str
    metric: str
    before: float
    after: float
    within_spread: bool

    @property
    def ratio(self) -> float | None:
        """`after` over `before`, None where `before` is 0."""
        return self.after / self.before if self.before else None


def run_compare(before: Path, after: Path) -> list[Change]:
    """Shows every metric that two result files share.

    Raises InputError for a file that is no result, or for results of different benchmarks.
    """
    documents = [read_result(path) for path in (before, after)]
    changes = compare_results(*documents)
    warnings = machine_differences(*documents) + setting_differences(*documents)
    for warning in warnings:
        out.warning(warning)
    out.data(_table(changes, before, after))
    out.document(
        {
            "benchmark": documents[0]["benchmark"],
            "differences": warnings,
            "changes": [
                {
                    "row": change.row,
                    "metric": change.metric,
                    "before": change.before,
                    "after": change.after,
                    "ratio": change.ratio,
                    "within_spread": change.within_spread,
                }
                for change in changes
            ],
        }
    )
    return changes


def read_result(path: Path) -> dict[str, Any]:
    """Returns a benchmark's JSON document. Raises InputError for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"`{path}` cannot be read as a benchmark's result: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise InputError(
            f"`{path}` is no benchmark's result: it has no `rows`",
            hint="write one with `epctl bench ... --json-file FILE`",
        )
    return document


def compare_results(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Returns the changes of all rows in both. Raises InputError when nothing can be compared."""
    names = [document.get("benchmark") for document in (before, after)]
    if names[0] != names[1]:
        raise InputError(f"results of different benchmarks: `{names[0]}` and `{names[1]}`")
    rows = [{row_name(row): row for row in document["rows"]} for document in (before, after)]
    changes = [
        Change(name, key, one.value, two.value, one.low <= two.high and two.low <= one.high)
        for name, row in rows[0].items()
        if name in rows[1]
        for key, one, two in _shared_metrics(row, rows[1][name])
    ]
    if not changes:
        raise InputError(
            f"the results have no row in common: {sorted(rows[0])} and {sorted(rows[1])}"
        )
    return changes


def row_name(row: Mapping[str, Any]) -> str:
    """Returns what identifies a row: its texts and whole numbers."""
    return ", ".join(str(value) for value in row.values() if isinstance(value, str | int))


def _shared_metrics(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[str, Metric, Metric]]:
    for key in one:
        before, after = metric_of(one[key]), metric_of(other.get(key))
        if before is not None and after is not None:
            yield key, before, after


def metric_of(value: Any) -> Metric | None:
    """Returns a metric from a float or from median, low and high; None for anything else."""
    if isinstance(value, float):
        return Metric(value, value, value)
    if isinstance(value, Mapping) and {"median", "low", "high"} <= value.keys():
        return Metric(float(value["median"]), float(value["low"]), float(value["high"]))
    return None


def machine_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the machines, so that it is not taken for a change of code."""
    one, other = (document.get("machine", {}) for document in (before, after))
    return [
        f"other {key}: {one.get(key)} and {other.get(key)}"
        for key in MACHINE_KEYS
        if one.get(key) != other.get(key)
    ]


def setting_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns what differs in what was measured: shape, size, rounds and the like."""
    return [
        f"other {key}: {before[key]} and {after[key]}"
        for key in before
        if key in after
        and key not in ("rows", "machine", "absent", "epctl")
        and not isinstance(before[key], float)
        and before[key] != after[key]
    ]


def _table(changes: list[Change], before: Path, after: Path) -> Table:
    from rich.table import Table

    table = Table(title=f"{before} -> {after}", title_justify="left")
    for title in ("row", "metric", "before", "after", "ratio", ""):
        table.add_column(title, justify="left" if title in ("row", "metric", "") else "right")
    for change in changes:
        table.add_row(
            change.row,
            change.metric,
            f"{change.before:.4g}",
            f"{change.after:.4g}",
            "-" if change.ratio is None else f"{change.ratio:.3f}",
            "within the spread" if change.within_spread else "",
        )
    return table
