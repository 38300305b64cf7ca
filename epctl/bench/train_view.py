"""How `epctl bench train` is shown: the rows, where a step's time goes, the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epctl.bench.registry import Result
from epctl.bench.report import cell
from epctl.bench.train_cases import OWN

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group
    from rich.table import Table

COLUMNS = (
    ("ranks", "ranks"),
    ("EP", "ep"),
    ("ZeRO", "zero"),
    ("optim", "optim"),
    ("routing", "routing"),
    ("of", "implementation"),
    ("tokens/s\na rank", "tokens_per_second"),
    ("TFLOP/s", "tflops"),
    ("MFU", "mfu"),
    ("optim.\nms", "optimizer_seconds"),
    ("peak\nGiB", "peak_gib"),
    ("fore-\nseen", "memory_error"),
    ("x AutoEP\nspeed mem", "speed_over_deepspeed"),
    ("x transf.\nspeed mem", "speed_over_transformers"),
    ("x fewest\nranks", "scaling"),
)
LEFT = ("optim", "routing", "implementation")
FORMS = {"mfu": "{:.1%}", "tflops": "{:.3g}", "memory_error": "{:+.0%}", "scaling": "{:.2f}"}
# In the title where they are the same in all rows.
CONSTANT = {"ranks": "ranks", "ep": "EP"}
PARTS = {
    "optimizer": "tab:green",
    "compute": "tab:blue",
    "expert exchange": "tab:orange",
    "ZeRO and other collectives": "tab:red",
    "idle": "lightgray",
}


def table(result: Result) -> Group:
    """Returns the rows, what failed, and where the time of a step goes."""
    from rich.console import Group

    parts: list[Any] = [_rows(result)]
    parts += [_failure(row) for row in result["rows"] if "failed" in row]
    if any("breakdown_ms" in row for row in result["rows"]):
        parts.append(_breakdown(result))
    parts.append(_legend(result))
    return Group(*parts)


def _rows(result: Result) -> Table:
    from rich import box
    from rich.table import Table

    shown = Table(title=_title(result), title_justify="left", box=box.SIMPLE_HEAD,
                  padding=(0, 0, 0, 1))  # fmt: skip
    measured = [row for row in result["rows"] if "failed" not in row]
    columns = [
        (title, key)
        for title, key in COLUMNS
        if any(key in row for row in measured) and key not in _constants(measured)
    ]
    for title, key in columns:
        shown.add_column(title, justify="left" if key in LEFT else "right", no_wrap=True)
    last: Any = None
    for row in measured:
        case = (row["ranks"], row["zero"], row["optim"])
        if last not in (None, case):
            shown.add_section()
        last = case
        shown.add_row(*(_cell(key, row) for _, key in columns))
    return shown


def _constants(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Returns what all rows share, as the title says it."""
    return {
        key: f"{name} {rows[0][key]}"
        for key, name in CONSTANT.items()
        if len({row[key] for row in rows}) == 1
    }


def _title(result: Result) -> str:
    machine = result["machine"]
    shared = _constants([row for row in result["rows"] if "failed" not in row])
    return (
        f"{result['model']}, {result['layers']} layers, {result['micro_batch']} x "
        f"{result['sequence_length']} tokens a rank, recompute {result['recompute']}, "
        f"{result['precision']};\n"
        + ", ".join((*shared.values(), machine["device"], machine["date"]))
    )


def _cell(key: str, row: dict[str, Any]) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key.startswith("speed_over_"):
        return f"{value:.2f} {row[key.replace('speed', 'memory', 1)]:.2f}"
    if key == "tokens_per_second":
        half_range = (value["high"] - value["low"]) / 2 / value["median"]
        return f"{value['median']:,.0f} ±{half_range:.0%}"
    if key == "optimizer_seconds":
        return f"{1e3 * value['median']:,.0f}"
    form = FORMS.get(key)
    return form.format(value) if form else cell(value)


def _failure(row: dict[str, Any]) -> str:
    case = f"{row['ranks']} ranks, EP {row['ep']}, ZeRO-{row['zero']}, {row['optim']}"
    return f" {case}: {row['implementation']} failed: {'; '.join(row['failed'])}"


def _breakdown(result: Result) -> Table:
    from rich import box
    from rich.table import Table

    rows = [row for row in result["rows"] if "breakdown_ms" in row]
    title = (
        f"where a step goes on rank 0, {rows[0]['routing']} routing, ms "
        "(what waits counts, what is hidden not)"
    )
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    shared = _constants(rows)
    shown.add_column("case")
    shown.add_column("of")
    for part in rows[0]["breakdown_ms"]:
        shown.add_column(part.replace(" and other collectives", ""), justify="right")
    for row in rows:
        ranks = "" if "ranks" in shared else f"{row['ranks']} ranks, "
        case = f"{ranks}ZeRO-{row['zero']}, {row['optim']}"
        values = row["breakdown_ms"].values()
        whole = sum(values) or 1.0
        shown.add_row(case, row["implementation"], *(f"{v:,.1f} {v / whole:4.0%}" for v in values))
    return shown


def _legend(result: Result) -> str:
    peak = f"{result['matmul_tflops']:,.2f} TFLOP/s of a matmul in the same process"
    vendor = result["vendor_tflops"]
    if vendor is not None:
        peak += f" ({vendor:,.0f} by the data sheet)"
    return _gates(result) + (
        f" MFU: {result['flops_formula']}; over {peak}.\n"
        f" Peak: {result['memory']}; foreseen: epctl's prediction over it. Engines ran one after "
        f"another, {result['rounds']} rounds in turn; speed over another: {result['speed_of']}."
    )


def _gates(result: Result) -> str:
    """Returns how close epctl's steps in bfloat16 came to the whole model's; nothing without."""
    runs: list[dict[str, Any]] = list(result.get("bfloat16_losses", {}).values())
    gates = [row["gate"] for row in result["rows"] if "bfloat16_loss" in row["gate"]]
    if not runs or not gates:
        return ""
    loss, direction = (
        max(gate[name] for gate in gates) for name in ("bfloat16_loss", "bfloat16_direction")
    )
    return (
        f" Gates, beside the whole model: {len(runs[0]['whole'])} steps in bfloat16, largest "
        f"difference of a loss {loss:.1e}, of the gradient's cosine from one {direction:.1e}.\n"
    )


def draw(result: Result, figure: Figure) -> None:
    """Draws tokens/s, peak memory and, where measured, a step's parts, a group a case."""
    rows = [row for row in result["rows"] if "failed" not in row]
    measured = any("breakdown_ms" in row for row in rows)
    figure.set_size_inches(15 if measured else 11, 1.6 + 0.28 * len(rows))
    panels = figure.subplots(1, 3 if measured else 2, sharey=True)
    speed, memory = panels[:2]
    labels = [_label(row) for row in rows]
    colors = ["tab:blue" if row["implementation"] == OWN else "tab:gray" for row in rows]
    speed.barh(labels, [row["tokens_per_second"]["median"] for row in rows], color=colors)
    memory.barh(labels, [row["peak_gib"] for row in rows], color=colors)
    for place, row in enumerate(rows):
        if "predicted_gib" in row:
            memory.plot([row["predicted_gib"]], [place], "|", color="tab:red", ms=12, mew=2)
    if measured:
        _draw_parts(panels[2], rows, labels)
    speed.set_title("tokens/s a rank")
    memory.set_title("peak GiB a rank (red: predicted)")
    speed.invert_yaxis()
    for axes in panels:
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(_title(result), fontsize=10)


def _label(row: dict[str, Any]) -> str:
    return (
        f"{row['implementation']}, {row['ranks']} ranks, ZeRO-{row['zero']}, {row['optim']}, "
        f"{row['routing']}"
    )


def _draw_parts(axes: Any, rows: list[dict[str, Any]], labels: list[str]) -> None:
    starts = [0.0] * len(rows)
    for part, color in PARTS.items():
        lengths = [row.get("breakdown_ms", {}).get(part, 0.0) for row in rows]
        axes.barh(labels, lengths, left=starts, color=color, label=part)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    axes.set_title("ms of a step")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside, not over bars
