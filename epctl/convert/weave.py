"""The experts of one layer in another storage, matrix by matrix."""

from __future__ import annotations

from dataclasses import replace

from epctl.convert.recipes import Block, Cast, Copy, LogicalTensor, Matrix, Piece, Scale, Weave
from epctl.convert.scales import fp8_scale, stated_block
from epctl.convert.view import CheckpointView, Extent, TensorView, cut
from epctl.errors import InputError, LayoutError
from epctl.layout.model import ExpertStorage, MoELayout, Projection

FLOATING = ("F64", "F32", "F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def layer_tensors(
    view: CheckpointView, source: MoELayout, target: MoELayout, layer: int, *, bf16: bool
) -> list[LogicalTensor]:
    """Returns the target's expert tensors of `layer`: weights, then scales, then biases."""
    tensors = _weights(view, source, target, layer, bf16)
    if target.storage.scales:
        _check_block_edges(view, source, target)
        tensors += _weights(view, _scales_as_weights(source), _scales_as_weights(target), layer)
    for key, name in target.storage.biases.items():
        stored = view.tensors[source.tensor_name(layer, source.storage.biases[key])]
        tensors.append(
            fused_tensor(
                target.tensor_name(layer, name), stored, layer, target.experts_of_layer(layer), bf16
            )
        )
    return tensors


def fused_tensor(
    name: str, stored: TensorView, layer: int, num_experts: int, bf16: bool
) -> LogicalTensor:
    """Returns a tensor whose dim 0 counts experts, unchanged but for its dtype."""
    size = stored.num_bytes // num_experts
    dtype = output_dtype(stored.dtype, bf16)
    blocks = tuple(
        Block(
            expert,
            (plain_piece(cut(stored.extents, expert * size, (expert + 1) * size), stored, dtype),),
        )
        for expert in range(num_experts)
    )
    return LogicalTensor(name, dtype, stored.shape, blocks, layer, num_experts)


def output_dtype(dtype: str, bf16: bool) -> str:
    """Returns the dtype that `dtype` has in the output."""
    return "BF16" if bf16 and dtype in FLOATING else dtype


def plain_piece(extents: tuple[Extent, ...], stored: TensorView, dtype: str) -> Piece:
    """Returns the piece that writes `extents` of `stored` as `dtype`."""
    if stored.dtype == dtype:
        return Copy(extents)
    num_bytes = sum(extent.num_bytes for extent in extents)
    itemsize = {"F64": 8, "F32": 4, "F16": 2}.get(stored.dtype, 1)
    return Cast(extents, stored.dtype, num_bytes // itemsize)


def projections_of(storage: ExpertStorage, key: str) -> tuple[Projection, ...]:
    """Returns the projections that a stored tensor holds."""
    if key == "gate_up":
        return ("gate", "up")
    return (key,)  # type: ignore[return-value]


def _weights(
    view: CheckpointView, source: MoELayout, target: MoELayout, layer: int, bf16: bool = False
) -> list[LogicalTensor]:
    tensors: list[LogicalTensor] = []
    for key in target.storage.names:
        blocks, shape, dtype, names = [], (0, 0), "", []
        for expert in range(target.experts_of_layer(layer)):
            weave = _weave(view, source, target, layer, expert, key, bf16)
            shape, dtype = weave.shape, weave.dtype
            blocks.append(Block(expert, (simplified(weave),)))
            first = projections_of(target.storage, key)[0]
            names.append(target.expert_tensor(layer, expert, first).name)
        tensors += _as_tensors(target.storage, names, dtype, shape, blocks, layer)
    return tensors


def _as_tensors(
    storage: ExpertStorage,
    names: list[str],
    dtype: str,
    shape: tuple[int, int],
    blocks: list[Block],
    layer: int,
) -> list[LogicalTensor]:
    if storage.kind == "per_expert":
        return [
            LogicalTensor(name, dtype, shape, (block,), layer)
            for name, block in zip(names, blocks, strict=True)
        ]
    count = len(blocks)
    whole = (count * shape[0], shape[1]) if storage.kind == "flat_rows" else (count, *shape)
    return [LogicalTensor(names[0], dtype, whole, tuple(blocks), layer, count)]


def _weave(
    view: CheckpointView,
    source: MoELayout,
    target: MoELayout,
    layer: int,
    expert: int,
    key: str,
    bf16: bool,
) -> Weave:
    projections = projections_of(target.storage, key)
    matrices = tuple(stored_matrix(view, source, layer, expert, p) for p in projections)
    if any(matrix.scale is not None for matrix in matrices) and target.storage.scales:
        matrices = tuple(replace(matrix, scale=None) for matrix in matrices)
    place = target.expert_tensor(layer, expert, projections[0])
    dequantizes = matrices[0].scale is not None
    dtype = "BF16" if dequantizes else output_dtype(matrices[0].dtype, bf16)
    return Weave(matrices, dtype, place.part in ("even", "odd"), place.transposed)


def stored_matrix(
    view: CheckpointView, moe: MoELayout, layer: int, expert: int, projection: Projection
) -> Matrix:
    """Returns one projection of one expert as the view stores it, with its scales."""
    place = moe.expert_tensor(layer, expert, projection)
    stored = _tensor(view, place.name)
    extents, shape = _expert_part(stored, place.index, place.rows)
    scale = None
    key = next(k for k in moe.storage.names if projection in projections_of(moe.storage, k))
    if key in moe.storage.scales:
        name = moe.tensor_name(
            layer,
            moe.storage.scales[key],
            expert if moe.storage.kind == "per_expert" else None,
        )
        scale = _scale(view, moe.storage, name, place.index, shape)
    if moe.storage.quantization == "mxfp4":
        shape = (shape[0], shape[1] * shape[2] * 2)
    if len(shape) != 2:
        raise LayoutError(f"`{place.name}` has shape {list(stored.shape)}: an expert is no matrix")
    return Matrix(
        extents=extents,
        dtype=stored.dtype,
        shape=(shape[0], shape[1]),
        part=place.part,
        part_dim=place.part_dim,
        transposed=place.transposed,
        scale=scale,
    )


def _tensor(view: CheckpointView, name: str) -> TensorView:
    if name not in view.tensors:
        raise InputError(
            f"`{view.id}` holds no tensor `{name}`",
            hint="a part of the checkpoint is missing; `epctl convert verify` tells which",
        )
    return view.tensors[name]


def _expert_part(
    stored: TensorView, index: int | None, rows: int | None
) -> tuple[tuple[Extent, ...], tuple[int, ...]]:
    """Returns the bytes and the shape of one expert's part of a stored tensor."""
    if index is None:
        return stored.extents, stored.shape
    if rows is not None:
        size = stored.num_bytes // stored.shape[0] * rows
        shape: tuple[int, ...] = (rows, *stored.shape[1:])
    else:
        size = stored.num_bytes // stored.shape[0]
        shape = stored.shape[1:]
    return cut(stored.extents, index * size, (index + 1) * size), shape


def _scale(
    view: CheckpointView,
    storage: ExpertStorage,
    name: str,
    index: int | None,
    weight_shape: tuple[int, ...],
) -> Scale:
    stored = _tensor(view, name)
    extents, shape = _expert_part(stored, index, None)
    if storage.quantization == "mxfp4":
        return Scale("mxfp4", extents, stored.dtype, shape, (1, 32))
    return fp8_scale(view, name, extents, stored.dtype, shape, weight_shape)


def _scales_as_weights(moe: MoELayout) -> MoELayout:
    """Returns a layout in which the scales' grids stand where the weights do."""
    storage = replace(moe.storage, names=moe.storage.scales, scales={}, quantization=None)
    return replace(moe, storage=storage)


def _check_block_edges(view: CheckpointView, source: MoELayout, target: MoELayout) -> None:
    """Raises LayoutError when gate's last block of scales would reach into up."""
    if set(source.storage.names) == set(target.storage.names):
        return
    rows = (stated_block(view) or source.storage.block_size or (0, 0))[0]
    width = source.expert_intermediate_size
    if not rows or width % rows:
        raise LayoutError(
            f"experts are {width} wide, which is no multiple of the FP8 scales' block of {rows} "
            "rows: gate and up cannot share one grid of scales",
            hint="use `--dtype bf16` to dequantise, or `--storage checkpoint`",
        )


def simplified(weave: Weave) -> Piece:
    """Returns a Copy or Cast where a weave changes no order of values."""
    matrices = weave.matrices
    first = matrices[0]
    if any(matrix.scale is not None for matrix in matrices):
        return weave
    extents: tuple[Extent, ...] | None = None
    if _restores_whole(weave):
        extents = first.extents
    elif not weave.interleaved and not weave.transposed and all(map(_is_rows, matrices)):
        extents = tuple(extent for matrix in matrices for extent in _row_extents(matrix))
    if extents is None:
        return weave
    return plain_piece(extents, TensorView(first.dtype, first.shape, first.extents), weave.dtype)


def _restores_whole(weave: Weave) -> bool:
    """True when the matrices are the parts of one stored matrix, put back as they were."""
    parts = tuple(matrix.part for matrix in weave.matrices)
    first = weave.matrices[0]
    if any(matrix.transposed != weave.transposed for matrix in weave.matrices):
        return False
    if parts == ("all",):
        return True
    expected = ("even", "odd") if weave.interleaved else ("first_half", "second_half")
    return (
        parts == expected
        and all(matrix.extents == first.extents for matrix in weave.matrices)
        and first.part_dim == int(weave.transposed)
    )


def _is_rows(matrix: Matrix) -> bool:
    """True when the part is a run of whole rows, so that its bytes lie together."""
    whole = matrix.part in ("first_half", "second_half") and matrix.part_dim == 0
    return not matrix.transposed and (matrix.part == "all" or whole)


def _row_extents(matrix: Matrix) -> tuple[Extent, ...]:
    if matrix.part == "all":
        return matrix.extents
    size = sum(extent.num_bytes for extent in matrix.extents)
    half = size // matrix.shape[0] * (matrix.shape[0] // 2)
    return (
        cut(matrix.extents, 0, half)
        if matrix.part == "first_half"
        else cut(matrix.extents, half, size)
    )
