"""A benchmark's result as one JSON document and a PNG, and a metric as a table's cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epctl.bench.registry import CaseModule, Result


def cell(value: Any) -> str:
    """Returns a table's cell: `-` for nothing, a spread as its median ± half of its range."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        half_range = (value["high"] - value["low"]) / 2 / value["median"]
        return f"{value['median']:.2f} ±{half_range:.0%}"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(result: Result, path: Path) -> None:
    """Writes `result` as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def write_png(case: CaseModule, result: Result, path: Path) -> None:
    """Lets the case draw `result`, and writes the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(layout="constrained")
    case.draw(result, figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
