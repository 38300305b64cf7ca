"""`epctl convert verify`: two checkpoints tensor by tensor, or one output against its manifest.

Whatever the storage on either side, both are read as the checkpoint that they were made from, so
a shard folder can be held against its source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from epctl.convert.execute import Reader, arithmetic, block_chunks
from epctl.convert.jobs import origin_of
from epctl.convert.manifest import digests_of, whole_digest
from epctl.convert.plan import rank_folder
from epctl.convert.recipes import Block, LogicalTensor
from epctl.convert.view import CheckpointView, Extent, cut
from epctl.errors import InputError
from epctl.layout.model import MoELayout
from epctl.layout.safetensors import DTYPE_BITS
from epctl.layout.source import read_shard_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_WORKERS = 3
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor (of one expert) that differs, and how."""

    name: str
    expert: int | None
    what: str

    @property
    def text(self) -> str:
        where = f"`{self.name}`" + (f" expert {self.expert}" if self.expert is not None else "")
        return f"{where}: {self.what}"


@dataclass(frozen=True)
class Verdict:
    """What a verification found; `notes` tell what was allowed for."""

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()


def check_digests(view: CheckpointView, advance: Progress) -> Verdict:
    """Reads every byte of an output and compares it with its manifest's digests.

    Raises InputError if the folder has no manifest, or files that its manifest does not describe.
    """
    manifest = view.manifest
    if manifest is None:
        raise InputError(
            f"`{view.id}` has no manifest of `epctl convert` to check it against",
            hint="give the checkpoint to compare it with: `epctl convert verify A B`",
        )
    differences: list[Difference] = []
    if whole_digest(manifest["tensors"]) != manifest.get("digest"):
        differences.append(
            Difference("manifest.json", None, "its digests do not give its digest of the whole")
        )
    with Reader(view) as reader, ThreadPoolExecutor(NUM_WORKERS) as pool:
        for found in pool.map(
            lambda file: _check_file(view, manifest, reader, file, advance), manifest["files"]
        ):
            differences += found
    num_bytes = sum(entry["num_bytes"] for entry in manifest["files"].values())
    return Verdict(len(manifest["tensors"]), num_bytes, tuple(differences))


def _check_file(
    view: CheckpointView,
    manifest: Mapping[str, Any],
    reader: Reader,
    file: str,
    advance: Progress,
) -> list[Difference]:
    differences = []
    for name, entry in read_shard_header(view.path(file)).tensors.items():
        stated = manifest["tensors"].get(name)
        if stated is None:
            raise InputError(f"`{file}` holds `{name}`, which the manifest does not list")
        experts = _experts_of_part(manifest, file, stated)
        digests = digests_of(stated)
        size = entry.num_bytes // max(1, len(experts))
        extents = (Extent(file, entry.start, entry.end),)
        for position, expert in enumerate(experts):
            told = hashlib.sha256()
            for chunk in reader.chunks(cut(extents, position * size, (position + 1) * size)):
                told.update(chunk)
                advance(len(chunk))
            if told.hexdigest() != digests.get(expert):
                what = f"bytes in `{file}` do not have the digest that the manifest states"
                differences.append(Difference(name, expert, what))
    return differences


def _experts_of_part(
    manifest: Mapping[str, Any], file: str, stated: Mapping[str, Any]
) -> list[int | None]:
    """Returns the global ids of the experts that a file holds of a tensor, in order."""
    if "digests" not in stated:
        return [stated.get("expert")]
    folder = file.partition("/")[0]
    for entry in manifest["placement"]:
        if entry["folder"] == folder == rank_folder(entry["rank"]):
            first, end = entry["experts"][str(stated["layer"])]
            return [*range(first, end)]
    return [*sorted(int(expert) for expert in stated["digests"])]


def compare(
    one: CheckpointView, other: CheckpointView, tolerance: float | None, advance: Progress
) -> Verdict:
    """Compares two checkpoints: bit by bit, or by value with a tolerance.

    `tolerance` is relative to the largest value of a tensor: |a - b| <= tolerance * max |b|.
    Stale tensors, and those that a manifest lists as dropped, are not missed.
    """
    left, right, notes = _common_tensors(one, other)
    differences = [
        Difference(name, None, f"only in `{view.id}`")
        for here, there, view in ((left, right, one), (right, left, other))
        for name in here
        if name not in there
    ]
    both = [name for name in left if name in right]
    num_bytes = 0
    with Reader(one) as left_reader, Reader(other) as right_reader:
        for name in both:
            a, b = left[name], right[name]
            num_bytes += a.num_bytes
            differences += _compare_tensor(left_reader, a, right_reader, b, tolerance)
            advance(a.num_bytes)
    return Verdict(len(both), num_bytes, tuple(differences), tuple(notes))


def _common_tensors(
    one: CheckpointView, other: CheckpointView
) -> tuple[dict[str, LogicalTensor], dict[str, LogicalTensor], list[str]]:
    """Returns the tensors of both in one storage and, if one was dequantised, one dtype."""
    notes = []
    converted = [view.options.get("dtype") == "bf16" for view in (one, other)]
    dtype = "bf16" if converted[0] != converted[1] else "keep"
    if dtype == "bf16":
        notes.append("one side was written with `--dtype bf16`; the other is read the same way")
    left = origin_of(one, dtype).restated  # type: ignore[arg-type]
    other = _in_storage_of(left.moe, other, notes)
    right = origin_of(other, dtype).restated  # type: ignore[arg-type]
    return _named(left.tensors), _named(right.tensors), notes


def _named(tensors: tuple[LogicalTensor, ...]) -> dict[str, LogicalTensor]:
    return {tensor.name: tensor for tensor in tensors}


def _in_storage_of(moe: MoELayout | None, view: CheckpointView, notes: list[str]) -> CheckpointView:
    """Returns the view with its experts to be restored in the storage of `moe`."""
    mine = view.origin_moe
    if moe is None or mine is None or mine.storage.quantization is not None:
        return view
    if moe.storage.quantization is None and dict(moe.storage.names) != dict(mine.storage.names):
        notes.append(f"experts stored as {mine.storage.label} are read as {moe.storage.label}")
        return replace(view, origin_moe=replace(mine, storage=moe.storage))
    return view


def _compare_tensor(
    left: Reader, a: LogicalTensor, right: Reader, b: LogicalTensor, tolerance: float | None
) -> Iterator[Difference]:
    if a.shape != b.shape or (a.dtype != b.dtype and tolerance is None):
        shapes = f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
        yield Difference(a.name, a.expert, shapes)
        return
    blocks_a, blocks_b = _matching_blocks(a, b)
    for one, other in zip(blocks_a, blocks_b, strict=True):
        expert = one.expert if one.expert is not None else a.expert
        what: str | None
        if tolerance is None or not _is_float(a.dtype):
            what = _first_difference(left, one, right, other, DTYPE_BITS[a.dtype])
        else:
            what = _numeric_difference((left, one, a.dtype), (right, other, b.dtype), tolerance)
        if what is not None:
            yield Difference(a.name, expert, what)


def _matching_blocks(
    a: LogicalTensor, b: LogicalTensor
) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Returns blocks that stand for the same bytes; a dense view has one where a MoE has many."""
    if len(a.blocks) == len(b.blocks):
        return a.blocks, b.blocks
    return tuple(
        (Block(None, tuple(piece for block in tensor.blocks for piece in block.pieces)),)
        for tensor in (a, b)
    )  # type: ignore[return-value]


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def aligned(left: Iterator[Any], right: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields pairs of equally long parts of two streams of buffers or arrays."""
    a = next(left, None)
    b = next(right, None)
    while a is not None and b is not None:
        size = min(len(a), len(b))
        yield a[:size], b[:size]
        a = a[size:] if len(a) > size else next(left, None)
        b = b[size:] if len(b) > size else next(right, None)
    assert a is None
    assert b is None


def _first_difference(
    left: Reader, one: Block, right: Reader, other: Block, bits: int
) -> str | None:
    position = 0
    for a, b in aligned(block_chunks(left, one), block_chunks(right, other)):
        # bytearray compares by memcmp with any buffer; memoryview would go byte by byte.
        if bytearray(a) != b:
            byte = next(i for i in range(len(a)) if a[i] != b[i])
            place = position + byte
            return f"first differs at value {place * 8 // bits} (byte {place})"
        position += len(a)
    return None


def _numeric_difference(
    one: tuple[Reader, Block, str], other: tuple[Reader, Block, str], tolerance: float
) -> str | None:
    import numpy as np

    largest, scale = 0.0, 0.0
    for a, b in aligned(_values(*one), _values(*other)):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        gap = np.where(same, 0.0, np.abs(a.astype(np.float64) - b))
        if not np.isfinite(gap).all():
            return "one is finite where the other is not"
        finite = np.abs(b[np.isfinite(b)])
        largest = max(largest, float(gap.max(initial=0.0)))
        scale = max(scale, float(finite.max(initial=0.0)))
    if largest <= tolerance * scale:
        return None
    return f"max |a - b| = {largest:.3g}, allowed {tolerance:g} x {scale:.3g} (largest value)"


def _values(reader: Reader, block: Block, dtype: str) -> Iterator[NDArray[Any]]:
    import numpy as np

    math = arithmetic()
    for chunk in block_chunks(reader, block):
        yield math.to_float32(np.frombuffer(chunk, math.raw_dtype(dtype)), dtype)
