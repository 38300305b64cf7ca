"""What each command converts: from a view and options to an OutputPlan. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from epctl.convert.plan import (
    MAX_FILE_BYTES,
    OutputPlan,
    plan_model,
    plan_shards,
    require_legal_ep,
)
from epctl.convert.restate import Restated, reordered, restate
from epctl.convert.targets import DtypeChoice, StorageChoice
from epctl.convert.view import CheckpointView
from epctl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """The options of `epctl convert shard`; `rank` None writes every rank."""

    ep: int
    storage: StorageChoice = "checkpoint"
    dtype: DtypeChoice = "keep"
    replicate: bool = False
    rank: int | None = None


def plan_shard_folder(
    view: CheckpointView, options: ShardOptions, max_file_bytes: int = MAX_FILE_BYTES
) -> OutputPlan:
    """Returns the plan of a shard folder.

    Raises ConfigError for an `ep` or `rank` that the model does not allow, LayoutError for a
    storage or dtype that it cannot be brought into.
    """
    require_legal_ep(view.moe, options.ep)
    if options.rank is not None and not 0 <= options.rank < options.ep:
        raise ConfigError(f"`--rank` is {options.rank}; `--ep {options.ep}` has 0 to "
                          f"{options.ep - 1}")  # fmt: skip
    restated = restate(view, options.storage, options.dtype)
    ranks = tuple(range(options.ep)) if options.rank is None else (options.rank,)
    files, indexes = plan_shards(
        restated, options.ep, ranks, replicate=options.replicate, max_file_bytes=max_file_bytes
    )
    asked = {
        "ep": options.ep,
        "storage": options.storage,
        "dtype": options.dtype,
        "replicate": options.replicate,
        "ranks": list(ranks),
    }
    origin = origin_of(view, options.dtype)
    return OutputPlan(
        kind="shard",
        options=asked,
        files=files,
        indexes=indexes,
        tensors=restated.tensors,
        moe=restated.moe,
        ranks=ranks,
        dropped=restated.dropped,
        changed=restated.changed,
        origin=origin.files,
        origin_moe=origin.restated.moe,
        family=view.family,
    )


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that a merge restores: tensors in their order, the file of each."""

    restated: Restated
    files: dict[str, str]


def origin_of(view: CheckpointView, dtype: DtypeChoice) -> Origin:
    """Returns the view as its first source stored it (dequantised where `dtype` says so)."""
    restated = restate(view, "origin", dtype)
    files = {}
    for tensor in restated.tensors:
        known = view.origin.get(tensor.name)
        files[tensor.name] = known if known is not None else _first_file(view, tensor.blocks[0])
    ordered = reordered(restated, view.origin)
    return Origin(ordered, {tensor.name: files[tensor.name] for tensor in ordered.tensors})


def _first_file(view: CheckpointView, block: Any) -> str:
    """Returns the source file that a new tensor (a dequantised one) comes from."""
    piece = block.pieces[0]
    extents = piece.matrices[0].extents if hasattr(piece, "matrices") else piece.extents
    return str(extents[0].file) if extents else next(iter(view.origin.values()))


def plan_reshard(view: CheckpointView, ep: int) -> OutputPlan:
    """Returns the plan of a shard folder at another size; storage and dtype stay as they are."""
    told = view.options
    plan = plan_shard_folder(
        view, ShardOptions(ep, storage="checkpoint", dtype="keep", replicate=told["replicate"])
    )
    # The result is what sharding the source at this size gives, so it says the same of itself.
    options = {**plan.options, "storage": told["storage"], "dtype": told["dtype"]}
    return replace(plan, options=options)


def plan_folder(
    view: CheckpointView,
    storage: StorageChoice,
    dtype: DtypeChoice,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> OutputPlan:
    """Returns the plan of one Hugging Face folder, in the source's own files where names allow."""
    origin = origin_of(view, dtype)
    restated = origin.restated if storage == "origin" else restate(view, storage, dtype)
    files, indexes = plan_model(
        restated, origin.files if storage == "origin" else view.origin, max_file_bytes
    )
    return OutputPlan(
        kind="model",
        options={"storage": storage, "dtype": dtype},
        files=files,
        indexes=indexes,
        tensors=restated.tensors,
        moe=restated.moe,
        ranks=(),
        dropped=restated.dropped,
        changed=restated.changed,
        origin=origin.files,
        origin_moe=origin.restated.moe,
        family=view.family,
    )
