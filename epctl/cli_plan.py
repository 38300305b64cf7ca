"""`epctl plan`: what fits and what is fastest, before GPUs are queued for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epctl.cli_app import JsonFlag, QuietFlag, app, examples
from epctl.cli_options import (
    ConfigFileOption,
    ExpertParallelOption,
    OptimOption,
    SettingsOption,
    ZeroStageOption,
)
from epctl.output import out, set_mode


@app.command(
    epilog=examples(
        "epctl plan moonshotai/Moonlight-16B-A3B --gpus 8 --gpu-memory 80GiB",
        "epctl plan Qwen/Qwen3-30B-A3B --gpus 8 --gpu-memory 80GiB --tokens-per-step 1048576",
        "epctl plan deepseek-ai/DeepSeek-V3 --gpus 256 --gpu-memory 141GiB --explain",
        "epctl plan moonshotai/Moonlight-16B-A3B --gpus 8 --gpu-memory 80GiB --sweep gpus",
        "epctl plan Qwen/Qwen2.5-VL-7B-Instruct --gpus 4 --gpu-memory 80GiB --seq 131072 "
        "--set data.packing=false",
    )
)
def plan(
    model: Annotated[str, typer.Argument(help="Hub id (`org/name@revision`) or a folder.")],
    gpus: Annotated[int, typer.Option(help="GPUs of the job, 1 to 16,384.")],
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU: `80GiB`.")],
    nodes: Annotated[int | None, typer.Option(help="Machines; default: 8 GPUs each.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens a sequence; default 4096.")] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens of an optimizer step over all GPUs.")
    ] = None,
    optim: OptimOption = None,
    ep: ExpertParallelOption = None,
    zero: ZeroStageOption = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Memory of a node, for offload: `1TiB`.")
    ] = None,
    imbalance: Annotated[
        float, typer.Option(help="Rows of the fullest rank over the mean.", min=1.0)
    ] = 1.0,
    patches: Annotated[
        int | None, typer.Option(help="Vision patches a sequence; default: half of it.", min=0)
    ] = None,
    rates: Annotated[
        list[Path] | None,
        typer.Option(help="Results of `epctl bench moe` and `muon`; default: the last here."),
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="`gpus`: 1 to 16,384 instead.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the front (or the sweep) there.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every term with its formula.")
    ] = False,
    config: ConfigFileOption = None,
    settings: SettingsOption = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Plan a run: what fits on these GPUs, what is fastest, and the train command for it."""
    from epctl.launch.plan_command import Asked, run_plan

    set_mode(json_mode=json_mode, quiet=quiet)
    asked = Asked(
        model=model,
        gpus=gpus,
        gpu_memory=gpu_memory,
        nodes=nodes,
        sequence_length=seq,
        tokens_per_step=tokens_per_step,
        host_memory=host_memory,
        imbalance=imbalance,
        patches=patches,
        rates=tuple(rates or ()),
        flags={"parallel.ep": ep, "parallel.zero": zero, "optim.name": optim},
        settings=tuple(settings or ()),
        file=config,
    )
    run_plan(asked, out, explain=explain, sweep=sweep, png=png)
