"""The `epctl` command line: parse, call, render.

Only typer and the standard library are imported here; each command imports its body when called,
so `epctl --help` and the reading commands never load torch.
"""

from __future__ import annotations

import enum
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from epctl import __version__
from epctl.errors import EXIT_CODE_MEANING, debug_enabled, exit_code_of, format_error
from epctl.output import out, prepare_streams, set_mode

EXIT_CODES = (
    "Exit codes: "
    + "; ".join(f"{int(k)} {v}" for k, v in EXIT_CODE_MEANING.items())
    + ("; a trainer's own code passes through.")
)


class GuardedGroup(TyperGroup):
    """Maps every exception of a command to its message on stderr and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            if type(error).__module__.startswith("typer"):  # usage errors and typer.Exit
                raise
            if debug_enabled():
                out.error(traceback.format_exc())
            out.error(
                "interrupted" if isinstance(error, KeyboardInterrupt) else format_error(error)
            )
            raise typer.Exit(exit_code_of(error)) from None


app = typer.Typer(
    cls=GuardedGroup,
    name="epctl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Inspect, plan, shard, train and measure Mixture-of-Experts and vision-language models "
    "on DeepSpeed.",
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Data and errors only.")]


def _show_version(value: bool) -> None:
    if value:
        out.text(f"epctl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version.")
    ] = False,
) -> None:
    pass


def examples(*lines: str) -> str:
    """Returns a help epilog that shows command lines; a test parses each of them."""
    return "Examples:\n\n" + "\n\n".join(lines)


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


convert_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Shard experts per expert-parallel rank, merge back, re-shard, verify.",
)
app.add_typer(convert_app, name="convert")

DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")]
OverwriteFlag = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that epctl wrote earlier.")
]


class Storage(enum.StrEnum):
    """How an output stores its experts."""

    CHECKPOINT = "checkpoint"
    FUSED = "fused"


class Dtype(enum.StrEnum):
    """Which dtype an output's weights have."""

    KEEP = "keep"
    BF16 = "bf16"


@convert_app.command(
    epilog=examples(
        "epctl convert shard moonshotai/Moonlight-16B-A3B --ep 4 -o moonlight-ep4",
        "epctl convert shard ./model --ep 8 --rank 3 -o /local/model-ep8",
        "epctl convert shard deepseek-ai/DeepSeek-V3 --ep 64 --dtype bf16 -o v3 --dry-run",
    )
)
def shard(
    model: Annotated[str, typer.Argument(help="Hub id (`org/name@revision`) or a folder.")],
    ep: Annotated[int, typer.Option(help="Expert parallel size.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    storage: Annotated[
        Storage, typer.Option(help="As in the checkpoint, or fused as transformers 5 holds them.")
    ] = Storage.CHECKPOINT,
    dtype: Annotated[
        Dtype, typer.Option(help="Keep dtypes, or bfloat16 (dequantises FP8 and MXFP4).")
    ] = Dtype.KEEP,
    replicate: Annotated[
        bool, typer.Option("--replicate", help="Give each rank's folder a copy of the rest.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Write this rank's part only.")] = None,
    dry_run: DryRunFlag = False,
    overwrite: OverwriteFlag = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write one folder a rank with its experts, and the rest once."""
    from epctl.convert import command
    from epctl.convert.jobs import ShardOptions

    set_mode(json_mode=json_mode, quiet=quiet)
    options = ShardOptions(ep, storage.value, dtype.value, replicate, rank)
    command.shard(model, output, options, dry_run=dry_run, overwrite=overwrite)


@convert_app.command(epilog=examples("epctl convert merge moonlight-ep4 -o moonlight"))
def merge(
    folder: Annotated[str, typer.Argument(help="A shard folder with all its ranks.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dry_run: DryRunFlag = False,
    overwrite: OverwriteFlag = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write a shard folder back as the Hugging Face folder it was made from."""
    from epctl.convert import command

    set_mode(json_mode=json_mode, quiet=quiet)
    command.merge(folder, output, dry_run=dry_run, overwrite=overwrite)


@convert_app.command(epilog=examples("epctl convert reshard moonlight-ep4 --ep 8"))
def reshard(
    folder: Annotated[str, typer.Argument(help="A shard folder with all its ranks.")],
    ep: Annotated[int, typer.Option(help="The new expert parallel size.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; default FOLDER-epN.")
    ] = None,
    dry_run: DryRunFlag = False,
    overwrite: OverwriteFlag = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write a shard folder at another expert parallel size, with no merged copy between."""
    from epctl.convert import command

    set_mode(json_mode=json_mode, quiet=quiet)
    command.reshard(folder, ep, output, dry_run=dry_run, overwrite=overwrite)


@convert_app.command(
    epilog=examples(
        "epctl convert verify ./model model-ep4",
        "epctl convert verify model-ep4",
        "epctl convert verify ./model ./other --tolerance 1e-2",
    )
)
def verify(
    one: Annotated[str, typer.Argument(help="A checkpoint or a shard folder.")],
    other: Annotated[
        str | None, typer.Argument(help="What it must equal; default: its own manifest.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Compare values: max |a - b| <= tolerance x max |b|.")
    ] = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Compare two checkpoints, or one with its manifest; exit 7 if they differ."""
    from epctl.convert.verify_command import verify as run_verify

    set_mode(json_mode=json_mode, quiet=quiet)
    run_verify(one, other, tolerance)


@app.command(
    epilog=examples(
        "epctl export runs/20261122-101500 -o ./exported",
        "epctl export runs/20261122-101500/checkpoints/step-0001000 -o ./exported --dtype bf16",
    )
)
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A run, a checkpoint, a shard folder or a model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    storage: Annotated[
        Storage, typer.Option(help="As in the checkpoint, or fused as transformers 5 holds them.")
    ] = Storage.CHECKPOINT,
    dtype: Annotated[
        Dtype, typer.Option(help="Keep dtypes, or bfloat16 (dequantises FP8 and MXFP4).")
    ] = Dtype.KEEP,
    dry_run: DryRunFlag = False,
    overwrite: OverwriteFlag = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write any checkpoint as one Hugging Face folder."""
    from epctl.convert import command

    set_mode(json_mode=json_mode, quiet=quiet)
    command.export(
        checkpoint, output, storage.value, dtype.value, dry_run=dry_run, overwrite=overwrite
    )


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


bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure, correctness first: a red gate prints no number.",
)
app.add_typer(bench_app, name="bench")


@bench_app.command(
    name="convert",
    epilog=examples(
        "epctl bench convert --size-gb 1",
        "epctl bench convert --size-gb 8 --rounds 3 --folder /data --json-file convert.json",
    ),
)
def bench_convert(
    size_gb: Annotated[
        float, typer.Option("--size-gb", help="Size of the synthetic checkpoint, 10^9 bytes.")
    ] = 1.0,
    rounds: Annotated[int, typer.Option(help="Measured rounds, after the gate.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; default: the working folder.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json-file", help="Also write the result there.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the rates there.")] = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Shard, merge and re-shard beside the disk's own copy rate, with peak memory."""
    from epctl.bench.convert import run_convert

    set_mode(json_mode=json_mode, quiet=quiet)
    run_convert(size_gb=size_gb, rounds=rounds, folder=folder, json_path=json_file, png_path=png)


@bench_app.command(name="compare", epilog=examples("epctl bench compare before.json after.json"))
def bench_compare(
    before: Annotated[Path, typer.Argument(help="A result of `epctl bench`.")],
    after: Annotated[Path, typer.Argument(help="A later one of the same benchmark.")],
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Compare two results, row by row."""
    from epctl.bench.compare import run_compare

    set_mode(json_mode=json_mode, quiet=quiet)
    run_compare(before, after)


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
