"""Writes a Hugging Face folder from any ZeRO stage and EP size, each rank its own share.

Nothing appears under the final name before everything is written and synced: ranks write into
`<name>.tmp`, agree, rank 0 adds the index and renames. No rank holds more of the model than one
live tensor beside its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from epctl.convert.writer import sync_folder, write_synced
from epctl.errors import ResourceError
from epctl.layout.source import read_shard_header
from epctl.runtime import checkpoint_files
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.checkpoint_files import TensorWriter
from epctl.runtime.checkpoint_shares import (
    assign_writers,
    gathered_parameters,
    share_of,
    units_of,
)
from epctl.runtime.host_copy import bytes_on_host
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import hub_tensors
from epctl.runtime.run_checkpoints import replace_folder
from epctl.runtime.stored_tensors import values_of

INDEX_NAME = "model.safetensors.index.json"
# The tokenizer library wraps a full disk in safetensors' own exception.
DISK_ERRORS = (OSError, SafetensorError)


def save_model(
    model: nn.Module, mesh: Mesh, folder: Path, write_extras: Callable[[Path], None]
) -> int:
    """Writes `folder` as a Hugging Face model; returns its bytes. A collective.

    Args:
        write_extras: called on rank 0 with the staging folder, for config and tokenizer.

    Raises:
        ResourceError: the disk cannot hold it, or filled up; the staging folder is removed.
        Exception: whatever else a rank met; RuntimeError on the others, so that none waits.
    """
    staging = folder.with_name(folder.name + ".tmp")
    agree(mesh, staging, attempt(make_staging, staging) if mesh.rank == 0 else None)
    writer, failure = _write_share(model, mesh, staging)
    if mesh.rank == 0:
        failure = failure or attempt(write_extras, staging)
    parts = agree(mesh, staging, failure, (writer.index, writer.num_tensor_bytes))
    total: int = sum(num_bytes for _, num_bytes in parts)
    failure = None
    if mesh.rank == 0:
        failure = attempt(_publish, folder, staging, [index for index, _ in parts], total)
    agree(mesh, staging, failure)
    return total


def attempt(action: Callable[..., object], *arguments: object) -> Exception | None:
    """Returns what went wrong, so that the caller still enters the collectives that follow."""
    try:
        action(*arguments)
    except Exception as error:
        return error
    return None


def make_staging(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def agree(
    mesh: Mesh,
    staging: Path,
    failure: Exception | None,
    part: Any = None,
    group: dist.ProcessGroup | None = None,
) -> list[Any]:
    """Returns every rank's part, or raises on every rank if one of them failed. A collective."""
    reports: list[Any] = [None] * mesh.num_ranks
    dist.all_gather_object(reports, (part, _reason(failure, mesh.rank)), group=group)
    reasons = [reason for _, reason in reports if reason is not None]
    if not reasons:
        return [part for part, _ in reports]
    if mesh.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    if failure is not None and not isinstance(failure, DISK_ERRORS):
        raise failure
    others = [text for is_disk, text in reasons if not is_disk]
    if others:
        raise RuntimeError(f"checkpoint not written: {others[0]}")
    raise ResourceError(
        f"checkpoint not written: cannot write `{staging}`: {reasons[0][1]}",
        hint="free disk space or choose another folder with `--output`",
    )


def _reason(failure: Exception | None, rank: int) -> tuple[bool, str] | None:
    """Returns (a fault of the disk, its text), None without a failure."""
    if failure is None:
        return None
    text = getattr(failure, "strerror", None) or str(failure)
    is_disk = isinstance(failure, DISK_ERRORS)
    return is_disk, text if is_disk else f"rank {rank}: {type(failure).__name__}: {text}"


def _publish(folder: Path, staging: Path, indexes: list[Mapping[str, str]], num_bytes: int) -> None:
    write_index(staging, indexes, num_bytes)
    for path in staging.iterdir():
        sync_folder(path)
    sync_folder(staging)
    replace_folder(staging, folder)


def write_index(folder: Path, indexes: list[Mapping[str, str]], num_bytes: int) -> None:
    """Writes the index of a model whose shards lie in `folder`, after reading their headers."""
    weight_map = {name: file for index in indexes for name, file in index.items()}
    for file in sorted(set(weight_map.values())):
        read_shard_header(folder / file)  # what was written reads back
    document = {
        "metadata": {"total_size": num_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_synced(folder / INDEX_NAME, json.dumps(document, indent=1).encode())


def _write_share(
    model: nn.Module, mesh: Mesh, staging: Path
) -> tuple[TensorWriter, Exception | None]:
    """Writes this rank's share as it is gathered; returns the writer and what stopped it.

    Ranks that write a tensor elsewhere take part in gathering it. So does a rank that cannot write
    any more: the others would wait for it.
    """
    units = units_of(model)
    writers = assign_writers(units, mesh)
    share = share_of(units, writers, mesh.rank)
    writer = TensorWriter(staging, shard_stem(mesh.rank), share, checkpoint_files.SHARD_BYTES)
    failure: Exception | None = None
    for unit, rank in zip(units, writers, strict=True):
        with seams.full_parameters(gathered_parameters(unit)):
            for tensor in unit:
                values = values_of(tensor, mesh, rank)
                if rank == mesh.rank:
                    failure = failure or attempt(_add, writer, tensor.name, values)
    return writer, failure or attempt(writer.close)


def _add(writer: TensorWriter, name: str, values: list[Tensor]) -> None:
    writer.add(name, (bytes_on_host(value) for value in values))


def shard_stem(rank: int) -> str:
    return f"model-rank{rank:05d}"


def checkpoint_bytes(model: nn.Module, mesh: Mesh) -> int:
    """Returns the bytes of a whole checkpoint, experts of all ep ranks counted."""
    total = 0
    for tensor in hub_tensors(model):
        copies = mesh.ep_size if tensor.is_expert else 1
        total += copies * tensor.tensor.element_size() * tensor.num_elements
    return total
