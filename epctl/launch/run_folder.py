"""The folder of a run: config with sources, DeepSpeed JSON, logs, metrics, curve, model."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epctl.convert.lock import output_lock
from epctl.errors import ConfigError

LOCK_NAME = "run.lock"


def choose_run_folder(output: str | None) -> Path:
    """Returns where the run goes: as asked, or `runs/<date>-<time>`; never a used folder.

    Raises ConfigError if the folder exists and is not empty.
    """
    if output is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        base = Path("runs") / stamp
        candidates = (base.with_name(f"{stamp}-{n}") if n else base for n in range(1000))
        return next(path for path in candidates if not path.exists())
    folder = Path(output)
    try:
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise _unusable(folder, error) from None
    if used:
        raise ConfigError(
            f"run folder `{folder}` exists and is not empty", hint="choose another `--output`"
        )
    return folder


def create_run_folder(folder: Path) -> Path:
    """Makes the folder and its `logs`; returns its absolute path.

    Raises ConfigError, with the system's reason, if it cannot be made.
    """
    try:
        (folder / "logs").mkdir(parents=True)
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder.resolve()


@contextmanager
def run_lock(folder: Path) -> Iterator[str | None]:
    """Holds a run for one job; yields a note when that of a dead process was taken over.

    Raises ConfigError, naming process and host, while another job has it, or if it is read-only.
    """
    try:
        with output_lock(folder, folder / LOCK_NAME) as note:
            yield note
    except OSError as error:
        if error.filename and str(error.filename).endswith(LOCK_NAME):
            raise _unusable(folder, error) from None
        raise


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot create run folder `{folder}`: {error.strerror or error}",
        hint="choose another `--output`",
    )
