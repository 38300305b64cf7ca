"""The flags of a run, each in one place: `train` and `config` share them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Hub id (`org/name@revision`) or a folder; default: a small one."),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="Text, jsonl, parquet: file, folder, glob, hub dataset."),
]
EvalDataOption = Annotated[
    list[str] | None, typer.Option("--eval-data", help="Held out; default: a share of --data.")
]
ExpertParallelOption = Annotated[int | None, typer.Option(help="Expert parallel size.")]
SequenceParallelOption = Annotated[
    int | None, typer.Option(help="Sequence parallel size: ranks that share each sample.")
]
ZeroStageOption = Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3.")]
OptimOption = Annotated[str | None, typer.Option(help="Optimizer: muon or adamw.")]
MoELayerOption = Annotated[
    str | None, typer.Option(help="MoE layer: epctl, or DeepSpeed's autoep to compare.")
]
ParametersOption = Annotated[
    str | None,
    typer.Option("--train", help="all, experts, attention, router, or a regex of names."),
]
StepsOption = Annotated[int | None, typer.Option(help="Optimizer steps.")]
TokensOption = Annotated[int | None, typer.Option(help="Instead of steps: tokens.")]
EpochsOption = Annotated[float | None, typer.Option(help="Instead of steps: passes over the data.")]
LearningRateOption = Annotated[float | None, typer.Option(help="Learning rate.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of weights and data order.")]
NumRanksOption = Annotated[
    int | None, typer.Option(help="Ranks; default: one a GPU, or as many as `--ep` on CPU.")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Folder or hub id; default: the model's own.")
]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the tokenizer's code, if pinned.")
]
ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Trace three steps; say where their time went.")
]
TrackOption = Annotated[str | None, typer.Option(help="tensorboard, trackio or wandb.")]
ResumeOption = Annotated[
    str | None,
    typer.Option(help="Run folder to go on in; or auto, must, never with `--output RUN`."),
]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Prove the layout on two steps, do not train.")
]
CheckLayersOption = Annotated[
    int | None, typer.Option(help="With --check: keep only the first layers.")
]
RunFolderOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run folder; default runs/<date>-<time>.")
]
ConfigFileOption = Annotated[Path | None, typer.Option(help="Settings from a TOML file.")]
SettingsOption = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, `section.key=value`.")
]
LauncherOption = Annotated[
    str | None, typer.Option(help="torchrun (default), deepspeed, or slurm.")
]
NumNodesOption = Annotated[int | None, typer.Option("--nnodes", help="Machines of the job.")]
NodeRankOption = Annotated[
    int | None, typer.Option(help="Which machine this is; 0 writes the run folder.")
]
RendezvousOption = Annotated[
    str | None, typer.Option("--rdzv", help="HOST:PORT of node 0, where the nodes meet.")
]
HostfileOption = Annotated[
    Path | None, typer.Option(help="`HOST slots=N` lines: start every node by ssh.")
]
MaxRestartsOption = Annotated[
    int | None, typer.Option(help="Start failed ranks again from the newest checkpoint.")
]
PrintOnlyOption = Annotated[
    bool, typer.Option("--print", help="Print the sbatch script or ssh lines, start nothing.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show settings, DeepSpeed JSON and command only.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show rank 0's log.")]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Show why each key has its value.")]
