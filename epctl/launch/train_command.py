"""The body of `epctl train`: resolve, check, launch, follow."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epctl.config import ResolvedConfig, RunConfig
from epctl.errors import ConfigError
from epctl.launch.check_command import check_settings, conclude
from epctl.launch.command import launch_command, rank_environment
from epctl.launch.dataset_reference import PinnedDataset, pin_datasets, write_datasets
from epctl.launch.devices import Placement, count_gpus
from epctl.launch.dry_run import show_dry_run
from epctl.launch.ds_config import deepspeed_config
from epctl.launch.ignored import warn_of_check_settings, warn_of_ignored_settings
from epctl.launch.memory_default import default_model
from epctl.launch.model_reference import fetch, open_reference, require_processor
from epctl.launch.nodes import join_job, place_job, require_node_settings
from epctl.launch.plan_train import (
    plan_run,
    predict_run,
    prediction_document,
    write_prediction,
)
from epctl.launch.planner_rules import model_limits, require_legal
from epctl.launch.resume_run import (
    forget_failure,
    keep_global_batch,
    reopen_run_folder,
    require_checkpointable,
)
from epctl.launch.run_folder import choose_run_folder, create_run_folder, run_lock
from epctl.launch.supervise import run_job
from epctl.launch.track import open_tracker, require_tracker
from epctl.launch.view import RunView
from epctl.layout.source import ModelSource
from epctl.output import Output

# Of the `train` extra; without it the reading commands still work.
TRAIN_PACKAGES = ("torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class Job:
    """A run that passed every check that needs no rank."""

    resolved: ResolvedConfig
    placement: Placement
    source: ModelSource | None
    datasets: dict[str, PinnedDataset]

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def bfloat16(self) -> bool:
        return self.config.train.uses_bfloat16(self.placement.device)

    def deepspeed(self) -> dict[str, Any]:
        on_cpu = self.placement.device == "cpu"
        return deepspeed_config(self.config, bfloat16=self.bfloat16, on_cpu=on_cpu)


def run_train(
    resolved: ResolvedConfig, output: Output, *, dry_run: bool, verbose: bool, check: bool = False
) -> None:
    """Trains, or checks, or with `dry_run` shows what would run and touches nothing.

    Raises whatever is wrong with the request as its own class of `epctl.errors`, and LaunchError
    with a failing rank's exit code.
    """
    if check:
        resolved = check_settings(resolved, output)
    else:
        warn_of_check_settings(resolved, output)
    job = check_request(resolved, output)
    resume = job.config.run.resume
    if job.config.launch.node_rank > 0 and not dry_run:
        join_job(job.config, job.placement, output, "check" if check else "train")
        return
    folder = Path(resume) if resume is not None else choose_run_folder(job.config.run.output)
    if dry_run:
        foreseen = predict_run(job.config, job.placement, job.source)
        show_dry_run(
            job.resolved, job.placement, folder, job.deepspeed(), foreseen, job.datasets, output
        )
        return
    folder = reopen_run_folder(folder) if resume is not None else create_run_folder(folder)
    launch(job, folder, output, verbose=verbose, program="check" if check else "train")
    if check:
        conclude(folder, output)


def require_train_extra() -> None:
    """Raises ConfigError if a package that ranks need is not installed (checked unimported)."""
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"training needs {', '.join(f'`{name}`' for name in missing)}, not installed here",
            hint="`pip install 'epctl[train]'`",
        )


def check_request(resolved: ResolvedConfig, output: Output) -> Job:
    """Returns the job, everything decided that can be decided before a rank starts."""
    require_train_extra()
    from epctl.runtime.data_files import find_records

    config = resolved.config
    source, (_, layout) = None, default_model()
    if config.model.reference is not None:
        source, layout = open_reference(config.model.reference)
        for warning in layout.warnings:
            output.note(f"{source.id}: {warning}")
        if layout.vision is not None and source.folder is not None:
            require_processor(source.folder)
    require_node_settings(config)
    placement = place_job(config, count_gpus())
    limits = model_limits(layout)
    require_legal(config, placement.num_ranks, placement.device, limits)
    if config.launch.node_rank == 0:  # the others read what node 0 wrote
        resolved = plan_run(resolved, placement, source, output)
    config = resolved.config
    require_legal(config, placement.num_ranks, placement.device, limits)
    resumed = Path(config.run.resume) if config.run.resume is not None else None
    datasets = pin_datasets(config.data, resumed)
    for use, patterns in (("train", config.data.train), ("eval", config.data.eval)):
        if patterns and use not in datasets:
            find_records(patterns)
    require_tracker(config.run.track)
    require_checkpointable(config)
    warn_of_ignored_settings(resolved, output)
    resolved = keep_global_batch(resolved, placement, output)
    return Job(resolved, placement, source, datasets)


def launch(
    job: Job, folder: Path, output: Output, *, verbose: bool, program: str = "train"
) -> None:
    """Writes the run folder, starts the ranks and follows them to the end.

    Raises ConfigError while another job has the folder, and what `run_job` raises.
    """
    with run_lock(folder) as note:
        if note:
            output.note(f"note: {note}")
        if job.config.run.resume is not None:
            forget_failure(folder)
        _launch(job, folder, output, verbose=verbose, program=program)


def _launch(job: Job, folder: Path, output: Output, *, verbose: bool, program: str) -> None:
    write_run_folder(job, folder, program)
    command = launch_command(folder, job.placement, program, job.config.launch)
    output.note(f"starting {job.placement.num_ranks} ranks ({job.placement.reason})")
    view = RunView(output, folder, open_tracker(job.config.run.track, folder, job.config))
    try:
        environment = rank_environment(job.placement, os.environ, job.config.launch)
        run_job(
            command,
            environment,
            folder,
            view,
            verbose_to=output if verbose else None,
            grace_seconds=job.config.checkpoint.grace_seconds,
        )
    finally:
        view.close()


def write_run_folder(job: Job, folder: Path, program: str) -> None:
    """Writes what the ranks read: settings, DeepSpeed JSON, command, where the model lies."""
    resolved = job.resolved
    (folder / "config.json").write_text(resolved.to_json(), encoding="utf-8")
    foreseen = predict_run(job.config, job.placement, job.source)
    write_prediction(folder, prediction_document(foreseen, job.placement.device))
    document = json.dumps(job.deepspeed(), indent=2) + "\n"
    (folder / "ds_config.json").write_text(document, encoding="utf-8")
    if job.source is not None:
        fetch(job.source, job.config.model).write(folder)
    write_datasets(job.datasets, folder)
    command = shlex.join(launch_command(folder, job.placement, program, job.config.launch))
    # The last file: a node that joins waits for it.
    (folder / "command.txt").write_text(command + "\n", encoding="utf-8")
