"""What a packed vision tower computes from its grid, for all rows and then for a rank's own.

Shape suffixes: S patch rows of all images, R of this rank, M merged rows (visual tokens).

The functions are transformers' own (`transformers.vision_utils`), so positions and segments are
those of the unsharded tower; the tower takes them as keyword arguments in place of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from epctl.runtime.deepspeed_seams import full_shape
from epctl.runtime.sequence.cuts import LayerKind, Level
from epctl.runtime.sequence.detect import Encoder, called_names


@dataclass(frozen=True)
class TowerInputs:
    """Everything a packed tower derives from the grid, in the order its layers see the rows.

    Attributes:
        order_S: pixel row of each place; windows lie together where a tower has them.
        unorder_M: place of each visual token in the processor's order; None for the same order.
        row_inputs: keyword arguments with one entry a row, in processor order.
    """

    merge_unit: int
    num_rows: int
    order_S: Tensor | None
    unorder_M: Tensor | None
    row_inputs: dict[str, Tensor]
    frames: tuple[int, ...]
    windows: tuple[int, ...] | None

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
        rows_R = self.rows(start, stop)
        inputs: dict[str, Any] = {}
        for name, value_S in self.row_inputs.items():
            own = value_S[rows_R] if stop > start else value_S.new_zeros(_dummy(value_S, self))
            inputs[name] = own.to(device)
        inputs["cu_seqlens"] = torch.tensor(self.frames, dtype=torch.int32, device=device)
        inputs["max_seqlen"] = _longest(self.frames)
        if self.windows is not None:
            num_blocks = max(stop - start, self.merge_unit) // self.merge_unit
            inputs["window_index"] = torch.arange(num_blocks, device=device)
            windows = torch.tensor(self.windows, dtype=torch.int32, device=device)
            inputs["cu_window_seqlens"] = windows
            inputs["max_window_seqlen"] = _longest(self.windows)
        return inputs

    def rows(self, start: int, stop: int) -> Tensor | slice:
        """Returns the pixel rows of the places `start` to `stop`."""
        return slice(start, stop) if self.order_S is None else self.order_S[start:stop]


def _dummy(value_S: Tensor, inputs: TowerInputs) -> tuple[int, ...]:
    return (inputs.merge_unit, *value_S.shape[1:])


def _longest(offsets: tuple[int, ...]) -> int:
    return max((stop - start for start, stop in pairwise(offsets)), default=0)


def tower_inputs(encoder: Encoder, grid: Tensor) -> TowerInputs:
    """Returns what the tower derives from `grid` [images, 3] (frames, height, width in patches)."""
    from transformers import vision_utils

    tower: Any = encoder.module
    used = called_names(tower)
    merge: int = tower.spatial_merge_size
    row_inputs = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
    if "get_vision_interpolation_indices_and_weights" in used:
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        row_inputs |= {"interp_indices": indices, "interp_weights": weights}
    frames = tuple(vision_utils.get_vision_cu_seqlens(grid).tolist())
    order_S = unorder_M = windows = None
    if "get_vision_window_index" in used:
        window_index, offsets = vision_utils.get_vision_window_index(
            grid,
            spatial_merge_size=merge,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        within = torch.arange(merge**2, device=grid.device)
        order_S = (window_index[:, None] * merge**2 + within).flatten()
        unorder_M = window_index.argsort()
        windows = tuple(offsets.tolist())
    return TowerInputs(merge**2, frames[-1], order_S, unorder_M, row_inputs, frames, windows)


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
        return (full_shape(weight)[1:].numel(),)
    config: Any = getattr(encoder.module, "config")  # noqa: B009
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return (config.num_channels, height, width)


def parameter_dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
