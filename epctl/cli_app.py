"""The typer app of `epctl`, its error mapping and what every command shares."""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from epctl import __version__
from epctl.errors import EXIT_CODE_MEANING, debug_enabled, exit_code_of, format_error
from epctl.output import out

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
