"""Opens whatever a person names: a hub id, a model folder, a shard folder, a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from epctl.convert.manifest import moe_of_manifest, read_manifest
from epctl.convert.view import CheckpointView, Extent, TensorView, num_bytes, view_of_model
from epctl.errors import EpctlError, HubError, InputError
from epctl.hub import resolve
from epctl.hub_download import CODE_FILES, WEIGHT_FILES, download
from epctl.layout.names import unfold_name
from epctl.layout.safetensors import TensorEntry
from epctl.layout.source import CONFIG_NAME, parse_config, read_shard_header

MAX_CONFIG_BYTES = 32_000_000


def open_checkpoint(reference: str) -> CheckpointView:
    """Returns the view of a hub id, a folder or a shard folder.

    Raises InputError, LayoutError or HubError for what is missing, damaged or unsafe.
    """
    folder = Path(reference).expanduser()
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        return view_of_model(resolve(reference))
    return view_of_output(folder, manifest)


def with_weights(
    view: CheckpointView, output: Path | None = None, output_bytes: int = 0
) -> CheckpointView:
    """Returns `view` with its weights on this disk, downloading those of a hub model.

    Args:
        output: where `output_bytes` will be written; the disk must hold both.

    Raises HubError or ResourceError when they cannot be had.
    """
    if view.folder is not None:
        return view
    hint = f"`hf download {view.id}` on a machine with a network, then give the folder"
    if not view.file_sizes:
        raise HubError(
            f"the weights of `{view.id}` are not on this disk and the hub cannot be reached; "
            "only the bundled catalog knows the model",
            hint=f"{hint}; `--dry-run` works without weights",
        )
    folder = download(
        view.id,
        view.record["revision"],
        (*WEIGHT_FILES, *CODE_FILES, "LICENSE*", "*.md"),
        hint=hint,
        output=output,
        output_bytes=output_bytes,
    )
    for file, size in view.file_sizes.items():
        if (folder / file).stat().st_size != size:
            raise InputError(
                f"`{folder / file}` has {(folder / file).stat().st_size} bytes, the hub says {size}"
            )
    return replace(view, folder=folder)


def open_shards(reference: str) -> CheckpointView:
    """Returns the view of a shard folder that holds all ranks. Raises InputError otherwise."""
    folder = Path(reference).expanduser()
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or manifest["kind"] != "shard":
        raise InputError(
            f"`{reference}` is no shard folder: it has no manifest of `epctl convert shard`",
            hint="`epctl convert shard MODEL --ep N -o DIR` writes one",
        )
    view = view_of_output(folder, manifest)
    ranks, ep = view.options["ranks"], view.options["ep"]
    if len(ranks) != ep:
        raise InputError(
            f"`{reference}` holds rank {', '.join(map(str, ranks))} of {ep} only",
            hint="shard without `--rank` to have all of them in one folder",
        )
    return view


def view_of_output(folder: Path, manifest: Mapping[str, Any]) -> CheckpointView:
    """Returns the view of a folder that epctl wrote, checked against its files' headers.

    Raises InputError when a file is missing, or holds other tensors than the manifest says.
    """
    try:
        return _view(folder, manifest)
    except EpctlError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(
            f"the manifest of `{folder}` is damaged: {error!r}",
            hint="convert again from the source",
        ) from None


def _view(folder: Path, manifest: Mapping[str, Any]) -> CheckpointView:
    config = _read_config(folder)
    parts = _parts_by_name(folder, manifest)
    tensors = {
        name: _join_parts(name, entry, parts.get(name, []))
        for name, entry in manifest["tensors"].items()
    }
    experts = manifest.get("experts")
    return CheckpointView(
        id=str(folder),
        folder=folder,
        config=config,
        tensors=tensors,
        moe=moe_of_manifest(experts, "storage"),
        origin_moe=moe_of_manifest(experts, "origin_storage"),
        family=experts.get("family") if experts else None,
        origin=manifest.get("origin", {}),
        record=manifest["source"],
        file_sizes={path: entry["num_bytes"] for path, entry in manifest["files"].items()},
        dropped=_unfolded(manifest.get("dropped", ())),
        changed=_unfolded(manifest.get("changed", ())),
        options=manifest["options"],
        manifest=manifest,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(f"`{folder}` has no readable `{CONFIG_NAME}`")
    return parse_config(path.read_bytes(), file=str(path))


def _parts_by_name(
    folder: Path, manifest: Mapping[str, Any]
) -> dict[str, list[tuple[str, TensorEntry]]]:
    """Returns each tensor's parts in order of rank."""
    parts: dict[str, list[tuple[str, TensorEntry]]] = {}
    for path, stated in sorted(manifest["files"].items()):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise InputError(f"the manifest of `{folder}` names `{path}`, which is outside of it")
        if not (folder / path).is_file():
            raise InputError(
                f"`{folder / path}` is missing",
                hint="the folder was copied in part, or a rank's files lie on another node",
            )
        header = read_shard_header(folder / path)
        if header.file_size != stated["num_bytes"]:
            raise InputError(
                f"`{folder / path}` has {header.file_size} bytes, the manifest says "
                f"{stated['num_bytes']}"
            )
        for name, entry in header.tensors.items():
            parts.setdefault(name, []).append((path, entry))
    return parts


def _join_parts(
    name: str, stated: Mapping[str, Any], parts: list[tuple[str, TensorEntry]]
) -> TensorView:
    """Returns a tensor out of its ranks' parts; copies of a shared tensor count once."""
    if not parts:
        raise InputError(f"no file holds `{name}`, which the manifest lists")
    dtype, shape = stated["dtype"], tuple(stated["shape"])
    if "digests" in stated:
        # A folder of one rank holds that rank's experts only.
        rows = shape[0] // int(stated["num_experts"]) * len(stated["digests"])
        shape = (rows, *shape[1:])
    if parts[0][1].shape == shape:
        parts = parts[:1]
    extents = tuple(Extent(path, entry.start, entry.end) for path, entry in parts)
    held = sum(extent.num_bytes for extent in extents)
    if any(entry.dtype != dtype for _, entry in parts) or held != num_bytes(dtype, shape):
        raise InputError(
            f"`{name}` is {dtype} {list(shape)} in the manifest, which its "
            f"{len(parts)} parts in the files do not make up"
        )
    return TensorView(dtype, shape, extents)


def _unfolded(entries: Any) -> tuple[dict[str, str], ...]:
    return tuple(
        {**entry, "name": name} for entry in entries for name in unfold_name(entry["name"])
    )


def resolve_run(reference: str) -> str:
    """Returns the model folder that a run of `epctl train`, or one of its checkpoints, stands for.

    Of a run that is `RUN/model` once training ended, else its newest checkpoint's; anything else
    is returned as it is. Raises InputError for a checkpoint that was never finished.
    """
    folder = Path(reference).expanduser()
    if is_checkpoint(folder):
        from epctl.runtime.checkpoint_manifest import read_manifest as read_checkpoint

        read_checkpoint(folder)
        return str(folder / "model")
    if not (folder / "config.json").is_file() or (folder / "model.safetensors").exists():
        return reference
    finished = folder / "model"
    if (finished / CONFIG_NAME).is_file():
        return str(finished)
    if (folder / "checkpoints").is_dir():
        from epctl.runtime.run_checkpoints import newest_checkpoint

        return str(newest_checkpoint(folder) / "model")
    return reference


def is_checkpoint(folder: Path) -> bool:
    """True for a `step-N` folder of a run: a model beside the state that training goes on from."""
    return (folder / "model" / CONFIG_NAME).is_file() and (folder / "state").is_dir()
