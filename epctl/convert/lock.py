"""One converter on one output: a lock beside it that names its owner, dead owners told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epctl.errors import ConfigError


@contextmanager
def output_lock(output: Path, path: Path | None = None) -> Iterator[str | None]:
    """Holds a lock file, by default `<output>.lock`; yields a note when a dead one was taken over.

    The lock names process and host. One of this host whose process is gone is stale and taken
    over; a living owner, or one on another host, stops the caller with ConfigError.
    """
    from filelock import SoftFileLock, Timeout

    path = path or output.with_name(output.name + ".lock")
    previous = _owner(path)
    # The first try clears a stale lock away, a later one takes its place.
    lock = SoftFileLock(path, timeout=1.0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"`{output}` is being written by {_owner(path) or 'another process'}",
            hint=f"wait for it or choose another `--output`; if that host is gone, remove `{path}`",
        ) from None
    try:
        yield f"took over the lock of {previous}, which is gone" if previous else None
    finally:
        lock.release()


def _owner(path: Path) -> str | None:
    """Returns `process 12 on host`, None where no lock stands."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return f"process {lines[0]} on {lines[1]}" if len(lines) >= 2 else "a half-written lock"
