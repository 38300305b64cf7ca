"""The journal of a conversion: what was asked, and which files are whole on the disk.

One JSON line each, synced before the next file begins to count. A line that a kill cut short is
the last one and is ignored: its file is simply written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epctl import __version__
from epctl.errors import ConfigError, InputError

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Request:
    """What a conversion was asked to do, as far as a resumed one must agree with it."""

    options: Mapping[str, Any]
    source_id: str
    source_identity: str
    plan_digest: str
    version: str = __version__

    def document(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "options": dict(self.options),
            "source_id": self.source_id,
            "source_identity": self.source_identity,
            "plan_digest": self.plan_digest,
        }


class Journal:
    """An append-only file of finished work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: dict[str, list[str]] = {}

    def open(self, request: Request) -> bool:
        """Reads what an earlier run finished, or starts; returns whether there was one.

        Raises ConfigError if that run had other options, InputError if its source was another or
        has changed.
        """
        lines = self._lines()
        if not lines:
            self.path.unlink(missing_ok=True)
            self._append(request.document())
            return False
        _require_same(lines[0], request, self.path.parent)
        for line in lines[1:]:
            self.finished[line["file"]] = line["digests"]
        return True

    def finish(self, file: str, digests: list[str]) -> None:
        """Records that `file` is whole and synced; `digests` are its blocks' in order."""
        self.finished[file] = digests
        self._append({"file": file, "digests": digests})

    def _lines(self) -> list[dict[str, Any]]:
        try:
            texts = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"`{self.path}` cannot be read: {error.strerror}") from None
        found = []
        # What follows the last newline was cut short by a kill.
        for text in texts[:-1]:
            try:
                found.append(json.loads(text))
            except ValueError:
                break
        # So that the next line does not grow onto half a one.
        if found and texts[-1]:
            os.truncate(self.path, sum(len(text) + 1 for text in texts[: len(found)]))
        return found

    def _append(self, document: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(document).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _require_same(started: Mapping[str, Any], request: Request, folder: Path) -> None:
    """Raises unless an interrupted run was asked the same of the same source."""
    hint = f"repeat the earlier command to resume, or remove `{folder}` to start over"
    asked = request.document()
    differences = [
        f"{key} was {started.get('options', {}).get(key)!r}, now {value!r}"
        for key, value in asked["options"].items()
        if started.get("options", {}).get(key) != value
    ]
    if differences:
        raise ConfigError(
            f"`{folder}` holds an interrupted conversion with other options: "
            + "; ".join(differences),
            hint=hint,
        )
    if started.get("source_id") != asked["source_id"]:
        raise InputError(
            f"`{folder}` holds an interrupted conversion of `{started.get('source_id')}`, "
            f"not of `{asked['source_id']}`",
            hint=hint,
        )
    if started.get("source_identity") != asked["source_identity"]:
        raise InputError(
            f"`{asked['source_id']}` has changed since the interrupted conversion in `{folder}` "
            "began: a file has another size, time or header",
            hint=f"remove `{folder}` to start over from the files as they are now",
        )
    if (started.get("version"), started.get("plan_digest")) != (
        asked["version"],
        asked["plan_digest"],
    ):
        raise ConfigError(
            f"`{folder}` was begun by epctl {started.get('version')}, which planned other files",
            hint=hint,
        )
