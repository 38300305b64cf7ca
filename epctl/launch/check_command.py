"""`epctl train --check`: settings that make differences visible, the table, the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl.config import ResolvedConfig
from epctl.errors import ConfigError, GateError
from epctl.output import Output

if TYPE_CHECKING:
    from rich.table import Table

REPORT_NAME = "check.json"
# Full steps in float32: rounding of bfloat16 and a rate still warming up would hide a fault.
CHECK_SETTINGS: dict[str, Any] = {
    "train.precision": "float32",
    "optim.lr": 1e-3,
    "optim.adamw_lr": None,
    "optim.warmup_steps": 0,
    "optim.schedule": "constant",
    "optim.qk_clip": None,
    "run.track": "none",
}


def check_settings(resolved: ResolvedConfig, output: Output) -> ResolvedConfig:
    """Returns the config of a check: the asked-for layout, float32, full steps.

    Raises ConfigError for an optimizer that has no unsharded form to compare with.
    """
    if resolved.config.optim.name not in ("muon", "adamw"):
        raise ConfigError(
            f"`--check` compares muon and adamw; `{resolved.config.optim.name}` exists inside the "
            "engine only",
            hint="check the layout with `--optim muon`",
        )
    for key, value in CHECK_SETTINGS.items():
        if resolved.is_given(key):
            output.warning(f"`{key}` is ignored: `--check` uses {value}")
        resolved = resolved.replaced(key, value)
    return resolved.replaced("train.steps", resolved.config.check.steps)


def conclude(folder: Path, output: Output) -> None:
    """Shows the report; raises GateError if a row is beyond its tolerance."""
    document = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    output.data(report_table(document))
    failed = [row for row in document["rows"] if not row["ok"]]
    if failed:
        worst = failed[0]
        raise GateError(
            f"the layout {_layout(document)} does not train as the whole model does: "
            f"{len(failed)} of {len(document['rows'])} rows differ, first `{worst['quantity']}` "
            f"by {worst['difference']:.1e} (tolerance {worst['tolerance']:.0e})",
            hint=f"do not start the run; the report is `{folder / REPORT_NAME}`",
        )


def _layout(document: dict[str, Any]) -> str:
    sp = f", sp {document['sp']}" if document["sp"] > 1 else ""
    return f"ep {document['ep']}{sp}, ZeRO-{document['zero']}"


def report_table(document: dict[str, Any]) -> Table:
    """Returns the comparison as a table, rows beyond tolerance marked in words."""
    from rich import box
    from rich.table import Table

    layout = f"{document['num_ranks']} ranks, {_layout(document)}"
    table = Table(
        title=f"{document['model']}, {document['num_layers']} layers, {document['optimizer']}: "
        f"transformers on one rank against {layout}",
        box=box.SIMPLE,
        title_style="",
    )
    table.add_column("quantity")
    for column in ("one rank", "as asked", "difference", "tolerance", ""):
        table.add_column(column, justify="right")
    for row in document["rows"]:
        values = ["" if row[k] is None else f"{row[k]:.6g}" for k in ("reference", "asked")]
        verdict = "ok" if row["ok"] else "DIFFERS"
        difference, tolerance = f"{row['difference']:.1e}", f"{row['tolerance']:.0e}"
        table.add_row(row["quantity"], *values, difference, tolerance, verdict)
    return table
