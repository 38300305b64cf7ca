"""Downloads a hub model into the cache: room on the disk first, then one bar for all its bytes."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from epctl.errors import EpctlError, HubError, ResourceError
from epctl.hub import PATIENT_CONNECT, cache_folder, connection_problem, endpoint, offline
from epctl.layout.remote import mapped_errors, with_retries
from epctl.output import format_bytes, out
from epctl.progress import ByteProgress

# What a checkpoint needs; pickles and pictures stay where they are.
WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
CODE_FILES = ("*.py",)


def download(
    model_id: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    hint: str,
    output: Path | None = None,
    output_bytes: int = 0,
) -> Path:
    """Returns the snapshot folder of a model, fetching what the cache lacks.

    An interrupted download goes on where it stopped.

    Args:
        revision: commit, tag or branch; None is `main`.
        patterns: globs of the files wanted.
        hint: the way around the hub, for errors.
        output: where `output_bytes` are to be written later; counted with the download when the
            cache is on the same disk.

    Raises:
        HubError: no network, no such model, no access.
        ResourceError: the disk cannot hold it, found before the first byte or on the way.
    """
    from huggingface_hub import errors, snapshot_download

    problem = "HF_HUB_OFFLINE is set" if offline() else connection_problem(PATIENT_CONNECT)
    if problem:
        raise HubError(f"`{model_id}` cannot be downloaded: {problem}", hint=hint)
    # The endpoint by hand: huggingface_hub reads HF_ENDPOINT once, when it is imported.
    arguments: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(patterns),
        "endpoint": endpoint(),
        "cache_dir": cache_folder(),
    }

    def ask(**more: Any) -> Any:
        with mapped_errors(model_id, revision):
            try:
                return snapshot_download(model_id, **arguments, **more)
            except errors.DryRunError as error:
                raise error.__cause__ or error from None

    try:
        # The first call only asks for the sizes.
        files = with_retries(lambda: ask(dry_run=True, tqdm_class=_bar_class(int)), model_id)
        missing = sum(file.file_size for file in files if file.will_download)
        _require_room(cache_folder(), missing, output, output_bytes)
        if missing:
            out.note(f"downloading `{model_id}`: {missing / 1e9:.2f} GB into `{cache_folder()}`")
        with ByteProgress(out, "download", missing) as progress:
            bar = _bar_class(progress.advance)
            return Path(with_retries(lambda: ask(tqdm_class=bar), f"`{model_id}`"))
    except ResourceError:
        raise
    except Exception as error:  # of httpx, of Xet, of the file system
        raise _explained(model_id, error, hint) from None


def _explained(model_id: str, error: Exception, hint: str) -> EpctlError:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(
            f"the disk of `{cache_folder()}` is full: {error.strerror}",
            hint="`HF_HOME` chooses another disk; the same command goes on where this one stopped",
        )
    if isinstance(error, EpctlError):
        hint = f"{error.hint}; or {hint}" if error.hint else hint
        return HubError(f"`{model_id}` cannot be downloaded: {error.message}", hint=hint)
    return HubError(
        f"`{model_id}` cannot be downloaded: {type(error).__name__}: {error}", hint=hint
    )


def _require_room(cache: Path, missing: int, output: Path | None, output_bytes: int) -> None:
    """Raises ResourceError unless the cache's disk holds `missing` bytes, and the output's too."""
    where = _existing(cache)
    needed, what = missing, "the download"
    if output is not None and os.stat(_existing(output)).st_dev == os.stat(where).st_dev:
        needed, what = missing + output_bytes, "the download and what is written from it"
    free = shutil.disk_usage(where).free
    if missing and free < needed:
        raise ResourceError(
            f"{what} need {format_bytes(needed)}, `{where}` has {format_bytes(free)} free",
            hint="`HF_HOME` chooses another disk for the cache",
        )


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _bar_class(advance: Callable[[int], object]) -> Any:
    """Returns a tqdm class that shows nothing itself and gives the bytes that came to `advance`."""
    tqdm = importlib.import_module("tqdm.auto").tqdm
    lock = threading.Lock()
    counts: dict[int, float] = {}
    told = 0

    class Bar(tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            if not self._counts_bytes:
                return
            with lock:
                # Two bars count the same bytes, as received and as written: the fuller one.
                counts[id(self)] = counts.get(id(self), 0) + (n or 0)
                gained = int(max(counts.values())) - told
                told += max(0, gained)
            if gained > 0:
                advance(gained)

    return Bar
