"""What `--data org/name[:config][@revision]` is, decided before anything starts; no torch.

The revision is pinned to its commit by the launcher and written into the run folder, so that all
ranks, and every job that resumes the run, read the same files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epctl.config_data import DataSection
from epctl.errors import HubError, InputError
from epctl.hub import PATIENT_CONNECT, connection_problem, endpoint, hub_home, offline
from epctl.layout.remote import SILENCE_LIMIT, mapped_errors, with_retries

FILE_NAME = "dataset.json"
# Smaller ones are downloaded once, read at random and kept in the hub's cache.
STREAM_ABOVE_BYTES = 2**30
LOCAL_HINT = "point `--data` at local text, jsonl or parquet files"

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(
    rf"(?P<name>{_PART}/{_PART})(?::(?P<config>[^@/:]+))?(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What only a file is called; `org/data-v1.5` is a dataset.
_FILE_SUFFIX = re.compile(r".*\.(txt|md|rst|py|tex|html|jsonl?|ndjson|parquet|csv|gz|zst|xz|zip)")


@dataclass(frozen=True)
class PinnedDataset:
    """A hub dataset at one commit. `streaming`: read over the network, never stored whole."""

    name: str
    config: str | None
    sha: str
    split: str
    streaming: bool

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.name}{config}@{self.sha[:12]} {self.split}"


def is_dataset(pattern: str) -> bool:
    """True for `org/name[:config][@revision]` that is no path on this disk."""
    match = _REFERENCE.fullmatch(pattern)
    if match is None or Path(pattern).exists():
        return False
    return not _FILE_SUFFIX.fullmatch(match["name"].lower())


def pin_datasets(data: DataSection, run_folder: Path | None) -> dict[str, PinnedDataset]:
    """Returns the hub datasets that `data.train` and `data.eval` name, by `train` and `eval`.

    Args:
        run_folder: of the run that goes on; the commits that it began with are kept.

    Raises HubError when the hub cannot be reached, knows no such dataset or refuses it.
    """
    earlier = read_datasets(run_folder) if run_folder is not None else {}
    asked = {"train": (data.train, data.split), "eval": (data.eval, data.eval_split)}
    pinned: dict[str, PinnedDataset] = {}
    for use, (patterns, split) in asked.items():
        if not any(is_dataset(pattern) for pattern in patterns):
            continue
        if len(patterns) > 1:
            raise InputError(
                f"`{' '.join(patterns)}`: a hub dataset stands alone, beside no other data",
                hint="download it as files to mix it with others",
            )
        kept = earlier.get(use)
        if kept is None or not _is_same(patterns[0], split, kept):
            kept = pin_dataset(patterns[0], split, data.streaming)
        pinned[use] = kept
    return pinned


def _is_same(pattern: str, split: str, kept: PinnedDataset) -> bool:
    match = _REFERENCE.fullmatch(pattern)
    assert match is not None
    revision = match["revision"]
    moved = revision is not None and _COMMIT.fullmatch(revision) and revision != kept.sha
    return (match["name"], match["config"], split) == (kept.name, kept.config, kept.split) and (
        not moved
    )


def pin_dataset(pattern: str, split: str, streaming: str) -> PinnedDataset:
    """Returns the dataset at the commit that its revision (default `main`) names now.

    Args:
        streaming: `auto` (above `STREAM_ABOVE_BYTES`), `always` or `never`.

    Raises HubError as `pin_datasets` does.
    """
    match = _REFERENCE.fullmatch(pattern)
    assert match is not None, pattern
    name, config, revision = match["name"], match["config"], match["revision"]
    problem = "HF_HUB_OFFLINE is set" if offline() else connection_problem(PATIENT_CONNECT)
    if problem:
        sha = _cached_commit(name, revision)
        if sha is None:
            raise HubError(
                f"dataset `{name}` cannot be read: {problem}, it is not in the cache of `datasets`,"
                f" and there is no file or folder `{pattern}`",
                hint=LOCAL_HINT,
            )
        return PinnedDataset(name, config, sha, split, streaming=False)
    info = _ask(name, revision)
    if not info.sha or not _COMMIT.fullmatch(info.sha):
        raise HubError(f"the hub names no commit for dataset `{name}`")
    sizes = [sibling.size or 0 for sibling in info.siblings or ()]
    large = sum(sizes) > STREAM_ABOVE_BYTES
    stream = streaming == "always" or (streaming == "auto" and large)
    return PinnedDataset(name, config, info.sha, split, stream)


def _ask(name: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi

    def ask() -> Any:
        with mapped_errors(name, revision, kind="dataset"):
            return HfApi(endpoint=endpoint()).dataset_info(
                name, revision=revision, timeout=SILENCE_LIMIT, files_metadata=True
            )

    try:
        return with_retries(ask, f"dataset `{name}`")
    except HubError as error:
        raise HubError(
            f"{error.message}; there is no file or folder `{name}` either",
            hint=f"{error.hint}; or {LOCAL_HINT}" if error.hint else LOCAL_HINT,
        ) from None


def _cached_commit(name: str, revision: str | None) -> str | None:
    """Returns the commit that `datasets` prepared last on this disk, None without one."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or hub_home() / "datasets")
    found = [
        path
        for path in cache.glob(f"{name.replace('/', '___')}/*/*/*")
        if path.is_dir() and _COMMIT.fullmatch(path.name)
    ]
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision if any(path.name == revision for path in found) else None
    # A branch or tag cannot be looked up; only the default may be what was fetched last.
    if revision not in (None, "main") or not found:
        return None
    return max(found, key=lambda path: path.stat().st_mtime).name


def write_datasets(pinned: Mapping[str, PinnedDataset], run_folder: Path) -> None:
    """Writes what `read_datasets` returns; nothing for a run on files."""
    if not pinned:
        return
    document = {use: asdict(dataset) for use, dataset in pinned.items()}
    text = json.dumps(document, indent=2) + "\n"
    (run_folder / FILE_NAME).write_text(text, encoding="utf-8")


def read_datasets(run_folder: Path) -> dict[str, PinnedDataset]:
    """Returns the hub datasets of a run, by `train` and `eval`; empty for a run on files."""
    path = run_folder / FILE_NAME
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {use: PinnedDataset(**values) for use, values in document.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"`{path}` is damaged: {error}") from None
