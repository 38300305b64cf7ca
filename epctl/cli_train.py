"""`epctl train` and `epctl config`: the flags of a run."""

from __future__ import annotations

from epctl.cli_app import JsonFlag, QuietFlag, app, examples
from epctl.cli_options import (
    CheckLayersOption,
    CheckOption,
    ConfigFileOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    EpochsOption,
    EvalDataOption,
    ExpertParallelOption,
    ExplainOption,
    HostfileOption,
    LauncherOption,
    LearningRateOption,
    MaxRestartsOption,
    ModelArgument,
    MoELayerOption,
    NodeRankOption,
    NumNodesOption,
    NumRanksOption,
    OptimOption,
    ParametersOption,
    PrintOnlyOption,
    ProfileOption,
    RendezvousOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SequenceParallelOption,
    SettingsOption,
    StepsOption,
    TokenizerOption,
    TokensOption,
    TrackOption,
    TrustRemoteCodeOption,
    VerboseOption,
    ZeroStageOption,
)
from epctl.output import out, set_mode


@app.command(
    epilog=examples(
        "epctl train --ep 4 --zero 3 --optim muon",
        "epctl train --ep 2 --zero 2 --optim adamw --steps 50 --set optim.schedule=wsd",
        "epctl train --ep 4 --dry-run",
        "epctl train --ep 2 --sp 2 --steps 20 --set train.sequence_length=2048",
        "epctl train moonshotai/Moonlight-16B-A3B --data chats.jsonl --ep 8 --epochs 2",
        "epctl train ./moonlight --data chats.jsonl --ep 8 --check --check-layers 2",
        "epctl train ./Qwen2.5-VL-7B-Instruct --data image-chats.jsonl --sp 2",
        "epctl train --resume runs/first --steps 400",
        "epctl train --resume auto -o runs/night --ep 4 --set checkpoint.every=30min",
        "epctl train -o /shared/run --ep 8 --nnodes 2 --node-rank 1 --rdzv node0:29500",
        "epctl train -o /shared/run --ep 8 --num-ranks 16 --nnodes 2 --launcher slurm --print",
    )
)
def train(
    model: ModelArgument = None,
    data: DataOption = None,
    eval_data: EvalDataOption = None,
    ep: ExpertParallelOption = None,
    sp: SequenceParallelOption = None,
    zero: ZeroStageOption = None,
    optim: OptimOption = None,
    moe: MoELayerOption = None,
    parameters: ParametersOption = None,
    steps: StepsOption = None,
    tokens: TokensOption = None,
    epochs: EpochsOption = None,
    lr: LearningRateOption = None,
    seed: SeedOption = None,
    num_ranks: NumRanksOption = None,
    device: DeviceOption = None,
    tokenizer: TokenizerOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    track: TrackOption = None,
    profile: ProfileOption = False,
    resume: ResumeOption = None,
    check: CheckOption = False,
    check_layers: CheckLayersOption = None,
    output: RunFolderOption = None,
    config: ConfigFileOption = None,
    settings: SettingsOption = None,
    launcher: LauncherOption = None,
    num_nodes: NumNodesOption = None,
    node_rank: NodeRankOption = None,
    rendezvous: RendezvousOption = None,
    hostfile: HostfileOption = None,
    max_restarts: MaxRestartsOption = None,
    print_only: PrintOnlyOption = False,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train; with no model, a small one of Moonlight's layout on local Python sources."""
    from epctl.config import resolve_config
    from epctl.launch.nodes_start import start_elsewhere, starts_elsewhere
    from epctl.launch.resume_run import choose_resume, resumed_settings
    from epctl.launch.train_command import run_train

    set_mode(json_mode=json_mode, quiet=quiet)
    earlier, fresh = choose_resume(resume, output, out)
    flags = {
        "model.reference": model,
        "model.tokenizer": tokenizer,
        "model.trust_remote_code": trust_remote_code or None,
        "data.train": tuple(data) if data else None,
        "data.eval": tuple(eval_data) if eval_data else None,
        "parallel.ep": ep,
        "parallel.sp": sp,
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
        "run.output": str(fresh) if fresh is not None else None,
        "run.resume": str(earlier) if earlier is not None else None,
        "run.track": track,
        "run.profile": profile or None,
        "check.num_layers": check_layers,
        "launch.launcher": launcher,
        "launch.num_nodes": num_nodes,
        "launch.node_rank": node_rank,
        "launch.rendezvous": rendezvous,
        "launch.hostfile": str(hostfile) if hostfile is not None else None,
        "launch.max_restarts": max_restarts,
    }
    base = resumed_settings(earlier) if earlier is not None else None
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
    model: ModelArgument = None,
    ep: ExpertParallelOption = None,
    sp: SequenceParallelOption = None,
    zero: ZeroStageOption = None,
    optim: OptimOption = None,
    moe: MoELayerOption = None,
    num_ranks: NumRanksOption = None,
    device: DeviceOption = None,
    config: ConfigFileOption = None,
    settings: SettingsOption = None,
    explain: ExplainOption = False,
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
        "parallel.sp": sp,
        "parallel.zero": zero,
        "parallel.num_ranks": num_ranks,
        "parallel.device": device,
        "optim.name": optim,
        "moe.implementation": moe,
    }
    resolved = resolve_config(file=config, settings=settings, flags=flags)
    run_config(resolved, out, explain=explain)
