"""What a person sees of a plan: options, terms of the best one, the command, the picture."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl.launch.memory import reserve_terms
from epctl.launch.memory_terms import PHASES, Phase, Term, total
from epctl.launch.planner import Answer, Option, Request
from epctl.output import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

NUM_SHOWN = 10


def option_row(option: Option) -> dict[str, Any]:
    """Returns an option as plain JSON values; docs/plan.md lists the names."""
    run = option.plan
    return {
        "ep": run.ep,
        "zero": run.zero,
        "sp": run.sp,
        "micro_batch_size": run.micro_batch,
        "gradient_accumulation_steps": run.accumulation,
        "activation_checkpointing": run.checkpointing,
        "recompute": run.recomputed,
        "offload": run.offload,
        "optimizer": run.optimizer,
        "tokens_per_step": run.tokens_per_step,
        "peak_bytes": round(option.prediction.peak_bytes),
        "needed_bytes": round(option.needed_bytes),
        "host_bytes": round(option.prediction.host_bytes),
        "peak_phase": PHASES[option.prediction.peak_phase],
        "seconds_per_step": round(option.cost.seconds, 4),
        "tokens_per_second_per_gpu": round(option.speed, 1),
        "seconds": {name: round(value, 4) for name, value in option.cost.parts().items()},
    }


def term_rows(option: Option) -> list[dict[str, Any]]:
    """Returns every term of an option with its formula and where and when it counts."""
    terms = (*option.prediction.terms, *reserve_terms(option.prediction.peak_bytes))
    return [
        {
            "term": term.name,
            "group": term.group,
            "bytes": round(term.num_bytes),
            "formula": term.explanation(),
            "place": term.place,
            "phases": [name for phase, name in PHASES.items() if term.phases & phase],
        }
        for term in terms
    ]


def options_table(answer: Answer) -> Table:
    """Returns the fastest options."""
    from rich.table import Table

    optimizers = " and ".join(sorted({o.plan.optimizer for o in answer.options}))
    title = f"What fits, fastest first (predicted; {optimizers})"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for name in ("ep", "ZeRO", "sp", "batch", "accum", "recompute", "offload"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("memory", "tokens/s/GPU", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    for option in answer.options[:NUM_SHOWN]:
        run = option.plan
        table.add_row(
            str(run.ep), str(run.zero), str(run.sp), str(run.micro_batch), str(run.accumulation),
            run.recomputed, "yes" if run.offload else "no",
            format_bytes(option.needed_bytes), f"{option.speed:,.0f}",
            format_seconds(option.cost.seconds),
        )  # fmt: skip
    return table


def term_lines(option: Option) -> list[str]:
    """Returns the terms of an option by phase, the peak, and what comes on top of it."""
    terms, width = option.prediction.terms, 42
    heads = ("loss", "backward", "backward", "step")
    lines = [
        f"{'GiB of a rank':<{width}}" + "".join(f"{head:>9}" for head in heads) + "  formula",
        " " * width + f"{'':>9}{'(last)':>9}{'(first)':>9}",
    ]
    for term in terms:
        name = term.name if term.place == "device" else f"{term.name} (host)"
        cells = "".join(f"{_gibibytes(term, phase):>9}" for phase in PHASES)
        lines.append(f"{name:<{width}}{cells}  {term.explanation()}")
    sums = "".join(f"{total(terms, phase) / 2**30:>9.3f}" for phase in PHASES)
    peak = PHASES[option.prediction.peak_phase]
    lines.append(f"{'allocated on the device':<{width}}{sums}  peak: {peak}")
    for term in reserve_terms(option.prediction.peak_bytes):
        lines.append(f"{term.name:<{width}}{term.num_bytes / 2**30:>9.3f}{'':>27}  {term.formula}")
    return lines


def _gibibytes(term: Term, phase: Phase) -> str:
    return f"{term.num_bytes / 2**30:.3f}" if term.phases & phase else ""


def cost_lines(option: Option) -> list[str]:
    """Returns what a step's time goes to, largest first."""
    seconds = option.cost.seconds
    parts = sorted(option.cost.parts().items(), key=lambda part: -part[1])
    return [
        f"{name.replace('_', ' '):<14} {value:8.3f} s  {value / seconds:4.0%}"
        for name, value in parts
        if value
    ]


def train_line(request: Request, option: Option, model: str) -> str:
    """Returns the command that runs an option; every planned setting is stated in it."""
    run, base = option.plan, request.base
    words = [
        "epctl",
        "train",
        model,
        "--data",
        "DATA",
        "--ep",
        str(run.ep),
        "--zero",
        str(run.zero),
    ]
    words += ["--optim", run.optimizer, "--num-ranks", str(run.num_ranks)]
    if run.sp > 1:
        words += ["--sp", str(run.sp)]
    if request.num_nodes > 1:
        words += ["--nnodes", str(request.num_nodes)]
    settings: dict[str, Any] = {
        "train.sequence_length": run.sequence_length,
        "train.micro_batch_size": run.micro_batch,
        "train.gradient_accumulation_steps": run.accumulation,
        "train.activation_checkpointing": run.checkpointing,
    }
    if run.recomputes_experts:
        settings["moe.recompute"] = "activation"
    if run.offload:
        settings["optim.offload"] = "true"
    if not base.data.packing:
        settings["data.packing"] = "false"
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return shlex.join(words)


def summary_line(request: Request) -> str:
    """Returns what was asked, in a line."""
    shape = request.shape
    experts = f", {shape.num_experts} experts" if shape.num_experts else ""
    return (
        f"{shape.name}: {format_count(shape.num_parameters)} parameters{experts}; "
        f"{_counted(request.num_ranks, 'GPU' if request.device == 'cuda' else 'CPU rank')} of "
        f"{format_bytes(request.memory_bytes)} on {_counted(request.num_nodes, 'node')}, "
        "sequences of "
        f"{request.base.train.sequence_length:,} tokens"
        + (f" with {request.patches:,} patches" if request.patches else "")
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def write_front_png(answer: Answer, path: Path, title: str) -> None:
    """Draws memory against speed: every option, and the front of those that none beats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for stage in sorted({option.plan.zero for option in answer.options}):
        those = [o for o in answer.options if o.plan.zero == stage]
        memory = [o.needed_bytes / 2**30 for o in those]
        axes.plot(memory, [o.speed for o in those], "o", alpha=0.5, label=f"ZeRO-{stage}")
    front = answer.front()
    axes.plot([o.needed_bytes / 2**30 for o in front], [o.speed for o in front], "-", color="0.3")
    for option in front:
        run = option.plan
        note = f"ep {run.ep}, {run.micro_batch} x, {run.recomputed}"
        where = (option.needed_bytes / 2**30, option.speed)
        axes.annotate(note, where, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="GiB a GPU (predicted)", ylabel="tokens/s/GPU (predicted)", title=title)
    axes.set_ylim(0, None)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def write_sweep_png(points: Sequence[tuple[int, float | None]], path: Path, title: str) -> None:
    """Draws tokens a second of all GPUs over their number, beside the straight line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fits = [(n, speed * n) for n, speed in points if speed is not None]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    if fits:
        first, rate = fits[0]
        axes.plot(*zip(*fits, strict=True), "o-", label="predicted")
        straight = [(n, rate / first * n) for n, _ in fits]
        axes.plot(*zip(*straight, strict=True), "--", color="0.6", label="as the first, times GPUs")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s, all GPUs", title=title)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
