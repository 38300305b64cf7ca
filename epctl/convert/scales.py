"""FP8 scales: whose they are, which block each covers, plain matrices dequantised in bands."""

from __future__ import annotations

import math
from typing import Any

from epctl.convert.recipes import Block, LogicalTensor, Matrix, Scale, Weave
from epctl.convert.view import CheckpointView, Extent, TensorView, cut, num_bytes
from epctl.errors import InputError
from epctl.layout.blocks import scale_block
from epctl.layout.experts import FLOAT8, SCALE_SUFFIXES

BAND_ELEMENTS = 1 << 23


def scale_name(view: CheckpointView, name: str) -> str | None:
    """Returns the name of the scales of an FP8 tensor, None when it has none."""
    if view.tensors[name].dtype not in FLOAT8:
        return None
    for suffix in SCALE_SUFFIXES:
        base = name.removesuffix(".weight") if suffix.startswith(".") else name
        if base + suffix in view.tensors:
            return base + suffix
    return None


def stated_block(view: CheckpointView) -> tuple[int, int] | None:
    """Returns the block size that config.json states."""
    for section in (view.config, view.config.get("text_config")):
        quantization = section.get("quantization_config") if isinstance(section, dict) else None
        size: Any = (
            quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        )
        if isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size):
            return size[0], size[1]
    return None


def fp8_scale(
    view: CheckpointView,
    name: str,
    extents: tuple[Extent, ...],
    dtype: str,
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
) -> Scale:
    """Returns the Scale of one FP8 matrix. Raises InputError for a grid that fits no block."""
    grid = (1, 1) if math.prod(shape) == 1 else shape if len(shape) == 2 else (*shape, 1)
    block = scale_block(weight_shape[-2:], grid, stated_block(view))
    if block is None:
        raise InputError(
            f"scales {list(grid)} of `{name}` fit no block of its shape {list(weight_shape[-2:])}",
            hint="the scales belong to another tensor, or the checkpoint is damaged",
        )
    return Scale("fp8", extents, dtype, grid, block)


def dequantized_tensor(view: CheckpointView, name: str, scale: str) -> LogicalTensor:
    """Returns an FP8 tensor outside the experts in bfloat16, in bands of whole block rows.

    Leading dims beyond two are matrices one after another.
    """
    weight, scales = view.tensors[name], view.tensors[scale]
    rows, columns = weight.shape[-2:]
    num_matrices = math.prod(weight.shape[:-2])
    per_matrix = scales.num_bytes // num_matrices
    pieces: list[Weave] = []
    for position in range(num_matrices):
        shared = math.prod(scales.shape) == 1
        first = 0 if shared else position * per_matrix
        size = scales.num_bytes if shared else per_matrix
        shape = scales.shape if shared or num_matrices == 1 else scales.shape[-2:]
        extents = cut(scales.extents, first, first + size)
        whole = fp8_scale(view, scale, extents, scales.dtype, shape, (rows, columns))
        body = cut(weight.extents, position * rows * columns, (position + 1) * rows * columns)
        pieces += _bands(TensorView(weight.dtype, (rows, columns), body), whole)
    return LogicalTensor(name, "BF16", weight.shape, (Block(None, tuple(pieces)),))


def _bands(weight: TensorView, scale: Scale) -> list[Weave]:
    rows, columns = weight.shape
    side = scale.block[0]
    step = max(1, BAND_ELEMENTS // max(1, columns * side)) * side
    row_bytes = num_bytes(scale.dtype, (scale.shape[1],))
    bands = []
    for start in range(0, rows, step):
        end = min(rows, start + step)
        first, last = start // side, -(-end // side)
        part = Scale(
            "fp8",
            cut(scale.extents, first * row_bytes, last * row_bytes),
            scale.dtype,
            (last - first, scale.shape[1]),
            scale.block,
        )
        extents = cut(weight.extents, start * columns, end * columns)
        matrix = Matrix(extents, weight.dtype, (end - start, columns), scale=part)
        bands.append(Weave((matrix,), "BF16"))
    return bands
