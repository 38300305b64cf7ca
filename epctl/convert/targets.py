"""Which storage an output has: as in the checkpoint, as transformers 5 holds it, or as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from epctl.convert.view import CheckpointView
from epctl.errors import LayoutError
from epctl.layout.families import FamilyNames, load_families
from epctl.layout.model import ExpertStorage, MoELayout, StorageKind

StorageChoice = Literal["checkpoint", "fused", "origin"]
DtypeChoice = Literal["keep", "bf16"]
KNOWN_QUANTIZATION = (None, "fp8_block", "mxfp4")


def target_layout(
    view: CheckpointView, storage: StorageChoice, dtype: DtypeChoice
) -> MoELayout | None:
    """Returns the experts' layout in the output, None for a dense model.

    Raises LayoutError for storage that cannot be rewritten.
    """
    moe = view.moe
    if moe is None:
        return None
    if storage == "origin" and view.origin_moe is not None:
        target = view.origin_moe.storage
    elif storage == "fused":
        target = _module_storage(view, moe)
    else:
        target = moe.storage
    if dtype == "bf16":
        target = dequantized(target)
    _check(moe.storage, target)
    return replace(moe, storage=target)


def dequantized(storage: ExpertStorage) -> ExpertStorage:
    """Returns the storage after its quantised weights became bfloat16."""
    if storage.quantization not in KNOWN_QUANTIZATION:
        raise LayoutError(
            f"experts are stored as {storage.label}; only fp8_block and mxfp4 can be dequantised",
            hint="use `--dtype keep`, or the unquantised checkpoint",
        )
    names, transposed = dict(storage.names), storage.transposed
    if storage.quantization == "mxfp4":
        # Packed along the input of each [out, in] matrix; the bfloat16 form of the same model
        # stores [in, out].
        names = {key: name.removesuffix("_blocks") for key, name in names.items()}
        transposed = True
    return replace(
        storage,
        names=names,
        transposed=transposed,
        scales={},
        quantization=None,
        block_size=None,
        dtype="BF16",
    )


def _module_storage(view: CheckpointView, moe: MoELayout) -> ExpertStorage:
    """Returns the storage of transformers 5's module, or the checkpoint's where it is the same."""
    storage = moe.storage
    family = load_families().get(view.family or "")
    entries = [entry for entry in family.names if entry.naming == "module"] if family else []
    if entries:
        return _with_scales(storage, _from_names(storage, entries[0]))
    if storage.kind != "per_expert":
        return storage
    head = storage.names["down"].partition("{expert}")[0]
    fused = "gate_up" if storage.gated else "up"
    names = {fused: f"{head}{fused}_proj", "down": f"{head}down_proj"}
    kind: StorageKind = "fused" if storage.gated else "stacked"
    return _with_scales(storage, replace(storage, kind=kind, names=names, scales={}, biases={}))


def _from_names(storage: ExpertStorage, entry: FamilyNames) -> ExpertStorage:
    kind: StorageKind = "fused" if "gate_up" in entry.experts else "stacked"
    if "{expert}" in entry.experts["down"]:
        kind = "per_expert"
    elif entry.flat_rows:
        kind = "flat_rows"
    return ExpertStorage(
        kind=kind,
        names=dict(entry.experts),
        transposed=bool(entry.transposed),
        interleaved=entry.interleaved,
        biases=dict(entry.biases) if storage.biases else {},
        quantization=storage.quantization,
        block_size=storage.block_size,
        dtype=storage.dtype,
    )


def _with_scales(source: ExpertStorage, target: ExpertStorage) -> ExpertStorage:
    """Adds the scales' names that transformers gives them beside a fused weight."""
    if not source.scales:
        return target
    if target.kind == "per_expert":
        return replace(target, scales=source.scales)
    return replace(target, scales={key: f"{name}_scale_inv" for key, name in target.names.items()})


def same_arrangement(one: ExpertStorage, other: ExpertStorage) -> bool:
    """True when tensors of the two differ in name at most."""
    return (
        one.kind == other.kind
        and set(one.names) == set(other.names)
        and one.transposed == other.transposed
        and one.interleaved == other.interleaved
        and one.quantization == other.quantization
    )


def _check(source: ExpertStorage, target: ExpertStorage) -> None:
    """Raises LayoutError where rewriting would need what is not known."""
    if same_arrangement(source, target):
        return
    if source.quantization not in KNOWN_QUANTIZATION:
        raise LayoutError(
            f"experts stored as {source.label} cannot be rewritten, only copied",
            hint="use `--storage checkpoint --dtype keep`",
        )
    if target.quantization == "mxfp4":
        raise LayoutError(
            "packed MXFP4 experts have no other storage than the checkpoint's",
            hint="use `--storage checkpoint`, or `--dtype bf16` to dequantise them",
        )
    if source.biases and (
        set(source.biases) != set(target.biases) or source.interleaved != target.interleaved
    ):
        raise LayoutError(
            f"experts stored as {source.label} have biases {sorted(source.biases)}, which the "
            f"storage {target.label} does not keep",
            hint="use `--storage checkpoint`",
        )
    if target.quantization == "fp8_block" and source.kind != target.kind:
        _check_scales_can_fuse(source)


def _check_scales_can_fuse(source: ExpertStorage) -> None:
    if source.block_size is None:
        raise LayoutError(
            "the FP8 scales of these experts do not cover blocks, so they cannot be fused",
            hint="use `--dtype bf16` to dequantise them first",
        )
