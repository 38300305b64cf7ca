"""`epctl train` and `epctl config`: the flags of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epctl.cli_app import JsonFlag, QuietFlag, app, examples
from epctl.output import out, set_mode


@app.command(
    epilog=examples(
        "epctl train --ep 4 --zero 3 --optim muon",
        "epctl train --ep 2 --zero 2 --optim adamw --steps 50 --set optim.schedule=wsd",
        "epctl train --ep 4 --dry-run",
        "epctl train moonshotai/Moonlight-16B-A3B --data chats.jsonl --ep 8 --epochs 2",
        "epctl train ./moonlight --data chats.jsonl --ep 8 --check --check-layers 2",
        "epctl train --resume runs/first --steps 400",
        "epctl train -o /shared/run --ep 8 --nnodes 2 --node-rank 1 --rdzv node0:29500",
        "epctl train -o /shared/run --ep 8 --num-ranks 16 --nnodes 2 --launcher slurm --print",
    )
)
def train(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id (`org/name@revision`) or a folder; default: a small one."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Text, jsonl, parquet: file, folder, glob, hub dataset."),
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option("--eval-data", help="Held out; default: a share of --data.")
    ] = None,
    ep: Annotated[int | None, typer.Option(help="Expert parallel size.")] = None,
    zero: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3.")] = None,
    optim: Annotated[str | None, typer.Option(help="Optimizer: muon or adamw.")] = None,
    moe: Annotated[
        str | None, typer.Option(help="MoE layer: epctl, or DeepSpeed's autoep to compare.")
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option("--train", help="all, experts, attention, router, or a regex of names."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Instead of steps: tokens.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Instead of steps: passes over the data.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.")] = None,
    num_ranks: Annotated[
        int | None, typer.Option(help="Ranks; default: one a GPU, or as many as `--ep` on CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: the model's own.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the tokenizer's code, if pinned.")
    ] = False,
    track: Annotated[str | None, typer.Option(help="tensorboard, trackio or wandb.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder: go on from its newest checkpoint.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Prove the layout on two steps, do not train.")
    ] = False,
    check_layers: Annotated[
        int | None, typer.Option(help="With --check: keep only the first layers.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; default runs/<date>-<time>.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, `section.key=value`.")
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="torchrun (default), deepspeed, or slurm.")
    ] = None,
    num_nodes: Annotated[int | None, typer.Option("--nnodes", help="Machines of the job.")] = None,
    node_rank: Annotated[
        int | None, typer.Option(help="Which machine this is; 0 writes the run folder.")
    ] = None,
    rendezvous: Annotated[
        str | None, typer.Option("--rdzv", help="HOST:PORT of node 0, where the nodes meet.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="`HOST slots=N` lines: start every node by ssh.")
    ] = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="Start failed ranks again from the newest checkpoint.")
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the sbatch script or ssh lines, start nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, DeepSpeed JSON and command only.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show rank 0's log.")] = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train; with no model, a small one of Moonlight's layout on local Python sources."""
    from epctl.config import resolve_config
    from epctl.launch.nodes_start import start_elsewhere, starts_elsewhere
    from epctl.launch.resume_run import resumed_settings
    from epctl.launch.train_command import run_train

    set_mode(json_mode=json_mode, quiet=quiet)
    flags = {
        "model.reference": model,
        "model.tokenizer": tokenizer,
        "model.trust_remote_code": trust_remote_code or None,
        "data.train": tuple(data) if data else None,
        "data.eval": tuple(eval_data) if eval_data else None,
        "parallel.ep": ep,
        "parallel.zero": zero,
        "parallel.num_ranks": num_ranks,
        "parallel.device": device,
        "optim.name": optim,
        "optim.lr": lr,
        "moe.implementation": moe,
        "train.parameters": parameters,
        "train.steps": steps,
        "train.tokens": tokens,
        "train.epochs": epochs,
        "train.seed": seed,
        "run.output": str(output) if output is not None else None,
        "run.resume": str(resume) if resume is not None else None,
        "run.track": track,
        "check.num_layers": check_layers,
        "launch.launcher": launcher,
        "launch.num_nodes": num_nodes,
        "launch.node_rank": node_rank,
        "launch.rendezvous": rendezvous,
        "launch.hostfile": str(hostfile) if hostfile is not None else None,
        "launch.max_restarts": max_restarts,
    }
    base = resumed_settings(resume) if resume is not None else None
    resolved = resolve_config(file=config, settings=settings, flags=flags, base=base)
    if starts_elsewhere(resolved.config, print_only=print_only) and not dry_run:
        start_elsewhere(resolved, out, print_only=print_only, check=check)
        return
    run_train(resolved, out, dry_run=dry_run, check=check, verbose=verbose)


@app.command(
    "config",
    epilog=examples(
        "epctl config --ep 4 --zero 3",
        "epctl config --ep 2 --zero 1 --set train.precision=bfloat16 --explain",
        "epctl config moonshotai/Moonlight-16B-A3B --ep 8 --json",
    ),
)
def show_config(
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder; default: the embedded small model.")
    ] = None,
    ep: Annotated[int | None, typer.Option(help="Expert parallel size.")] = None,
    zero: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3.")] = None,
    optim: Annotated[str | None, typer.Option(help="Optimizer: muon or adamw.")] = None,
    moe: Annotated[str | None, typer.Option(help="MoE layer: epctl or autoep.")] = None,
    num_ranks: Annotated[int | None, typer.Option(help="Ranks.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, `section.key=value`.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show why each key has its value.")
    ] = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show the DeepSpeed JSON of a run, and with --explain the reason of each value."""
    from epctl.config import resolve_config
    from epctl.launch.config_command import show_config as run_config

    set_mode(json_mode=json_mode, quiet=quiet)
    flags = {
        "model.reference": model,
        "parallel.ep": ep,
        "parallel.zero": zero,
        "parallel.num_ranks": num_ranks,
        "parallel.device": device,
        "optim.name": optim,
        "moe.implementation": moe,
    }
    resolved = resolve_config(file=config, settings=settings, flags=flags)
    run_config(resolved, out, explain=explain)
