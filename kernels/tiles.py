"""Which tile each grouped GEMM works on: a small table, no search at run time.

The key is what decides the best tile: element size, whether the GPU is Hopper or newer, and the
bucket of rows an expert has on average. Figures behind the choices: benchmarks/moe_h100_202611.md.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One grouped GEMM's launch.

    Attributes:
        group_m: row tiles that are walked together, so that they share weights in the cache.
        tma_store: whether whole tiles leave by TMA.
        max_registers: a cap for each thread, so that two programs fit on one multiprocessor.
        slice_n: columns that the SwiGLU backward works on at a time, to fit in registers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tma_store: bool = False
    max_registers: int | None = None
    slice_n: int = 64


class TileTable(NamedTuple):
    """The tiles of one MoE block. The first four walk the same rows, so `block_m` is one number."""

    gate_up: Tile
    down: Tile
    down_backward: Tile
    input_gradient: Tile
    down_weight_gradient: Tile
    gate_up_weight_gradient: Tile

    @property
    def block_rows(self) -> int:
        """Rows of a tile in the GEMMs that produce rows."""
        return self.gate_up.block_m


def _same(tile: Tile) -> TileTable:
    return TileTable(tile, tile, tile, tile, tile, tile)


# Exact float32 dots run on the ordinary cores: small tiles, for tests and debugging.
FLOAT32 = _same(Tile(32, 32, 32, num_warps=4, num_stages=1))

# Ampere and Ada: 100 KB of shared memory or less a block. Untested on hardware.
PRE_HOPPER = _same(Tile(128, 128, 32, num_warps=8, num_stages=3))
PRE_HOPPER_FEW_ROWS = _same(Tile(64, 64, 32, num_warps=4, num_stages=3))

HOPPER = TileTable(
    gate_up=Tile(128, 128, 64, num_warps=8, num_stages=4, group_m=16),
    down=Tile(128, 256, 64, num_warps=8, num_stages=3),
    down_backward=Tile(128, 128, 64, num_warps=8, num_stages=3, max_registers=128, slice_n=32),
    input_gradient=Tile(128, 256, 32, num_warps=8, num_stages=3),
    down_weight_gradient=Tile(128, 256, 64, num_warps=8, num_stages=3),
    gate_up_weight_gradient=Tile(128, 256, 64, num_warps=8, num_stages=3),
)
HOPPER_FEW_ROWS = TileTable(
    gate_up=Tile(64, 128, 64, num_warps=4, num_stages=3),
    down=Tile(64, 128, 64, num_warps=4, num_stages=4),
    down_backward=Tile(64, 128, 64, num_warps=4, num_stages=4),
    input_gradient=Tile(64, 128, 64, num_warps=4, num_stages=3),
    down_weight_gradient=Tile(128, 128, 64, num_warps=8, num_stages=3),
    gate_up_weight_gradient=Tile(128, 128, 64, num_warps=8, num_stages=3),
)

FEW_ROWS = 96


@functools.cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability of a CUDA device, asked for once."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def device_name(device: torch.device) -> str:
    """Returns what the driver calls a CUDA device, asked for once."""
    return torch.cuda.get_device_name(device)


def choose_tiles(
    dtype: torch.dtype, capability: tuple[int, int], rows_per_expert: float
) -> TileTable:
    """Returns the tiles for `rows_per_expert` rows on average on a GPU of `capability`."""
    if dtype.itemsize > 2:
        return FLOAT32
    few = rows_per_expert <= FEW_ROWS
    if capability >= (9, 0):
        return HOPPER_FEW_ROWS if few else HOPPER
    return PRE_HOPPER_FEW_ROWS if few else PRE_HOPPER
