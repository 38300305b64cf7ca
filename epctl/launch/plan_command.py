"""The body of `epctl plan`: resolve, plan, show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epctl.config import RunConfig, resolve_config
from epctl.errors import ConfigError, LayoutError, ResourceError
from epctl.hub import resolve
from epctl.launch.cost_rates import load_rates
from epctl.launch.memory_shape import ModelShape, model_shape
from epctl.launch.model_reference import require_trainable
from epctl.launch.plan_view import (
    cost_lines,
    option_row,
    options_table,
    summary_line,
    term_lines,
    term_rows,
    train_line,
    write_front_png,
    write_sweep_png,
)
from epctl.launch.planner import Answer, Request, make_request, plan
from epctl.launch.planner_change import LARGEST_JOB, smallest_changes
from epctl.layout.detect import detect
from epctl.layout.model import ModelLayout
from epctl.output import Output, format_bytes, format_seconds

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(GiB|GB|TiB|TB|MiB|MB|G|T|M)?", re.IGNORECASE)
_UNITS = {"m": 2**20, "mib": 2**20, "mb": 1e6, "g": 2**30, "gib": 2**30, "gb": 1e9}
_UNITS |= {"t": 2**40, "tib": 2**40, "tb": 1e12}
# GPUs of a node, where nobody says otherwise.
USUAL_NODE = 8


@dataclass(frozen=True)
class Asked:
    """What the command line says; None where it says nothing."""

    model: str
    gpus: int
    gpu_memory: str
    nodes: int | None = None
    sequence_length: int | None = None
    tokens_per_step: int | None = None
    host_memory: str | None = None
    imbalance: float = 1.0
    patches: int | None = None
    rates: Sequence[Path] = ()
    flags: Mapping[str, Any] | None = None
    settings: Sequence[str] = ()
    file: Path | None = None


def parse_size(text: str) -> float:
    """Returns bytes of `80GiB`, `80GB` or `80` (GiB). Raises ConfigError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"`{text}` is no amount of memory", hint="write `80GiB`, `141GB` or `80`")
    return float(match[1]) * _UNITS[(match[2] or "GiB").lower()]


def run_plan(
    asked: Asked,
    output: Output,
    *,
    explain: bool = False,
    sweep: str | None = None,
    png: Path | None = None,
) -> None:
    """Shows what fits and what is fastest.

    Raises ConfigError for what cannot be asked, ResourceError when nothing fits.
    """
    if sweep not in (None, "gpus"):
        raise ConfigError(f"`--sweep {sweep}` is unknown; known: gpus")
    request, layout, notes = build_request(asked)
    for note in notes:
        output.note(f"note: {note}")
    if sweep is not None:
        _show_sweep(request, output, png)
        return
    answer = plan(request)
    if answer.best is None:
        raise nothing_fits(request, answer)
    _show(request, layout, answer, output, explain=explain)
    if png is not None:
        write_front_png(answer, png, summary_line(request))
        output.note(f"drawn: {png}")


def build_request(asked: Asked) -> tuple[Request, ModelLayout, list[str]]:
    """Returns the request, the model's layout, and what a reader should know."""
    if asked.gpus < 1 or asked.gpus > LARGEST_JOB:
        raise ConfigError(f"{asked.gpus} GPUs: 1 to {LARGEST_JOB:,} can be planned")
    nodes = asked.nodes or -(-asked.gpus // USUAL_NODE)
    if nodes < 1 or asked.gpus % nodes:
        raise ConfigError(
            f"{asked.gpus} GPUs cannot be shared out over {nodes} nodes",
            hint="state `--nodes` with a divisor of `--gpus`",
        )
    source = resolve(asked.model)
    layout = detect(source)
    flags = {"model.reference": asked.model, "train.sequence_length": asked.sequence_length}
    flags |= dict(asked.flags or {})
    resolved = resolve_config(file=asked.file, settings=list(asked.settings), flags=flags)
    base = resolved.config
    shape = model_shape(layout, source.config, base.optim, base.train.parameters)
    fixed = {
        key: value for key, value in resolved.given().items() if key not in ("model.reference",)
    }
    request = make_request(
        shape, layout, base,
        num_ranks=asked.gpus,
        memory_bytes=parse_size(asked.gpu_memory),
        num_nodes=nodes,
        host_bytes=None if asked.host_memory is None else parse_size(asked.host_memory),
        tokens_per_step=asked.tokens_per_step,
        optimizers=("adamw",) if base.optim.name == "adamw" else ("muon",),
        fixed=fixed,
        rates=load_rates(asked.rates),
        imbalance=asked.imbalance,
        patches=_patches(asked, shape, base),
    )  # fmt: skip
    _check_tokens(request)
    return request, layout, [*source.notes, *_notes(request, layout)]


def _patches(asked: Asked, shape: ModelShape, base: RunConfig) -> int:
    """Vision patches of a sequence: as asked, else half of its tokens up to one large image."""
    if asked.patches is not None and shape.vision is not None:
        return asked.patches
    return shape.usual_patches(base.train.sequence_length)


def _check_tokens(request: Request) -> None:
    tokens, length = request.tokens_per_step, request.base.train.sequence_length
    if tokens is not None and tokens % length:
        raise ConfigError(
            f"{tokens:,} tokens a step are no whole number of sequences of {length:,}",
            hint=f"use a multiple of {length:,}",
        )


def _notes(request: Request, layout: ModelLayout) -> list[str]:
    notes = []
    try:
        require_trainable(layout)
    except LayoutError as error:
        notes.append(f"a plan on paper: {error.message}")
    if request.host_bytes is None:
        notes.append("host memory for offload is not checked: state `--host-memory`")
    if request.tokens_per_step is None:
        notes.append("tokens a step are free: state `--tokens-per-step` to hold them")
    return notes


def nothing_fits(request: Request, answer: Answer) -> ResourceError:
    """Returns the error that says what was too large and the smallest change that would do."""
    changes = smallest_changes(request, answer)
    reasons = "; ".join(f"{reason} ({count})" for reason, count in answer.rejected.items())
    hint = None
    if changes:
        first, *others = changes
        run = first.option.plan
        hint = (
            f"the smallest change: {first.text} (ep {run.ep}, ZeRO-{run.zero}, sp {run.sp}, "
            f"recompute {run.recomputed}, offload {'yes' if run.offload else 'no'})"
        )
        hint += "".join(f"; or {change.text}" for change in others)
    return ResourceError(
        f"nothing fits: {summary_line(request)}; {reasons or 'no legal combination'}", hint=hint
    )


def _show(
    request: Request, layout: ModelLayout, answer: Answer, output: Output, *, explain: bool
) -> None:
    best = answer.options[0]
    line = train_line(request, best, request.base.model.reference or "")
    output.document(
        {
            "model": request.shape.name,
            "gpus": request.num_ranks,
            "nodes": request.num_nodes,
            "gpu_memory_bytes": round(request.memory_bytes),
            "sequence_length": request.base.train.sequence_length,
            "patches": request.patches,
            "options": [option_row(option) for option in answer.options[:10]],
            "front": [option_row(option) for option in answer.front()],
            "terms": term_rows(best),
            "rejected": dict(answer.rejected),
            "num_considered": answer.num_considered,
            "rates": dict(request.rates.sources),
            "command": line,
        }
    )
    output.text(summary_line(request))
    output.data(options_table(answer))
    output.text("memory/speed front: " + _front_text(answer))
    for reason, count in answer.rejected.items():
        output.text(f"not taken: {count} combinations, {reason}")
    measured = request.rates.measured
    output.text(
        "rates: " + (f"{', '.join(measured)} measured here; " if measured else "")
        + ("the rest " if measured else "all ") + "documented defaults (`--explain` lists them)"
    )  # fmt: skip
    if explain:
        output.text("\nThe first option, term by term\n" + "\n".join(term_lines(best)))
        output.text("\nA step of the first option\n" + "\n".join(cost_lines(best)))
        output.text("\nRates")
        for name, text in request.rates.sources.items():
            output.text(f"{name:<14} {text}")
    output.text(f"\n{line}")


def _front_text(answer: Answer) -> str:
    return ", ".join(
        f"{format_bytes(option.needed_bytes)} -> {option.speed:,.0f}" for option in answer.front()
    ) + " tokens/s/GPU"  # fmt: skip


def _show_sweep(request: Request, output: Output, png: Path | None) -> None:
    import dataclasses

    rows: list[dict[str, Any]] = []
    ranks = 1
    while ranks <= LARGEST_JOB:
        nodes = -(-ranks // max(USUAL_NODE, 1))
        answer = plan(dataclasses.replace(request, num_ranks=ranks, num_nodes=nodes))
        rows.append({"gpus": ranks, "best": option_row(answer.best) if answer.best else None})
        ranks *= 2
    output.document({"model": request.shape.name, "sweep": rows})
    output.text(f"{'GPUs':>6}  {'tokens/s/GPU':>12}  {'tokens/s':>12}  {'memory':>10}  best")
    for row in rows:
        output.text(_sweep_line(row))
    if png is not None:
        points = [
            (row["gpus"], row["best"]["tokens_per_second_per_gpu"] if row["best"] else None)
            for row in rows
        ]
        write_sweep_png(points, png, request.shape.name)
        output.note(f"drawn: {png}")


def _sweep_line(row: Mapping[str, Any]) -> str:
    best = row["best"]
    if best is None:
        return f"{row['gpus']:>6}  {'-':>12}  {'-':>12}  {'-':>10}  nothing fits"
    speed = best["tokens_per_second_per_gpu"]
    return (
        f"{row['gpus']:>6}  {speed:>12,.0f}  {speed * row['gpus']:>12,.0f}  "
        f"{format_bytes(best['needed_bytes']):>10}  ep {best['ep']}, ZeRO-{best['zero']}, "
        f"sp {best['sp']}, micro-batch {best['micro_batch_size']}, "
        f"recompute {best['recompute']}"
        + (", offload" if best["offload"] else "")
        + f", {format_seconds(best['seconds_per_step'])} a step"
    )
