"""What a packed vision tower computes from its grid, for all rows and then for a rank's own.

Shape suffixes: S patch rows of all images, R of this rank, M merged rows (visual tokens).

The functions are transformers' own (`transformers.vision_utils`), so positions and segments are
those of the unsharded tower; the tower takes them as keyword arguments in place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from epctl.errors import InputError
from epctl.runtime.deepspeed_seams import full_shape
from epctl.runtime.sequence.cuts import LayerKind, Level
from epctl.runtime.sequence.detect import Encoder, called_names


@dataclass(frozen=True)
class TowerInputs:
    """Everything a packed tower derives from the grid, in the order its layers see the rows.

    Attributes:
        order_S: pixel row of each place, None for the processor's order; windows lie together
            where a tower has them, and the rows of a merged token always do.
        tokens_M: visual token of each merged place; None for the same order.
        row_inputs: keyword arguments with one entry a row, in processor order.
        shapes: (frames, height, width) in patches of each frame.
        regroups: the tower gathers the rows of a merged token by an index.
    """

    merge_unit: int
    num_rows: int
    order_S: Tensor | None
    tokens_M: Tensor | None
    row_inputs: dict[str, Tensor]
    frames: tuple[int, ...]
    windows: tuple[int, ...] | None
    shapes: tuple[tuple[int, int, int], ...] = ()
    regroups: bool = False

    def levels(self) -> list[Level]:
        """Returns where rows may be cut, coarse to fine."""
        found = [Level("frame", self.frames)]
        if self.windows is not None:
            found.append(Level("window", self.windows))
        return [*found, self.finest()]

    def finest(self) -> Level:
        blocks = range(0, self.num_rows + 1, self.merge_unit)
        return Level("merge block", tuple(blocks))

    def segments(self) -> dict[int, tuple[int, ...]]:
        """Returns the kinds of segments by their number of offsets."""
        kinds = [self.frames] + ([self.windows] if self.windows is not None else [])
        return {len(offsets): offsets for offsets in kinds}

    def local(self, start: int, stop: int, device: torch.device) -> dict[str, Any]:
        """Returns the tower's keyword arguments for rows `start` to `stop`; segments stay global.

        An empty range gets one block of dummy rows.
        """
        rows_R = self.rows(start, stop).to(device)
        inputs: dict[str, Any] = {}
        for name, value_S in self.row_inputs.items():
            own = (
                value_S.to(device)[rows_R]
                if stop > start
                else value_S.new_zeros(_dummy(value_S, self))
            )
            inputs[name] = own.to(device)
        inputs["cu_seqlens"] = torch.tensor(self.frames, dtype=torch.int32, device=device)
        inputs["max_seqlen"] = _longest(self.frames)
        if self.windows is not None:
            num_blocks = max(stop - start, self.merge_unit) // self.merge_unit
            inputs["window_index"] = torch.arange(num_blocks, device=device)
            windows = torch.tensor(self.windows, dtype=torch.int32, device=device)
            inputs["cu_window_seqlens"] = windows
            inputs["max_window_seqlen"] = _longest(self.windows)
        if self.regroups:
            num_rows = max(stop - start, self.merge_unit)
            own_R = torch.arange(num_rows, device=device)
            inputs["temporal_merge_index"] = own_R.view(-1, 1, self.merge_unit)
        return inputs

    def own_shapes(self, start: int, stop: int) -> list[tuple[int, tuple[int, int, int]]]:
        """Returns rows and shape of each frame of which some lie between `start` and `stop`."""
        found = []
        for (first, last), shape in zip(pairwise(self.frames), self.shapes, strict=True):
            num_rows = min(last, stop) - max(first, start)
            if num_rows > 0:
                found.append((num_rows, shape))
        return found or [(self.merge_unit, (1, 1, self.merge_unit))]

    def held_tokens(self, offsets: Sequence[int]) -> list[Tensor]:
        """Returns which visual tokens the rows of each rank make."""
        num_tokens = [(b - a) // self.merge_unit for a, b in pairwise(offsets)]
        tokens_M = torch.arange(sum(num_tokens)) if self.tokens_M is None else self.tokens_M.cpu()
        return list(torch.split(tokens_M, num_tokens))

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns the pixel rows of the places `start` to `stop`."""
        return torch.arange(start, stop) if self.order_S is None else self.order_S[start:stop]


def _dummy(value_S: Tensor, inputs: TowerInputs) -> tuple[int, ...]:
    return (inputs.merge_unit, *value_S.shape[1:])


def _longest(offsets: tuple[int, ...]) -> int:
    return max((stop - start for start, stop in pairwise(offsets)), default=0)


def tower_inputs(encoder: Encoder, grid: Tensor) -> TowerInputs:
    """Returns what the tower derives from `grid` [images, 3] (frames, height, width in patches)."""
    from transformers import vision_utils

    tower: Any = encoder.module
    used = called_names(tower)
    merge = merge_size(tower)
    regroups = "get_vision_temporal_merge_index" in used
    in_blocks = 1 if regroups else merge  # else the rows of an image run line by line
    row_inputs = {"position_ids": vision_utils.get_vision_position_ids(grid, in_blocks)}
    row_inputs |= _interpolation(tower, grid, in_blocks)
    frames = tuple(vision_utils.get_vision_cu_seqlens(grid).tolist())
    order_S = tokens_M = windows = None
    if regroups:
        order_S = _in_blocks(grid, merge)
    if "get_vision_window_index" in used:
        tokens_M, offsets = vision_utils.get_vision_window_index(
            grid,
            spatial_merge_size=merge,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        within = torch.arange(merge**2, device=grid.device)
        order_S = (tokens_M.to(grid.device)[:, None] * merge**2 + within).flatten()
        windows = tuple(offsets.tolist())
    shapes = tuple((1, h, w) for t, h, w in grid.tolist() for _ in range(t))
    return TowerInputs(
        merge**2, frames[-1], order_S, tokens_M, row_inputs, frames, windows, shapes, regroups
    )


def merge_size(tower: Any) -> int:
    """Returns the patches a side that become one visual token."""
    size = getattr(tower, "spatial_merge_size", None) or tower.merge_kernel_size
    height, width = (size, size) if isinstance(size, int) else size
    assert height == width, size
    return int(height)


def _interpolation(tower: nn.Module, grid: Tensor, merge: int) -> dict[str, Tensor]:
    """Returns the taps of a learned position table, for the module that asks for them."""
    from transformers import vision_utils

    name = "get_vision_interpolation_indices_and_weights"
    for part in tower.modules():
        if name in called_names(part):
            module: Any = part
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=module.num_grid_per_side,
                mode=module.interpolation_mode,
                align_corners=module.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            return {"interp_indices": indices, "interp_weights": weights}
    return {}


def _in_blocks(grid: Tensor, merge: int) -> Tensor:
    """Returns the rows of images, line by line, in the order of their merge blocks.

    Raises InputError for clips: their frames are averaged, and transformers' own features of a clip
    are divided by the number of its patches, frames and all, which does not come out.
    """
    if bool((grid[:, 0] > 1).any()):
        raise InputError(
            f"a clip of {int(grid[:, 0].max())} frames is given; this tower averages frames, and "
            "sequence parallelism takes its images only"
        )
    orders, first = [], 0
    for height, width in grid[:, 1:].tolist():
        rows = torch.arange(first, first + height * width, device=grid.device)
        blocks = rows.view(height // merge, merge, width // merge, merge)
        orders.append(blocks.transpose(1, 2).flatten())
        first += height * width
    return torch.cat(orders)


def layer_kinds(encoder: Encoder, inputs: TowerInputs) -> list[LayerKind]:
    """Returns how many of the tower's layers attend within frames and within windows."""
    num_layers = len(encoder.blocks)
    if inputs.windows is None:
        return [LayerKind(num_layers, inputs.frames)]
    num_full = len(getattr(encoder.module, "fullatt_block_indexes"))  # noqa: B009
    return [
        LayerKind(num_full, inputs.frames),
        LayerKind(num_layers - num_full, inputs.windows),
    ]


def linear_cost(encoder: Encoder) -> float:
    """Returns a block's linear work for a row in units of one attended pair.

    Both in multiply-adds: the block's weights against two products of the attention's width.
    """
    weights = sum(full_shape(p).numel() for p in encoder.blocks[0].parameters())
    attention: Any = encoder.attentions[0]
    heads, size = getattr(attention, "num_heads", None), getattr(attention, "head_dim", None)
    width = heads * size if heads and size else (weights / 12) ** 0.5
    return float(weights / (2 * width))


def pixel_shape(encoder: Encoder) -> tuple[int, ...]:
    """Returns the shape of one packed row or one tile, for a rank that has none."""
    if encoder.form == "packed":
        convolution = next(m for m in encoder.module.modules() if hasattr(m, "kernel_size"))
        weight = next(convolution.parameters())
        return tuple(full_shape(weight)[1:])  # towers that take flat rows give them this shape
    config: Any = getattr(encoder.module, "config")  # noqa: B009
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if encoder.takes_sizes:  # any size will do; four patches merge under every merge size
        height = width = 4 * config.patch_size
    return (config.num_channels, height, width)


def parameter_dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
