"""The body of `epctl train`: resolve, check, launch, follow."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from epctl.config import ResolvedConfig, RunConfig
from epctl.launch.command import launch_command, rank_environment
from epctl.launch.devices import Placement, count_gpus, place_ranks
from epctl.launch.ds_config import deepspeed_config
from epctl.launch.run_folder import choose_run_folder, create_run_folder
from epctl.launch.supervise import run_job
from epctl.launch.view import RunView
from epctl.output import Output

# The embedded default's expert count, known without building it: a wrong EP fails at once.
DEFAULT_NUM_EXPERTS = 64


def run_train(resolved: ResolvedConfig, output: Output, *, dry_run: bool, verbose: bool) -> None:
    """Trains, or with `dry_run` shows what would run and touches nothing.

    Raises ConfigError, ResourceError or LaunchError; see `epctl.errors` for their exit codes.
    """
    from epctl.runtime.mesh import validate_expert_parallel

    config = resolved.config
    placement = place_ranks(
        device=config.parallel.device,
        num_ranks=config.parallel.num_ranks,
        ep=config.parallel.ep,
        gpus=count_gpus(),
    )
    validate_expert_parallel(config.parallel.ep, placement.num_ranks, DEFAULT_NUM_EXPERTS)
    warn_of_ignored_settings(resolved, output)
    folder = choose_run_folder(config.run.output)
    if dry_run:
        _show_dry_run(resolved, placement, folder, output)
        return
    folder = create_run_folder(folder)
    (folder / "config.json").write_text(resolved.to_json(), encoding="utf-8")
    (folder / "ds_config.json").write_text(_ds_json(config, placement), encoding="utf-8")
    command = launch_command(folder, placement)
    (folder / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    output.note(f"starting {placement.num_ranks} ranks ({placement.reason})")
    view = RunView(output, folder)
    try:
        environment = rank_environment(placement, os.environ)
        run_job(command, environment, folder, view, verbose_to=output if verbose else None)
    finally:
        view.close()


def warn_of_ignored_settings(resolved: ResolvedConfig, output: Output) -> None:
    """Says which given settings this run will not use."""
    optim = resolved.config.optim
    muon_only = ("momentum", "nesterov", "update_scale", "newton_schulz_steps", "router")
    if optim.name == "adamw":
        for name in muon_only:
            if resolved.sources[f"optim.{name}"] != "default":
                output.warning(f"`optim.{name}` is ignored: the optimizer is adamw")
    if optim.schedule != "wsd" and resolved.sources["optim.decay_ratio"] != "default":
        output.warning(f"`optim.decay_ratio` is ignored: the schedule is {optim.schedule}")


def _bfloat16(config: RunConfig, placement: Placement) -> bool:
    precision = config.train.precision
    return precision == "bfloat16" or (precision == "auto" and placement.device == "cuda")


def _ds_json(config: RunConfig, placement: Placement) -> str:
    on_cpu = placement.device == "cpu"
    document = deepspeed_config(config, bfloat16=_bfloat16(config, placement), on_cpu=on_cpu)
    return json.dumps(document, indent=2) + "\n"


def _show_dry_run(
    resolved: ResolvedConfig, placement: Placement, folder: Path, output: Output
) -> None:
    values = _flat_values(resolved.config)
    document: dict[str, Any] = {
        "config": {
            key: {"value": value, "source": resolved.sources[key]} for key, value in values.items()
        },
        "deepspeed": json.loads(_ds_json(resolved.config, placement)),
        "command": launch_command(folder, placement),
        "placement": placement.reason,
    }
    output.document(document)
    width = max(map(len, values))
    for key, value in values.items():
        output.text(f"{key:<{width}}  {value!s:<16}  {resolved.sources[key]}")
    output.text("\nDeepSpeed config\n" + json.dumps(document["deepspeed"], indent=2))
    output.text(f"\nranks: {placement.num_ranks} ({placement.reason})")
    output.text("command: " + shlex.join(document["command"]))


def _flat_values(config: RunConfig) -> dict[str, Any]:
    sections = config.model_dump()
    return {f"{s}.{name}": v for s, values in sections.items() for name, v in values.items()}
