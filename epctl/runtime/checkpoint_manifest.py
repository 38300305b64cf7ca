"""`manifest.json` of a checkpoint: what commits it, and what it is held against. No torch.

It lists every file with size and SHA-256, and is the last thing written into the folder. A folder
whose manifest is missing or does not describe its files is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from epctl import __version__
from epctl.errors import InputError
from epctl.layout.safetensors import parse_json_object

MANIFEST_NAME = "manifest.json"
FORMAT = "epctl-checkpoint"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 28
READ_BYTES = 16 * 2**20
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Topology:
    """How a run is spread over ranks."""

    num_ranks: int
    ep: int
    zero: int

    def __str__(self) -> str:
        return f"{self.num_ranks} ranks, ep {self.ep}, ZeRO-{self.zero}"


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's manifest, its fields checked."""

    step: int
    topology: Topology
    files: Mapping[str, FileRecord]
    document: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.files.values())


def manifest_document(
    step: int,
    topology: Topology,
    model: Mapping[str, Any],
    files: Mapping[str, FileRecord],
    **facts: Any,
) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Args:
        model: name, revision (the SHA on the hub, if it came from there), dtype.
        files: by path inside the checkpoint's folder.
    """
    listed = {path: asdict(files[path]) for path in sorted(files)}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "topology": asdict(topology),
        "model": dict(model),
        **facts,
        "versions": {"epctl": __version__, "python": platform.python_version()} | _versions(),
        "digest": digest_of_files(files),
        "files": listed,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def digest_of_files(files: Mapping[str, FileRecord]) -> str:
    """Returns one digest over all paths, sizes and digests."""
    lines = (f"{path} {files[path].num_bytes} {files[path].sha256}\n" for path in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Returns a checkpoint's manifest; raises InputError saying why the folder is none.

    Sizes of files are compared, their bytes are not read.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise InputError(f"`{path}` is larger than any manifest")
        document = parse_json_object(path.read_bytes(), file=str(path), what="the manifest")
    except FileNotFoundError:
        raise InputError(f"`{folder}` has no {MANIFEST_NAME}: it was never finished") from None
    except OSError as error:
        raise InputError(f"`{path}` cannot be read: {error.strerror}") from None
    manifest = _checked(document, path)
    for name, record in manifest.files.items():
        _require_size(folder / name, record)
    return manifest


def _checked(document: dict[str, Any], path: Path) -> Manifest:
    try:
        if (document["format"], document["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise InputError(
                f"`{path}` is of format {document['format']} {document['format_version']}, "
                f"this epctl reads {FORMAT} {FORMAT_VERSION}"
            )
        files = {name: FileRecord(**record) for name, record in document["files"].items()}
        manifest = Manifest(
            int(document["step"]), Topology(**document["topology"]), files, document
        )
        digest = digest_of_files(files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"`{path}` is damaged: {error!r}") from None
    unsafe = [n for n in files if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
    if unsafe:
        raise InputError(f"`{path}` names `{unsafe[0]}`, which is outside of its folder")
    if digest != document.get("digest"):
        raise InputError(f"`{path}` is damaged: its files do not give its own digest")
    return manifest


def _require_size(path: Path, record: FileRecord) -> None:
    try:
        num_bytes = path.stat().st_size
    except OSError:
        raise InputError(f"`{path}` is missing") from None
    if num_bytes != record.num_bytes:
        raise InputError(f"`{path}` has {num_bytes} bytes, the manifest says {record.num_bytes}")


def record_of(path: Path) -> FileRecord:
    """Reads a file and returns its size and digest."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileRecord(num_bytes, digest.hexdigest())


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """Reads the named files and returns what is wrong with the first damaged one."""
    for name in names:
        try:
            found = record_of(folder / name)
        except OSError as error:
            return f"`{folder / name}` cannot be read: {error.strerror}"
        wanted = manifest.files[name]
        if found != wanted:
            return (
                f"`{folder / name}` has SHA-256 {found.sha256[:12]} where the manifest says "
                f"{wanted.sha256[:12]}"
            )
    return None


def manifest_text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
