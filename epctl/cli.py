"""The `epctl` command line: parse, call, render.

Only typer and the standard library are imported here; each command imports its body when called,
so `epctl --help` and the reading commands never load torch. The other commands stand in
`cli_train`, `cli_convert` and `cli_bench`; importing them adds them to the app.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epctl import cli_bench, cli_checkpoints, cli_convert, cli_plan, cli_train
from epctl.cli_app import GuardedGroup, JsonFlag, QuietFlag, app, examples
from epctl.output import out, prepare_streams, set_mode

__all__ = [
    "GuardedGroup",
    "app",
    "cli_bench",
    "cli_checkpoints",
    "cli_convert",
    "cli_plan",
    "cli_train",
    "main",
]


@app.command(
    epilog=examples(
        "epctl inspect moonshotai/Moonlight-16B-A3B",
        "epctl inspect ./model --json",
        "epctl inspect Qwen/Qwen3-30B-A3B --tensors --filter 'model.layers.0.*'",
        "epctl inspect deepseek-ai/DeepSeek-V3 --tree",
    )
)
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id (`org/name@revision`) or a folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors.")] = False,
    pattern: Annotated[
        str | None, typer.Option("--filter", help="With --tensors: a part of the name, or a glob.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show the module tree, folded.")] = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show layout, parameters, router facts and parallel sizes, from headers alone."""
    from epctl.layout.command import inspect as run_inspect

    set_mode(json_mode=json_mode, quiet=quiet)
    run_inspect(model, tensors=tensors, pattern=pattern, tree=tree)


@app.command(
    epilog=examples(
        "epctl doctor",
        "epctl doctor --ep 4 --zero 3 --moe autoep",
        "epctl doctor --no-probes --json",
        "epctl doctor --only stale_build_lock --only grouped_mm_row_stride",
    )
)
def doctor(
    ep: Annotated[int | None, typer.Option(help="Plan: expert parallel size.")] = None,
    zero: Annotated[int | None, typer.Option(help="Plan: ZeRO stage, 0 to 3.")] = None,
    optim: Annotated[str | None, typer.Option(help="Plan: optimizer.")] = None,
    moe: Annotated[str | None, typer.Option(help="Plan: MoE layer, epctl or autoep.")] = None,
    device: Annotated[str | None, typer.Option(help="Plan: auto, cpu or cuda.")] = None,
    config: Annotated[Path | None, typer.Option(help="Plan: settings from a TOML file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Plan: one setting, `section.key=value`.")
    ] = None,
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help="Run the engine's probes (a minute).")
    ] = True,
    only: Annotated[list[str] | None, typer.Option(help="Probe this hazard only.")] = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Report on this machine, and probe the engine's known hazards for a plan."""
    from epctl.config import resolve_config
    from epctl.launch.doctor import run_doctor

    set_mode(json_mode=json_mode, quiet=quiet)
    flags = {
        "parallel.ep": ep,
        "parallel.zero": zero,
        "parallel.device": device,
        "optim.name": optim,
        "moe.implementation": moe,
    }
    resolved = resolve_config(file=config, settings=settings, flags=flags)
    run_doctor(resolved, out, only=only, probes=probes)


@app.command(
    epilog=examples(
        "epctl logs runs/20261122-101500",
        "epctl logs runs/20261122-101500 --rank 3 --lines 200",
    )
)
def logs(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    rank: Annotated[int | None, typer.Option(help="Show this rank's log.")] = None,
    lines: Annotated[int, typer.Option(help="Last lines of the log.", min=1)] = 40,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show what a run did: state, why it failed, its logs, how to resume."""
    from epctl.launch.logs_command import show_logs

    set_mode(json_mode=json_mode, quiet=quiet)
    show_logs(run, out, rank=rank, num_lines=lines)


def main() -> None:
    """Runs the command line; the console script `epctl` points here."""
    prepare_streams()
    app()
