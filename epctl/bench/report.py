"""A benchmark's result as a table, one JSON document, and a PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    ("routing", "routing"),
    ("tokens", "tokens"),
    ("of", "implementation"),
    ("fwd ms", "forward_ms"),
    ("TFLOP/s", "forward_tflops"),
    ("fwd+bwd ms", "both_ms"),
    ("TFLOP/s", "both_tflops"),
    ("of peak", "of_floor"),
    ("saved MiB", "saved_mib"),
    ("peak MiB", "peak_mib"),
)


def moe_table(result: dict[str, Any]) -> Table:
    """Returns the rows for a terminal; times are medians ± half of the 10 % to 90 % range."""
    from rich.table import Table

    shape = ", ".join(f"{key} {value}" for key, value in result["shape"].items())
    table = Table(title=f"MoE block, {shape}; {result['machine']['device']}", title_justify="left")
    for title, _ in COLUMNS:
        table.add_column(title, justify="left" if title in ("routing", "of") else "right")
    for row in result["rows"]:
        table.add_row(*(_cell(row.get(key)) for _, key in COLUMNS))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        spread = (value["high"] - value["low"]) / 2 / value["median"]
        return f"{value['median']:.2f} ±{spread:.0%}"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(result: dict[str, Any], path: Path) -> None:
    """Writes `result` as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def write_moe_png(result: dict[str, Any], path: Path) -> None:
    """Draws TFLOP/s and peak memory over tokens, a line for each implementation and routing."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (rate, memory) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for (routing, name), rows in _lines(result["rows"]).items():
        tokens = [row["tokens"] for row in rows]
        label = f"{name}, {routing}"
        style = "-" if name == "epctl" else "--"
        rate.plot(tokens, [row["both_tflops"] for row in rows], style, marker="o", label=label)
        if all("peak_mib" in row for row in rows):
            memory.plot(tokens, [row["peak_mib"] for row in rows], style, marker="o", label=label)
    for axes, title in ((rate, "forward+backward, TFLOP/s"), (memory, "peak above weights, MiB")):
        axes.set(title=title, xlabel="tokens", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    rate.legend(fontsize=8)
    figure.suptitle(f"{result['shape_name']}, {result['machine']['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["routing"], row["implementation"]), []).append(row)
    return {key: sorted(line, key=lambda row: int(row["tokens"])) for key, line in lines.items()}
