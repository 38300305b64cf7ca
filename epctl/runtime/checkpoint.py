"""Writes a Hugging Face folder from any ZeRO stage and EP size, each rank its own experts.

Nothing appears under the final name before everything is written and synced: ranks write into
`<name>.tmp`, agree, rank 0 adds the index and renames.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from epctl.errors import ResourceError
from epctl.layout.source import read_shard_header
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import HubTensor, hub_tensors

SHARD_BYTES = 4 * 2**30
INDEX_NAME = "model.safetensors.index.json"
# safetensors wraps a full disk in its own exception.
DISK_ERRORS = (OSError, SafetensorError)


def save_model(
    model: nn.Module,
    mesh: Mesh,
    folder: Path,
    write_extras: Callable[[Path], None],
    write_state: Callable[[Path], None] | None = None,
) -> int:
    """Writes `folder` as a Hugging Face model; returns its bytes. A collective.

    Args:
        write_extras: called on rank 0 with the staging folder, for config and tokenizer.
        write_state: called on every rank with the staging folder, for what a resume needs;
            holds no collective, since it is left out where writing failed before.

    Raises:
        ResourceError: the disk cannot hold it, or filled up; the staging folder is removed.
        Exception: whatever else a rank met; RuntimeError on the others, so that none waits.
    """
    staging = folder.with_name(folder.name + ".tmp")
    _agree(mesh, staging, _attempt(_make_staging, staging) if mesh.rank == 0 else None)
    index, num_bytes, failure = _write_shards(model, mesh, staging)
    if mesh.rank == 0:
        failure = failure or _attempt(write_extras, staging)
    if write_state is not None:
        failure = failure or _attempt(write_state, staging)
    parts = _agree(mesh, staging, failure, (index, num_bytes))
    total = sum(part_bytes for _, part_bytes in parts)
    indexes = [part for part, _ in parts]
    published = _attempt(_publish, folder, staging, indexes, total) if mesh.rank == 0 else None
    _agree(mesh, staging, published)
    return total


def _attempt(action: Callable[..., object], *arguments: object) -> Exception | None:
    """Returns what went wrong, so that the caller still enters the collectives that follow."""
    try:
        action(*arguments)
    except Exception as error:
        return error
    return None


def _make_staging(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def _agree(
    mesh: Mesh, staging: Path, failure: Exception | None, part: tuple[dict[str, str], int] = ({}, 0)
) -> list[tuple[dict[str, str], int]]:
    """Returns every rank's part, or raises on every rank if one of them failed. A collective."""
    reports: list[Any] = [None] * mesh.num_ranks
    dist.all_gather_object(reports, (part, _reason(failure, mesh.rank)))
    reasons = [reason for _, reason in reports if reason is not None]
    if not reasons:
        return [part for part, _ in reports]
    if mesh.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    if failure is not None and not isinstance(failure, DISK_ERRORS):
        raise failure
    is_disk, text = reasons[0]
    if not is_disk:
        raise RuntimeError(f"checkpoint not written: {text}")
    raise ResourceError(
        f"checkpoint not written: cannot write `{staging}`: {text}",
        hint="free disk space or choose another folder with `--output`",
    )


def _reason(failure: Exception | None, rank: int) -> tuple[bool, str] | None:
    """Returns (a fault of the disk, its text), None without a failure."""
    if failure is None:
        return None
    text = getattr(failure, "strerror", None) or str(failure)
    is_disk = isinstance(failure, DISK_ERRORS)
    return is_disk, text if is_disk else f"rank {rank}: {type(failure).__name__}: {text}"


def _publish(folder: Path, staging: Path, indexes: list[dict[str, str]], total: int) -> None:
    """Writes the index, syncs everything and gives the folder its final name."""
    weight_map = {name: file for index in indexes for name, file in index.items()}
    for file in sorted(set(weight_map.values())):
        read_shard_header(staging / file)  # what was written reads back
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (staging / INDEX_NAME).write_text(json.dumps(document, indent=1), encoding="utf-8")
    for path in staging.iterdir():
        sync_path(path)
    sync_path(staging)
    replace_folder(staging, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; what stood there goes only when the new one has its place.

    A kill in between leaves the earlier folder as `<name>.old`.
    """
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(
    model: nn.Module, mesh: Mesh, staging: Path
) -> tuple[dict[str, str], int, Exception | None]:
    """Writes this rank's share; returns tensor name -> file, bytes, and what stopped the writing.

    Rank 0 writes the dense part, and of each ep group's copies the first edp rank its experts;
    the others take part in gathering only. So does a rank that cannot write any more: the others
    would wait for it.
    """
    index: dict[str, str] = {}
    writer = _ShardWriter(staging, f"model-rank{mesh.rank:05d}", index)
    failure: Exception | None = None
    for unit in _units(model):
        writes = mesh.edp_rank == 0 if unit[0].is_expert else mesh.rank == 0
        with seams.full_parameters(list(_parameters(unit))):
            if writes and failure is None:
                failure = _attempt(writer.add_all, unit)
    failure = failure or _attempt(writer.flush)
    return index, writer.num_bytes, failure


def _units(model: nn.Module) -> Iterator[list[HubTensor]]:
    """Groups the checkpoint tensors by the live Parameter they come from: gathered one by one."""
    unit: list[HubTensor] = []
    for tensor in hub_tensors(model):
        if unit and tensor.tensor is not unit[0].tensor:
            yield unit
            unit = []
        unit.append(tensor)
    if unit:
        yield unit


def _parameters(unit: list[HubTensor]) -> Iterator[nn.Parameter]:
    if isinstance(unit[0].tensor, nn.Parameter):
        yield unit[0].tensor


class _ShardWriter:
    """Collects tensors on the host and writes a safetensors file whenever enough are there."""

    def __init__(self, folder: Path, stem: str, index: dict[str, str]) -> None:
        self.folder = folder
        self.stem = stem
        self.index = index
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.num_bytes = 0
        self.num_files = 0

    def add_all(self, unit: list[HubTensor]) -> None:
        for tensor in unit:
            self.add(tensor.name, tensor.local())

    def add(self, name: str, tensor: Tensor) -> None:
        self.pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.pending_bytes += tensor.nbytes
        self.num_bytes += tensor.nbytes
        if self.pending_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        self.num_files += 1
        file = f"{self.stem}-{self.num_files:05d}.safetensors"
        write_safetensors(self.folder / file, self.pending)
        self.index.update(dict.fromkeys(self.pending, file))
        self.pending, self.pending_bytes = {}, 0


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes host tensors and syncs; its mode follows the umask (safetensors leaves 0600)."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    os.chmod(path, 0o666 & ~_umask())
    sync_path(path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def sync_path(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_bytes(model: nn.Module, mesh: Mesh) -> int:
    """Returns the bytes of a whole checkpoint, experts of all ep ranks counted."""
    total = 0
    for tensor in hub_tensors(model):
        copies = mesh.ep_size if tensor.is_expert else 1
        total += copies * tensor.tensor.element_size() * tensor.num_elements
    return total
