"""Exceptions of epctl, their exit codes and the one formatter.

    EpctlError (1)
    |-- ConfigError (3)          a setting, a config file, or a combination of settings
    |-- InputError (4)           a checkpoint, data or header that is invalid or unsafe
    |   `-- LayoutError          a checkpoint that is sound but not understood
    |-- HubError (5)             hub, network, authorisation
    |-- ResourceError (6)        not enough memory, disk or devices, predicted or met
    |-- GateError (7)            a verification or a bench gate failed
    `-- LaunchError (child's)    a rank failed; its own exit code passes through

Everything a user can cause is also a `ValueError`, so library callers can catch it as such.
"""

from __future__ import annotations

import enum
import os


class ExitCode(enum.IntEnum):
    """Process exit codes; `EXIT_CODE_MEANING` feeds the table in `epctl --help`."""

    OK = 0
    BUG = 1
    USAGE = 2
    CONFIG = 3
    INPUT = 4
    HUB = 5
    RESOURCE = 6
    GATE = 7
    INTERRUPTED = 130
    TERMINATED = 143


EXIT_CODE_MEANING: dict[ExitCode, str] = {
    ExitCode.OK: "ok",
    ExitCode.BUG: "unexpected error (a bug in epctl)",
    ExitCode.USAGE: "wrong usage of the command line",
    ExitCode.CONFIG: "configuration invalid",
    ExitCode.INPUT: "input or checkpoint invalid or unsafe",
    ExitCode.HUB: "hub, network or authorisation",
    ExitCode.RESOURCE: "not enough memory, disk or devices",
    ExitCode.GATE: "verification or bench gate failed",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
    ExitCode.TERMINATED: "terminated (SIGTERM)",
}


class EpctlError(ValueError):
    """What failed, with the value seen and the value needed; `hint` is one next step."""

    exit_code: int = ExitCode.BUG

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(EpctlError):
    exit_code = ExitCode.CONFIG


class InputError(EpctlError):
    exit_code = ExitCode.INPUT


class LayoutError(InputError):
    pass


class HubError(EpctlError):
    exit_code = ExitCode.HUB


class ResourceError(EpctlError):
    exit_code = ExitCode.RESOURCE


class GateError(EpctlError):
    exit_code = ExitCode.GATE


class LaunchError(EpctlError):
    """A launched rank failed; `exit_code` is the rank's own."""

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def debug_enabled() -> bool:
    """True when `EPCTL_DEBUG` asks for tracebacks."""
    return os.environ.get("EPCTL_DEBUG", "") not in ("", "0")


def format_error(error: BaseException) -> str:
    """Returns the text a person sees for `error`: the message, then `hint:` after a blank line."""
    if isinstance(error, EpctlError):
        hint = f"\n\nhint: {error.hint}" if error.hint else ""
        return f"error: {error.message}{hint}"
    return (
        f"error: unexpected {type(error).__name__}: {error}\n\n"
        "hint: this is a bug in epctl; run again with `EPCTL_DEBUG=1` for the traceback"
    )


def exit_code_of(error: BaseException) -> int:
    """Returns the process exit code that `error` stands for."""
    if isinstance(error, EpctlError):
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.BUG)
