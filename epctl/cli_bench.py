"""`epctl bench ...`: correctness first, then numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epctl.cli_app import JsonFlag, QuietFlag, app, examples
from epctl.output import set_mode

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure, correctness first: a red gate prints no number.",
)
app.add_typer(bench_app, name="bench")

JsonFileOption = Annotated[
    Path | None, typer.Option("--json-file", help="Also write the result there.")
]
PngOption = Annotated[Path | None, typer.Option("--png", help="Also draw the picture there.")]


@bench_app.command(
    name="moe",
    epilog=examples(
        "epctl bench moe --shape moonlight --tokens 16384",
        "epctl bench moe --shape qwen3-30b --tokens 4096 --tokens 32768 --json-file moe.json",
        "epctl bench moe --shape 128,64,8,2 --tokens 64 --peer none --device cpu",
    ),
)
def bench_moe(
    shape: Annotated[
        str, typer.Option(help="A model's name, or `hidden,intermediate,experts,top_k`.")
    ] = "moonlight",
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a block; repeatable.")] = None,
    routing: Annotated[
        list[str] | None, typer.Option(help="natural, balanced or zipf; repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="What to measure beside; default: all, or none.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 15,
    json_file: JsonFileOption = None,
    png: PngOption = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure one MoE block, its peers and the floor; every gradient is checked first."""
    from epctl.bench.command import run_case

    set_mode(json_mode=json_mode, quiet=quiet)
    run_case(
        "moe",
        shape=shape,
        tokens=tokens or (16384,),
        routings=routing or ("natural",),
        peers=() if peer == ["none"] else peer,
        device=device,
        rounds=rounds,
        json_path=json_file,
        png_path=png,
    )


@bench_app.command(
    name="muon",
    epilog=examples(
        "epctl bench muon",
        "epctl bench muon --shape 64x1408x2048 --shape 64x2048x1408 --json-file muon.json",
        "epctl bench muon --model moonshotai/Moonlight-16B-A3B --ep 8 --products --step",
        "epctl bench muon --shape 4x176x256 --peer none --device cpu",
    ),
)
def bench_muon(
    shape: Annotated[
        list[str] | None, typer.Option(help="`BATCHxROWSxCOLUMNS`; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of shapes: all that a rank of this model owns.")
    ] = None,
    ep: Annotated[int, typer.Option(help="With --model: expert parallel size.")] = 8,
    products: Annotated[
        bool, typer.Option("--products", help="Also each kind of product, by tile.")
    ] = False,
    step: Annotated[
        bool, typer.Option("--step", help="Also the whole optimizer step and its workspace.")
    ] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="What to measure beside; default: all, or none.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 15,
    json_file: JsonFileOption = None,
    png: PngOption = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure Newton-Schulz beside its peers and the floor; its error is checked first."""
    from epctl.bench.command import run_case

    set_mode(json_mode=json_mode, quiet=quiet)
    run_case(
        "muon",
        shapes=shape,
        model=model,
        ep=ep,
        products=products,
        step=step,
        peers=() if peer == ["none"] else peer,
        device=device,
        rounds=rounds,
        json_path=json_file,
        png_path=png,
    )


@bench_app.command(
    name="train",
    epilog=examples(
        "epctl bench train",
        "epctl bench train --model moonshotai/Moonlight-16B-A3B --layers 9 --peer deepspeed",
        "epctl bench train --model Qwen/Qwen3-30B-A3B --layers 12 --zero 3 --peer none --scaling",
        "epctl bench train --zero 3 --optim muon --routing balanced --json-file t.json",
        "epctl bench train --gate-steps 20 --peer none --rounds 1 --steps 1",
    ),
)
def bench_train(
    model: Annotated[
        str | None,
        typer.Option(help="Name, folder or `tiny`; default: tiny, on GPUs 9 layers of Moonlight."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Decoder layers to keep; default: all.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Default: every GPU, or 2 on a CPU.")] = None,
    ep: Annotated[int | None, typer.Option(help="Expert parallel size; default: ranks.")] = None,
    zero: Annotated[
        str, typer.Option(help="ZeRO stages, commas between.", metavar="STAGES")
    ] = "2,3",
    optim: Annotated[
        str, typer.Option(help="muon, adamw or both.", metavar="NAMES")
    ] = "muon,adamw",
    sequence_length: Annotated[
        int | None, typer.Option(help="Default: 4096 on GPUs, 64 on a CPU.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences a rank; default: 4 on GPUs, 2 on a CPU.")
    ] = None,
    recompute: Annotated[
        str | None, typer.Option(help="`train.activation_checkpointing`; full on GPUs.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="deepspeed, transformers; repeatable; default: both, or none."),
    ] = None,
    routing: Annotated[
        list[str] | None, typer.Option(help="natural, balanced; repeatable; default: both.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Timed steps a round and routing.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Turns of each engine; default: 2.")] = None,
    gate_steps: Annotated[
        int | None, typer.Option(help="Steps in bfloat16 that the gate compares; default: 2.")
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also on 1, 2, 4, ... ranks below.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no engine's turn later than this.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Say where a step's time goes.")
    ] = True,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting of the runs, `key=value`.")
    ] = None,
    json_file: JsonFileOption = None,
    png: PngOption = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure whole training steps: tokens/s, TFLOP/s, MFU, memory and where the time goes.

    MFU counts 3 x (2 x matrices that a token meets + causal attention) FLOPs a token, nothing that
    is recomputed, over the matmul rate measured in the same process.
    """
    from epctl.bench.command import run_case
    from epctl.bench.train_cases import parse_optimizers, parse_stages

    set_mode(json_mode=json_mode, quiet=quiet)
    run_case(
        "train",
        model=model,
        layers=layers,
        ranks=ranks,
        ep=ep,
        zero=parse_stages(zero),
        optim=parse_optimizers(optim),
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        recompute=recompute,
        peers=() if peer == ["none"] else peer,
        routings=routing or (),
        steps=steps,
        rounds=rounds,
        gate_steps=gate_steps,
        scaling=scaling,
        minutes=minutes,
        profile=profile,
        device=device,
        settings=setting or (),
        json_path=json_file,
        png_path=png,
    )


@bench_app.command(
    name="multimodal-sp",
    epilog=examples(
        "epctl bench multimodal-sp",
        "epctl bench multimodal-sp --workload 'one large image' --ranks 2 --ranks 4",
        "epctl bench multimodal-sp --rounds 10 --json-file sp.json --png sp.png",
    ),
)
def bench_multimodal_sp(
    workload: Annotated[
        list[str] | None, typer.Option(help="A sample by name; repeatable; default: all.")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(help="Ranks that share it; repeatable; default: 2, 4, 8.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    json_file: JsonFileOption = None,
    png: PngOption = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Share one image-and-text sample over ranks, five ways; gradients are checked first."""
    from epctl.bench.command import run_case

    set_mode(json_mode=json_mode, quiet=quiet)
    run_case(
        "multimodal-sp",
        workloads=workload or (),
        ranks=ranks or (),
        device=device,
        rounds=rounds,
        json_path=json_file,
        png_path=png,
    )


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
    json_file: JsonFileOption = None,
    png: PngOption = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Shard, merge and re-shard beside the disk's own copy rate, with peak memory."""
    from epctl.bench.command import run_case

    set_mode(json_mode=json_mode, quiet=quiet)
    run_case(
        "convert",
        size_gb=size_gb,
        rounds=rounds,
        folder=folder,
        json_path=json_file,
        png_path=png,
    )


@bench_app.command(name="list", epilog=examples("epctl bench list"))
def bench_list(json_mode: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """List the benchmarks."""
    from epctl.bench.command import list_cases

    set_mode(json_mode=json_mode, quiet=quiet)
    list_cases()


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
