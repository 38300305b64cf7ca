"""Finds training records: text, jsonl and parquet files, folders, globs, or a hub dataset.

Text and jsonl are read here, line by line, so that an error names file and line; parquet files
and hub datasets are streamed by `datasets`. Nothing is read whole except a text file.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epctl.errors import HubError, InputError

Record = tuple[str, Mapping[str, Any]]  # where it stands, for messages; what it says

TEXT_KEY = "text"
JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson"})
# What a folder is searched for; a file named directly may have any name.
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp"})
PROBE_BYTES = 8192


@dataclass(frozen=True)
class RecordSource:
    """Local files, or one hub dataset (`org/name@revision`) when `dataset` is set."""

    files: tuple[Path, ...] = ()
    dataset: str | None = None
    split: str = "train"
    text_key: str = TEXT_KEY

    def records(self) -> Iterator[Record]:
        """Yields every record in a fixed order."""
        if self.dataset is not None:
            yield from _hub_records(self.dataset, self.split)
        for path in self.files:
            yield from _file_records(path, self.text_key)


def find_records(patterns: Sequence[str], split: str, text_key: str = TEXT_KEY) -> RecordSource:
    """Returns what `patterns` name.

    Raises InputError for a pattern without files, an empty or a binary file.
    """
    if len(patterns) == 1 and _is_dataset(patterns[0]):
        return RecordSource(dataset=patterns[0], split=split)
    files = [path for pattern in patterns for path in _expand(pattern)]
    for path in files:
        _check_file(path)
    return RecordSource(files=tuple(dict.fromkeys(files)), text_key=text_key)


def _is_dataset(pattern: str) -> bool:
    name = pattern.partition("@")[0]
    local = Path(pattern).exists() or any(c in name for c in "*?[") or name.startswith((".", "/"))
    return not local and name.count("/") == 1 and not Path(name).suffix


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        known = JSON_SUFFIXES | TEXT_SUFFIXES | {".parquet"}
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
        what = f"folder `{pattern}` holds no text, jsonl or parquet file"
    else:
        matches = (
            [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        )
        found = [p for p in matches if p.is_file()]
        what = f"no file matches `{pattern}`"
    if not found:
        raise InputError(
            what, hint="`--data` takes files, folders, globs or a hub dataset `org/name`"
        )
    return found


def _check_file(path: Path) -> None:
    if path.stat().st_size == 0:
        raise InputError(f"data file `{path}` is empty", hint="remove it, or give another `--data`")
    if path.suffix.lower() == ".parquet":
        return
    with path.open("rb") as file:
        if b"\0" in file.read(PROBE_BYTES):
            raise InputError(
                f"data file `{path}` is binary, not text",
                hint="`--data` takes UTF-8 text, jsonl and parquet files",
            )


def _file_records(path: Path, text_key: str) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_records(path)
    elif suffix in JSON_SUFFIXES:
        yield from _json_records(path)
    else:
        yield f"`{path}`", {text_key: _read_text(path)}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data file `{path}` is not UTF-8 text: byte {error.start} is "
            f"{error.object[error.start]:#04x}",
            hint="convert it, for example with `iconv -t utf-8`",
        ) from None


def _json_records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        if file.read(64).lstrip()[:1] == b"[":
            yield from _json_list(path)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _checked(f"`{path}` line {number}", line)


def _json_list(path: Path) -> Iterator[Record]:
    try:
        values = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"`{path}` is not JSON: {error}") from None
    for number, value in enumerate(values, start=1):
        yield f"`{path}` record {number}", _mapping(f"`{path}` record {number}", value)


def _checked(where: str, line: bytes) -> Record:
    try:
        return where, _mapping(where, json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is a JSON {type(value).__name__}, not an object")
    return value


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        rows = _load("parquet", data_files=str(path), split="train")
        for number, record in enumerate(rows, start=1):
            yield f"`{path}` row {number}", record
    except InputError:
        raise
    except Exception as error:  # `datasets` and pyarrow have many, of no common base
        raise InputError(f"`{path}` cannot be read as parquet: {_first_line(error)}") from None


def _hub_records(dataset: str, split: str) -> Iterator[Record]:
    from epctl.hub import PATIENT_CONNECT, connection_problem, offline

    name, _, revision = dataset.partition("@")
    problem = "HF_HUB_OFFLINE is set" if offline() else connection_problem(PATIENT_CONNECT)
    if problem:
        raise HubError(
            f"dataset `{dataset}` cannot be read: {problem}, and there is no such file or folder",
            hint="point `--data` at local text, jsonl or parquet files",
        )
    try:
        rows = _load(name, revision=revision or None, split=split)
        for number, record in enumerate(rows, start=1):
            yield f"dataset `{name}` {split} record {number}", record
    except InputError:
        raise
    except Exception as error:
        raise HubError(f"dataset `{dataset}`, split `{split}`: {_first_line(error)}") from None


def _load(kind: str, **arguments: Any) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            "parquet files and hub datasets need the package `datasets`",
            hint="`pip install 'epctl[train]'`",
        ) from None
    return load_dataset(kind, streaming=True, **arguments)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no further word'}"
