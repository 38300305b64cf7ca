"""`epctl checkpoints RUN [list|verify|diff|prune]`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from epctl.cli_app import JsonFlag, QuietFlag, app, examples
from epctl.output import out, set_mode


class Action(enum.StrEnum):
    """What to do with a run's checkpoints."""

    LIST = "list"
    VERIFY = "verify"
    DIFF = "diff"
    PRUNE = "prune"


@app.command(
    epilog=examples(
        "epctl checkpoints runs/first",
        "epctl checkpoints runs/first verify",
        "epctl checkpoints runs/first diff 500 1000 --json",
        "epctl checkpoints runs/first prune --keep 2 --yes",
    )
)
def checkpoints(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.LIST,
    steps: Annotated[
        list[int] | None, typer.Argument(help="verify: these only; diff: the two to compare.")
    ] = None,
    keep: Annotated[int, typer.Option(help="prune: newest that stay.", min=2)] = 2,
    yes: Annotated[bool, typer.Option("--yes", help="prune: remove, do not only show.")] = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """List a run's checkpoints, read every byte of them again, compare two, remove old ones."""
    from epctl.launch import checkpoints_command as command

    set_mode(json_mode=json_mode, quiet=quiet)
    if action is Action.LIST:
        command.show_list(run, out)
    elif action is Action.VERIFY:
        command.verify(run, steps or [], out)
    elif action is Action.DIFF:
        command.diff(run, steps or [], out)
    else:
        command.prune(run, keep, out, remove=yes)
