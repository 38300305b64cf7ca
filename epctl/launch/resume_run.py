"""What `--resume` means before anything starts: which folder, whose settings, at which layout.

--resume RUN                go on from RUN's newest sound checkpoint, in RUN; must have one
--resume must  -o RUN       the same
--resume auto  -o RUN       the same if RUN has a checkpoint, else begin in RUN, saying so
--resume never -o RUN       begin in RUN, which must not exist yet
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epctl.config import ResolvedConfig, RunConfig
from epctl.errors import ConfigError, InputError
from epctl.interval import parse_interval
from epctl.launch.devices import Placement
from epctl.output import Output
from epctl.runtime.run_checkpoints import checkpoints_folder, list_checkpoints, newest_checkpoint

MODES = ("auto", "must", "never")
# Where a run was to go, and what it resumed itself, is not for the next one to inherit.
NOT_INHERITED = ("run.output", "run.resume", "launch.node_rank", "launch.local_address")
FAILURE_FILES = (
    "logs/failure-rank-*.json",
    "logs/failed-ranks.json",
    "logs/place-rank-*.json",
    "command.txt",
)
BATCH_KEYS = ("train.micro_batch_size", "train.gradient_accumulation_steps")


def choose_resume(
    resume: str | None, run_folder: Path | None, output: Output
) -> tuple[Path | None, Path | None]:
    """Returns (the run to go on, None; or None and the folder for a fresh run).

    Raises ConfigError for a mode without a folder, or both a run and a folder; InputError for
    `must` without a checkpoint, or `auto` where there are checkpoints of which none counts.
    """
    if resume is None:
        return None, run_folder
    if resume not in MODES:
        if run_folder is not None and run_folder.resolve() != Path(resume).resolve():
            raise ConfigError(
                f"`--resume {resume}` goes on in that folder; `--output {run_folder}` is another",
                hint=f"leave out `--output`, or start a new run from the weights: "
                f"`epctl train {resume}/checkpoints/step-N/model`",
            )
        return Path(resume), None
    if run_folder is None:
        raise ConfigError(
            f"`--resume {resume}` needs the run's folder",
            hint=f"`--resume {resume} --output RUN`, or `--resume RUN`",
        )
    if resume == "must":
        return run_folder, None
    if resume == "auto" and _may_go_on(run_folder, output):
        return run_folder, None
    return None, run_folder


def _may_go_on(run_folder: Path, output: Output) -> bool:
    """True if the run has a checkpoint; else makes room for a fresh one, saying so."""
    listed = list_checkpoints(run_folder)
    if any(found.manifest is not None for found in listed):
        return True
    if listed:
        raise InputError(
            f"run `{run_folder}` has checkpoints, and none of them counts"
            + "".join(f"\n  {found.reason}" for found in listed),
            hint="`--resume auto` does not begin again over them: move them away, or choose "
            "another `--output`",
        )
    if (run_folder / "config.json").is_file():
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        aside = run_folder.with_name(f"{run_folder.name}.before-{stamp}")
        run_folder.rename(aside)
        output.warning(f"`{run_folder}` had no checkpoint yet: put aside as `{aside}`")
    output.note(f"`{run_folder}` has no checkpoint: begins at step 0")
    return False


def resumed_settings(run_folder: Path) -> tuple[Mapping[str, Any], str]:
    """Returns the settings somebody chose for the earlier run, and their source for `--dry-run`.

    Raises InputError if the folder is no run or has no checkpoint.
    """
    newest_checkpoint(run_folder)
    values = {k: v for k, v in _earlier(run_folder).given().items() if k not in NOT_INHERITED}
    return values, f"run {run_folder}"


def _earlier(run_folder: Path) -> ResolvedConfig:
    path = run_folder / "config.json"
    try:
        return ResolvedConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"`{path}` cannot be read: {error}") from None


def keep_global_batch(
    resolved: ResolvedConfig, placement: Placement, output: Output
) -> ResolvedConfig:
    """Returns settings under which a resumed run has the sequences a step that it had before.

    On another number of ranks the accumulation changes, and if need be the micro-batch; what is
    given for this start stays, with a warning where that changes the batch.

    Raises ConfigError if the batch cannot be dealt out.
    """
    run_folder = resolved.config.run.resume
    if run_folder is None:
        return resolved
    before = _earlier(Path(run_folder)).config
    earlier = before.train
    written = list_checkpoints(Path(run_folder))
    num_ranks = next(f.manifest.topology.num_ranks for f in reversed(written) if f.manifest)
    places = num_ranks // before.parallel.sp
    wanted = earlier.micro_batch_size * earlier.gradient_accumulation_steps * places
    train = resolved.config.train
    places = placement.num_ranks // resolved.config.parallel.sp
    asked = train.micro_batch_size * train.gradient_accumulation_steps * places
    if asked == wanted:
        return resolved
    if any(resolved.sources[key] in ("flag", "--set") for key in BATCH_KEYS):
        output.warning(f"a step has {asked} sequences from now on; until here it had {wanted}")
        return resolved
    sizes = range(train.micro_batch_size, 0, -1)
    micro = next((size for size in sizes if wanted % (size * places) == 0), None)
    if micro is None:
        raise ConfigError(
            f"the run has {wanted} sequences a step, which {placement.num_ranks} ranks cannot "
            "share",
            hint="choose `--num-ranks` that divides it, or state the new batch with "
            "`--set train.micro_batch_size=N`",
        )
    accumulation = wanted // (micro * places)
    output.note(
        f"{num_ranks} ranks before, {placement.num_ranks} now: {micro} sequences a micro-step, "
        f"{accumulation} micro-steps, still {wanted} a step"
    )
    resolved = resolved.replaced("train.micro_batch_size", micro)
    return resolved.replaced("train.gradient_accumulation_steps", accumulation)


def reopen_run_folder(folder: Path) -> Path:
    """Returns the absolute path of a run that goes on; raises ConfigError if it is read-only."""
    try:
        (folder / "logs").mkdir(exist_ok=True)
        checkpoints_folder(folder).touch()
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        raise ConfigError(
            f"cannot write run folder `{folder}`: {error.strerror or error}",
            hint="a run goes on in its own folder: copy it to a disk that can be written",
        ) from None
    return folder.resolve()


def forget_failure(folder: Path) -> None:
    """Removes what the earlier job left behind about its own failure."""
    for pattern in FAILURE_FILES:
        for path in folder.glob(pattern):
            path.unlink()


def require_checkpointable(config: RunConfig) -> None:
    """Raises ConfigError for checkpoints of an optimizer whose state epctl does not own."""
    every = parse_interval(config.checkpoint.every)
    if config.optim.name == "deepspeed-muon" and every is not None:
        raise ConfigError(
            "`checkpoint.every` with `--optim deepspeed-muon`: its state cannot be stored by name",
            hint="it is there to compare with; `--optim muon` writes checkpoints",
        )
