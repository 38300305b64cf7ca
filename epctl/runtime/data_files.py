"""Finds training records: text, jsonl and parquet files, folders, globs, or a hub dataset.

Text and jsonl are read here, line by line, so that an error names file and line; parquet files
are streamed by `datasets`, and hub datasets are in data_hub.py. Nothing is read whole except a text
file.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from epctl.errors import InputError
from epctl.launch.dataset_reference import PinnedDataset


class Record(NamedTuple):
    """A record, where it stands (for messages), and what paths in it are relative to."""

    where: str
    values: Mapping[str, Any]
    folder: Path | None = None


NumberedRecord = tuple[int, Record]

TEXT_KEY = "text"
JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson"})
# What a folder is searched for; a file named directly may have any name.
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp"})
PROBE_BYTES = 8192


class RecordSource(Protocol):
    """Records in lanes: pieces that can be read independently of each other, in a fixed order."""

    in_part: bool  # a run of known length reads no more than it needs

    @property
    def num_lanes(self) -> int: ...

    def records(self, lane: int = 0, first: int = 0, step: int = 1) -> Iterator[NumberedRecord]:
        """Yields records `first`, `first + step` and so on of a lane, with their numbers in it."""


@dataclass(frozen=True)
class FileRecords:
    """Local files, one lane, in the order given."""

    files: tuple[Path, ...]
    text_key: str = TEXT_KEY
    in_part = False
    num_lanes = 1

    def records(self, lane: int = 0, first: int = 0, step: int = 1) -> Iterator[NumberedRecord]:
        """Yields records `first`, `first + step` and so on, with their numbers."""
        number = 0
        for path in self.files:
            for record in _file_records(path, self.text_key):
                if number >= first and (number - first) % step == 0:
                    yield number, record._replace(folder=path.parent)
                number += 1


def find_records(
    patterns: Sequence[str], text_key: str = TEXT_KEY, dataset: PinnedDataset | None = None
) -> RecordSource:
    """Returns what `patterns` name: local files, or `dataset` when they name a hub dataset.

    Raises InputError for a pattern without files, an empty or a binary file.
    """
    if dataset is not None:
        from epctl.runtime.data_hub import HubRecords

        return HubRecords(dataset)
    files = [path for pattern in patterns for path in _expand(pattern)]
    for path in files:
        _check_file(path)
    return FileRecords(tuple(dict.fromkeys(files)), text_key)


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
            what,
            hint="`--data` takes files, folders, globs or a hub dataset "
            "`org/name[:config][@revision]`",
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
        yield Record(f"`{path}`", {text_key: _read_text(path)})


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
        where = f"`{path}` record {number}"
        yield Record(where, _mapping(where, value))


def _checked(where: str, line: bytes) -> Record:
    try:
        return Record(where, _mapping(where, json.loads(line)))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is a JSON {type(value).__name__}, not an object")
    return value


def _parquet_records(path: Path) -> Iterator[Record]:
    from epctl.runtime.data_hub import load

    try:
        rows = load("parquet", data_files=str(path), split="train", streaming=True)
        for number, record in enumerate(rows, start=1):
            yield Record(f"`{path}` row {number}", record)
    except InputError:
        raise
    except Exception as error:  # `datasets` and pyarrow have many, of no common base
        raise InputError(f"`{path}` cannot be read as parquet: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Returns an error's class and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no further word'}"
