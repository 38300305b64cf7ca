"""The only module that writes to stdout or stderr.

Data goes to stdout, everything else (notes, warnings, progress, errors, hints) to stderr.
Modes: `human` (tables, colour on a terminal), `json` (one document, or JSON Lines from train),
`quiet` (data and errors only). rich is imported on first use, so `--help` stays fast.
"""

from __future__ import annotations

import contextlib
import enum
import io
import json
import os
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Mode(enum.Enum):
    """How results are shown."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Output:
    """One sink for a whole process; tests build their own over string buffers."""

    def __init__(
        self, mode: Mode = Mode.HUMAN, stdout: IO[str] | None = None, stderr: IO[str] | None = None
    ) -> None:
        self.mode = mode
        self._stdout = stdout
        self._stderr = stderr
        self._warned: set[str] = set()

    @property
    def stdout(self) -> IO[str]:
        return self._stdout if self._stdout is not None else sys.stdout

    @property
    def stderr(self) -> IO[str]:
        return self._stderr if self._stderr is not None else sys.stderr

    @property
    def _ascii(self) -> bool:
        """True when stdout cannot carry every character, so that JSON has to escape them."""
        encoding = getattr(self.stdout, "encoding", None) or "utf-8"
        return encoding.lower().replace("-", "") != "utf8"

    @property
    def is_terminal(self) -> bool:
        """True when stderr is a terminal that can redraw lines."""
        return self.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def console(self, *, data: bool = False) -> Console:
        """Returns a rich console on stderr, or on stdout when `data` is true."""
        from rich.console import Console

        stream = self.stdout if data else self.stderr
        width = None if stream.isatty() or "COLUMNS" in os.environ else 100
        return Console(file=stream, width=width, highlight=False, soft_wrap=False)

    def data(self, renderable: RenderableType) -> None:
        """Writes a result for people to stdout; silent in json mode, where `document` speaks."""
        if self.mode is not Mode.JSON:
            self.console(data=True).print(renderable)

    def text(self, text: str) -> None:
        """Writes plain result text to stdout, unwrapped and unstyled."""
        if self.mode is not Mode.JSON:
            self.stdout.write(text if text.endswith("\n") else text + "\n")
            self.stdout.flush()

    def document(self, value: Any) -> None:
        """Writes one JSON document to stdout in json mode."""
        if self.mode is Mode.JSON:
            self.stdout.write(json.dumps(value, indent=2, ensure_ascii=self._ascii) + "\n")
            self.stdout.flush()

    def record(self, value: dict[str, Any]) -> None:
        """Writes one line of JSON Lines to stdout in json mode."""
        if self.mode is Mode.JSON:
            self.stdout.write(json.dumps(value, ensure_ascii=self._ascii) + "\n")
            self.stdout.flush()

    def panel(self, renderable: RenderableType) -> None:
        """Writes a rich renderable to stderr in human mode."""
        if self.mode is Mode.HUMAN:
            self.console().print(renderable)

    def note(self, message: str) -> None:
        """Writes one line of progress or fact to stderr in human mode."""
        if self.mode is Mode.HUMAN:
            self._line(message)

    def warning(self, message: str, *, once: bool = False) -> None:
        """Writes a warning to stderr in every mode; with `once`, equal messages appear once."""
        if once and message in self._warned:
            return
        self._warned.add(message)
        self._line(f"warning: {message}")

    def error(self, message: str) -> None:
        """Writes an error, already formatted, to stderr in every mode."""
        self._line(message)

    def _line(self, message: str) -> None:
        self.stderr.write(message + "\n")
        self.stderr.flush()


out = Output()


def prepare_streams() -> None:
    """Makes stdout and stderr replace what their encoding lacks instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_streams() -> None:
    """Writes out what is buffered: for a process that ends without the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()


def others_on_stderr() -> contextlib.AbstractContextManager[Any]:
    """Sends what libraries print to stderr for as long as it is open: stdout is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def set_mode(*, json_mode: bool = False, quiet: bool = False) -> None:
    """Sets the mode of the process-wide sink; json wins over quiet."""
    out.mode = Mode.JSON if json_mode else Mode.QUIET if quiet else Mode.HUMAN


def format_bytes(num_bytes: float) -> str:
    """Returns bytes in binary units: `1.5 GiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    value = float(num_bytes)
    for unit in units:
        if abs(value) < 1024 or unit == units[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable: the last unit always returns")


def format_count(count: float) -> str:
    """Returns a count in decimal units: `15.96 B`."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """Returns a duration: `0.8 s`, `1 min 20 s`, `2 h 03 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
