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
from epctl.output import format_bytes
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import HubTensor, hub_tensors

SHARD_BYTES = 4 * 2**30
INDEX_NAME = "model.safetensors.index.json"


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
        write_state: called on every rank with the staging folder, for what a resume needs.

    Raises:
        ResourceError: the disk cannot hold it, or filled up; the staging folder is removed.
    """
    staging = folder.with_name(folder.name + ".tmp")
    if mesh.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    failure: str | None = None
    index: dict[str, str] = {}
    try:
        index = _write_shards(model, mesh, staging)
        if mesh.rank == 0:
            write_extras(staging)
        if write_state is not None:
            write_state(staging)
    except (OSError, SafetensorError) as error:  # safetensors wraps ENOSPC in its own exception
        failure = f"cannot write `{staging}`: {getattr(error, 'strerror', None) or error}"
    return _commit(folder, staging, mesh, index, failure)


def _commit(
    folder: Path, staging: Path, mesh: Mesh, index: dict[str, str], failure: str | None
) -> int:
    """All ranks agree, then rank 0 writes the index and renames; a failure removes the staging."""
    reports: list[Any] = [None] * mesh.num_ranks
    dist.all_gather_object(reports, (index, failure))
    failures = [text for _, text in reports if text is not None]
    num_bytes = [0]
    if mesh.rank == 0 and not failures:
        try:
            num_bytes[0] = _publish(folder, staging, [part for part, _ in reports])
        except OSError as error:
            failures.append(f"cannot publish `{folder}`: {error.strerror or error}")
    outcome: list[Any] = [failures, num_bytes[0]]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        if mesh.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise ResourceError(
            f"checkpoint not written: {outcome[0][0]}",
            hint="free disk space or choose another folder with `--output`",
        )
    return int(outcome[1])


def _publish(folder: Path, staging: Path, indexes: list[dict[str, str]]) -> int:
    weight_map = {name: file for index in indexes for name, file in index.items()}
    files = sorted(set(weight_map.values()))
    headers = [read_shard_header(staging / file) for file in files]
    total = sum(entry.num_bytes for header in headers for entry in header.tensors.values())
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (staging / INDEX_NAME).write_text(json.dumps(document, indent=1), encoding="utf-8")
    for path in staging.iterdir():
        sync_path(path)
    sync_path(staging)
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)
    sync_path(folder.parent)
    return total


def _write_shards(model: nn.Module, mesh: Mesh, staging: Path) -> dict[str, str]:
    """Writes this rank's share and returns tensor name -> file.

    Rank 0 writes the dense part, and of each ep group's copies the first edp rank its experts;
    the others take part in gathering only.
    """
    index: dict[str, str] = {}
    writer = _ShardWriter(staging, f"model-rank{mesh.rank:05d}", index)
    for unit in _units(model):
        with seams.full_parameters(list(_parameters(unit))):
            for tensor in unit:
                writes = mesh.edp_rank == 0 if tensor.is_expert else mesh.rank == 0
                if writes:
                    writer.add(tensor.name, tensor.local())
    writer.flush()
    return index


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
        self.num_files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(t.nbytes for t in self.pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        self.num_files += 1
        file = f"{self.stem}-{self.num_files:05d}.safetensors"
        write_safetensors(self.folder / file, self.pending)
        self.index.update(dict.fromkeys(self.pending, file))
        self.pending = {}


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


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raises ResourceError if `folder`'s disk has less than `num_bytes` free, plus a twentieth."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    needed = num_bytes + num_bytes // 20
    if free < needed:
        raise ResourceError(
            f"the final checkpoint needs {format_bytes(needed)}, "
            f"`{existing}` has {format_bytes(free)} free",
            hint="choose another disk with `--output`, or `--set run.save=false`",
        )


def checkpoint_bytes(model: nn.Module, mesh: Mesh) -> int:
    """Returns the bytes of a whole checkpoint, experts of all ep ranks counted."""
    total = 0
    for tensor in hub_tensors(model):
        copies = mesh.ep_size if tensor.is_expert else 1
        total += copies * tensor.tensor.element_size() * tensor.num_elements
    return total
