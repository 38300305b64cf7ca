"""The bodies of `epctl bench`: one case, gated and measured by its module, shown and written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl import __version__
from epctl.bench.registry import CASES, Result
from epctl.bench.report import write_json, write_png
from epctl.launch.cost_rates import remember
from epctl.output import others_on_stderr, out

if TYPE_CHECKING:
    from rich.table import Table


def run_case(
    name: str, *, json_path: Path | None = None, png_path: Path | None = None, **settings: Any
) -> Result:
    """Measures the case `name` of `CASES`, shows the result and returns the JSON-ready document.

    Args:
        json_path: also write the document there.
        png_path: also draw the picture there.
        settings: what the case's `measure` takes.

    Raises what the case raises: ConfigError, ResourceError, and GateError, after which no number
    is shown.
    """
    case = CASES[name].load()
    result: Result = {"benchmark": name, "epctl": __version__}
    with others_on_stderr():  # a peer's log must not mix with the result
        result |= case.measure(**settings)
    assert all("gate" in row for row in result["rows"]), "a number without a gate"
    out.data(case.table(result))
    for absent, reason in result.get("absent", {}).items():
        out.note(f"{absent} did not take part: {reason}")
    out.document(result)
    remember(result)
    if json_path is not None:
        write_json(result, json_path)
    if png_path is not None:
        write_png(case, result, png_path)
    return result


def list_cases() -> None:
    """Shows every case of the registry."""
    out.data(_case_table())
    out.document({"cases": [{"name": name, "summary": CASES[name].summary} for name in CASES]})


def _case_table() -> Table:
    from rich.table import Table

    table = Table(title="epctl bench CASE", title_justify="left")
    for title in ("case", "measures"):
        table.add_column(title)
    for name, case in CASES.items():
        table.add_row(name, case.summary)
    return table
