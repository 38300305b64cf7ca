"""`epctl bench multimodal-sp` as a case: ways of sharing a vision-language sample over ranks.

Forward and backward of a tiny (CPU) or real-width (GPU) model, six samples, five ways to share the
vision tower; the decoder is shared alike in all. Gradients are not averaged over ranks here: the
engine does that in training, the same in every mode. The sixth sample is too long for one GPU,
which is then shown as out of memory, and shared in one way only.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from epctl.bench.machine import machine_facts
from epctl.bench.registry import Result
from epctl.bench.report import cell
from epctl.errors import ConfigError, ResourceError
from epctl.launch.devices import count_gpus
from epctl.output import out

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

LONG = "long text, 2 images"
LONG_BYTES = 120 * 2**30  # of each of two GPUs: by the other samples' peaks it takes some 105 GiB
NAMES = ("video, 64 frames", "one large image", "16 mixed images", "64 tiles", "8 images", LONG)
MODES = ("replicate", "gcs", "ulysses", "units", "aligned")
CPU_RANKS = 2
MODULE = "epctl.bench.multimodal_sp_ranks"

COLUMNS = (
    ("sample", "workload"),
    ("mode", "mode"),
    ("fwd+bwd\nms", "ms"),
    ("speed-\nup", "speedup"),
    ("tok/s\na rank", "tokens_per_second"),
    ("tower\nMiB", "encoder_mib"),
    ("total\nMiB", "total_mib"),
    ("sent\nMiB", "moved_mib"),
    ("tower\nwork", "vision_cost"),
    ("worst\nerror", "gradient_error"),
)


def measure(
    *,
    workloads: Sequence[str] = (),
    ranks: Sequence[int] = (),
    device: str | None = None,
    rounds: int = 3,
) -> Result:
    """Measures every sample in every mode, at each number of ranks, beside one rank alone.

    Args:
        workloads: names of `NAMES`; none is all, less the long text where GPUs are too small.
        ranks: numbers of ranks; none is 2 on CPU, and 2, 4 and 8 as far as there are GPUs.
        device: `cuda` or `cpu`; None takes GPUs when there are two or more.
        rounds: timed rounds; each measures every mode once.

    Raises:
        ConfigError: an unknown workload, or a number below one.
        ResourceError: more ranks than GPUs.
        GateError: a loss or gradient that is not the unsharded one; nothing is shown then.
        LaunchError: a rank failed.
    """
    # Only here: a benchmark that cannot start should say so without torch.
    from epctl.bench.rank_launch import follow_ranks

    unknown = [name for name in workloads if name not in NAMES]
    if unknown:
        raise ConfigError(f"workload {unknown[0]!r} is unknown; known: {', '.join(NAMES)}")
    if rounds < 1 or any(size < 2 for size in ranks):
        raise ConfigError("bench multimodal-sp needs at least one round, and two ranks to share")
    chosen, sizes = _place(device, ranks)
    settings = {
        "device": chosen,
        "sizes": sizes,
        "rounds": rounds,
        "workloads": _chosen(workloads, chosen),
    }
    result: Result = {
        "machine": machine_facts(_gpu() if chosen == "cuda" else None),
        "device": chosen,
        "rounds": rounds,
        "memory": "peak allocated" if chosen == "cuda" else "kept for backward",
        "speedup_of": "time" if chosen == "cuda" else "processor time of the slowest rank",
        "rows": [],
        "absent": {},
        "scaling": [],
    }
    with tempfile.TemporaryDirectory(prefix="epctl-bench-") as name:
        for event in follow_ranks(Path(name), chosen, max(sizes), settings, MODULE):
            if "note" in event:
                out.note(event["note"])
            elif "absent" in event:
                result["absent"][event["absent"]] = event["reason"]
            elif "scaling" in event:
                result["scaling"].append(event["scaling"])
            else:
                row = event["row"]
                result["rows"].append(row | {"gradient_error": row["gate"]["gradient"]})
    return result


def _place(device: str | None, ranks: Sequence[int]) -> tuple[Literal["cpu", "cuda"], list[int]]:
    """Decides where to measure and over how many ranks."""
    if device not in (None, "cuda", "cpu"):
        raise ConfigError(f"device {device!r} is unknown; known: cuda, cpu")
    num_gpus, reason = count_gpus()
    if device == "cpu" or (device is None and num_gpus < 2):
        if device is None:
            out.note(f"{num_gpus} GPUs ({reason}): {CPU_RANKS} gloo ranks on the CPU, small sizes")
        return "cpu", sorted(set(ranks)) or [CPU_RANKS]
    sizes = sorted(set(ranks)) or [size for size in (2, 4, 8) if size <= num_gpus]
    if not sizes or max(sizes) > num_gpus:
        raise ResourceError(
            f"{max(sizes, default=2)} ranks need as many GPUs, this machine offers {num_gpus} "
            f"({reason})",
            hint="use `--device cpu` for the small sizes",
        )
    return "cuda", sizes


def _chosen(workloads: Sequence[str], device: str) -> list[str]:
    """Returns what to measure: a rank of a group that runs out of memory would end the run."""
    if not workloads and device == "cuda" and _gpu_bytes() < LONG_BYTES:
        out.note(f"{LONG} is left out: two GPUs of less than {LONG_BYTES >> 30} GiB do not hold it")
        return [name for name in NAMES if name != LONG]
    return list(workloads or NAMES)


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name(0))


def _gpu_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def table(result: Result) -> Table:
    """Returns the rows for a terminal, and below them what more ranks would do."""
    from rich.table import Table

    both = Table.grid(pad_edge=False)
    both.add_row(_measured(result))
    if result["scaling"]:
        both.add_row(_scaling(result))
    return both


def _scaling(result: Result) -> Table:
    """Returns N = 1 and what was measured, and 4 to 64 simulated from it."""
    from rich import box
    from rich.table import Table

    title = "aligned: * is a simulation from this run's own rates (docs/sequence-parallel.md);\n"
    title += "bytes: the tower's and its features', of those with an exchange in every layer"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("sample", "ranks", "fwd+bwd\nms", "speed-\nup", "tok/s\na rank", "sent\nMiB"):
        shown.add_column(name, justify="left" if name == "sample" else "right", no_wrap=True)
    shown.add_column("tower\nwork", justify="right")
    shown.add_column("bytes", justify="right")
    for one in result["scaling"]:
        shown.add_section()
        for place, point in enumerate(one["points"]):
            ratio = _bytes_of_ulysses(result["rows"], one["workload"], point["ranks"])
            shown.add_row(
                one["workload"] if place == 0 else "",
                f"{point['ranks']}{'*' if point['source'] == 'simulated' else ' '}",
                f"{point['ms']:,.0f}",
                f"{point['speedup']:.2f}x",
                cell(point["tokens_per_second"]),
                cell(point["sent_mib"]),
                f"{point['tower_work']:.2f}x",
                "-" if ratio is None else f"1/{1 / ratio:.1f}" if ratio else "none",
            )
    return shown


def _bytes_of_ulysses(rows: list[dict[str, Any]], workload: str, ranks: int) -> float | None:
    """Returns what `aligned` sends for the tower over what `ulysses` does, where both were run."""
    sent = {
        row["mode"]: row["tower_moved_mib"]
        for row in rows
        if (row["workload"], row["ranks"]) == (workload, ranks)
    }
    return sent["aligned"] / sent["ulysses"] if sent.get("ulysses") else None


def _measured(result: Result) -> Table:
    """Returns the rows; a rule between samples."""
    from rich import box
    from rich.table import Table

    title = f"Sharing a sample, {result['machine']['device']}; MiB: {result['memory']};\n"
    title += f"speed-up over one rank: {result['speedup_of']}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name, key in COLUMNS:
        left = key in ("workload", "mode")
        shown.add_column(name, justify="left" if left else "right", no_wrap=True)
    for name, group in groupby(result["rows"], key=itemgetter("workload")):
        rows = list(group)
        counts = (f"{rows[0][key]:,} {key}" for key in ("patches", "tokens"))
        shown.add_section()
        # A sample takes the first cells of its rows, and where it has few, of rows without more.
        for fact, row in zip_longest((name, rows[0]["model"], *counts), rows):
            shown.add_row(fact or "", *(_cell(key, row) for _, key in COLUMNS[1:] if row))
    return shown


def _cell(key: str, row: dict[str, Any]) -> str:
    if key == "ms" and row.get("out_of_memory"):
        return "out of memory"
    if row.get(key) is None:
        return "-"
    if key == "ms":
        half_range = (row["ms"]["high"] - row["ms"]["low"]) / 2 / row["ms"]["median"]
        return f"{row['ms']['median']:,.0f} ±{half_range:.0%}"
    if key == "mode":
        return f"{row[key]} x{row['ranks']}"
    if key == "gradient_error":
        return "-" if row["ranks"] == 1 else f"{row[key]:.0e}"
    if key in ("speedup", "vision_cost"):
        return f"{row[key]:.2f}x"
    return cell(row[key])


def draw(result: Result, figure: Figure) -> None:
    """Draws speed-up over one rank and tower memory, a group of bars for each sample."""
    most = max(row["ranks"] for row in result["rows"])
    names = [name for name in NAMES if any(row["workload"] == name for row in result["rows"])]
    figure.set_size_inches(12, 4.2)
    panels = figure.subplots(1, 3)
    titles = {
        "speedup": f"{most} ranks over one: {result['speedup_of']}",
        "encoder_mib": f"tower memory a rank, MiB {result['memory']}",
        "moved_mib": "MiB a rank sends in forward and backward",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for place, mode in enumerate(MODES):
            values = [_value(result["rows"], name, mode, most, key) for name in names]
            where = [n + 0.16 * (place - 2) for n in range(len(names))]
            axes.bar(where, values, 0.16, label=mode)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(names)), [textwrap.fill(n, 10) for n in names], fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    panels[0].axhline(most, color="black", lw=0.8, ls=":")
    panels[0].axhline(1, color="black", lw=0.8)
    panels[2].legend(fontsize=8)
    figure.suptitle(
        f"{result['machine']['device']}, {result['machine']['date']}; every gradient checked",
        fontsize=10,
    )


def _value(rows: list[dict[str, Any]], name: str, mode: str, ranks: int, key: str) -> float:
    found = [r for r in rows if (r["workload"], r["mode"], r["ranks"]) == (name, mode, ranks)]
    # None: there is no speed-up where one rank alone ran out of memory.
    return float(found[0][key] or 0.0) if found else 0.0
