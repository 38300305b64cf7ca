"""Recipes: how the bytes of an output tensor come from the bytes of a view. Pure descriptions.

An output tensor is a row of *blocks*; a block is what has one digest: a whole tensor, or one
expert's part of a fused one. A block is a row of *pieces*, each small enough for memory:

    Copy    bytes as they are
    Cast    the same values in bfloat16
    Weave   one or two [out, in] matrices of an expert, cut, dequantised, laid out anew
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from epctl.convert.view import Extent, num_bytes
from epctl.layout.model import Part


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of a view, unchanged."""

    extents: tuple[Extent, ...]

    @property
    def num_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents)


@dataclass(frozen=True, slots=True)
class Cast:
    """`num_elements` values of `dtype`, written as bfloat16."""

    extents: tuple[Extent, ...]
    dtype: str
    num_elements: int

    @property
    def num_bytes(self) -> int:
        return 2 * self.num_elements


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of a quantised matrix.

    `kind` fp8: a float grid of `shape` [rows, columns] of `block` (rows, columns) each; mxfp4: one
    exponent byte for each 32 values of a row.
    """

    kind: Literal["fp8", "mxfp4"]
    extents: tuple[Extent, ...]
    dtype: str
    shape: tuple[int, ...]
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection of one expert as it is stored: `shape` is two-dimensional.

    After dequantising, `part` of dim `part_dim` is taken and the result transposed if
    `transposed`; that gives [out, in]. Packed MXFP4 has the shape of its values, not its bytes.
    """

    extents: tuple[Extent, ...]
    dtype: str
    shape: tuple[int, int]
    part: Part = "all"
    part_dim: int = 0
    transposed: bool = False
    scale: Scale | None = None

    @property
    def result_shape(self) -> tuple[int, int]:
        """[out, in]."""
        sides = list(self.shape)
        if self.part != "all":
            sides[self.part_dim] //= 2
        return (sides[1], sides[0]) if self.transposed else (sides[0], sides[1])


@dataclass(frozen=True, slots=True)
class Weave:
    """Matrices laid one after another (or row by row if `interleaved`), then transposed."""

    matrices: tuple[Matrix, ...]
    dtype: str
    interleaved: bool = False
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The two dims that are written."""
        out_size = sum(matrix.result_shape[0] for matrix in self.matrices)
        in_size = self.matrices[0].result_shape[1]
        return (in_size, out_size) if self.transposed else (out_size, in_size)

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


Piece = Copy | Cast | Weave


@dataclass(frozen=True, slots=True)
class Block:
    """What has one digest; `expert` is the global expert id, None for what all ranks share."""

    expert: int | None
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A whole output tensor, before it is dealt out to ranks.

    `layer` is set for routed experts. With `num_experts` the tensor holds all experts of its
    layer in dim 0 (one block each); without it, it belongs to the expert of its only block.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    layer: int | None = None
    num_experts: int | None = None

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)

    @property
    def expert(self) -> int | None:
        """The expert that alone owns the tensor."""
        return None if self.num_experts else self.blocks[0].expert

    def experts(self, first: int, end: int) -> LogicalTensor:
        """Returns the tensor of experts `first` to `end` only; dim 0 shrinks with them."""
        assert self.num_experts is not None
        rows = self.shape[0] // self.num_experts * (end - first)
        return replace(self, shape=(rows, *self.shape[1:]), blocks=self.blocks[first:end])
