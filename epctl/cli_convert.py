"""`epctl convert ...` and `epctl export`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from epctl.cli_app import JsonFlag, QuietFlag, app, examples
from epctl.output import set_mode

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
