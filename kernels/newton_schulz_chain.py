"""The chain of products of a Newton-Schulz iteration, on buffers of bounded size.

A GPU takes some matrices at a time, so that the workspace does not grow with the batch. Shape
suffixes: see newton_schulz.py.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from epctl.kernels.newton_schulz_cost import Iteration, Products, gram_segments

# What a chain may write in all, unless a single matrix needs more. Large batches beat what stays in
# L2: a launch of few tiles waits for its last one (benchmarks/muon_h200_202611.md).
WORKSPACE_BYTES = 2**29
# Below so many multiply-adds a product ends before the host has launched the next: those chains are
# replayed as graphs. Above, a graph would only add two copies of the matrices.
GRAPH_PRODUCTS = 2**35
LARGEST_GRID = 2**15  # matrices of one launch
NUM_SQUARES: dict[Iteration, int] = {"standard": 2, "gram": 4}


class Chain(NamedTuple):
    """What is computed: the iteration, the implementation of its products, a row a step.

    `at_once` overrides `matrices_at_once`.
    """

    method: Iteration
    products: Products
    rows: tuple[tuple[float, float, float], ...]
    at_once: int | None = None


class Workspace(NamedTuple):
    """What a chain writes beside its matrices: one more of their shape, and square ones."""

    spare_BMN: Tensor
    squares: tuple[Tensor, ...]


class Product(Protocol):
    """Writes `alpha left @ right^T + beta added` to `out`, which the caller knows is symmetric."""

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        added: Tensor | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        out: Tensor,
    ) -> object: ...


def matrices_at_once(
    shape: tuple[int, int], chain: Chain, dtype: torch.dtype, device: torch.device
) -> int | None:
    """Returns how many matrices of a shape a chain takes at a time; None is all, on a CPU."""
    if chain.at_once is not None or device.type != "cuda":
        return chain.at_once
    each = workspace_bytes(shape, 1, chain.method, dtype, use_graphs=True)
    return max(1, min(WORKSPACE_BYTES // each, LARGEST_GRID))


def workspace_bytes(
    shape: tuple[int, int],
    num_matrices: int,
    method: Iteration,
    dtype: torch.dtype,
    use_graphs: bool = False,
) -> int:
    """Returns the bytes of a chain's workspace for `num_matrices` at a time.

    A graph has its matrices at a fixed place, so they are there once more.
    """
    short, long = sorted(shape)
    copies = 2 if use_graphs else 1
    each = short * (copies * long + NUM_SQUARES[method] * short)
    return dtype.itemsize * num_matrices * each


def create_workspace(x_BMN: Tensor, method: Iteration) -> Workspace:
    """Returns the workspace for one chain over `x_BMN`."""
    short = min(x_BMN.shape[-2:])
    squares = x_BMN.new_empty(NUM_SQUARES[method], x_BMN.shape[0], short, short)
    return Workspace(torch.empty_like(x_BMN), squares.unbind())


def iterate_(x_BMN: Tensor, chain: Chain, *, use_graphs: bool = False) -> None:
    """Runs a chain over each matrix of a contiguous batch, in place."""
    assert x_BMN.is_contiguous()
    num_matrices, num_rows, num_columns = x_BMN.shape
    if x_BMN.numel() == 0:
        return
    size = matrices_at_once((num_rows, num_columns), chain, x_BMN.dtype, x_BMN.device)
    size = _even_parts(num_matrices, min(size or num_matrices, num_matrices))
    if use_graphs and x_BMN.device.type == "cuda" and _is_short(size, num_rows, num_columns):
        from epctl.kernels.newton_schulz_graph import replay_

        replay_(x_BMN, chain, size)
        return
    workspace = create_workspace(x_BMN[:size], chain.method)
    for part_BMN in torch.split(x_BMN, size):
        run_chain_(part_BMN, chain, _first(workspace, part_BMN.shape[0]))


def _even_parts(num_matrices: int, most: int) -> int:
    """Returns the size of parts that are as equal as can be, none larger than `most`."""
    return -(-num_matrices // -(-num_matrices // most))


def _is_short(num_matrices: int, num_rows: int, num_columns: int) -> bool:
    """True if launching a product takes longer than computing it."""
    short, long = sorted((num_rows, num_columns))
    return num_matrices * short * short * long < GRAPH_PRODUCTS


def _first(workspace: Workspace, num_matrices: int) -> Workspace:
    squares = tuple(square[:num_matrices] for square in workspace.squares)
    return Workspace(workspace.spare_BMN[:num_matrices], squares)


def run_chain_(x_BMN: Tensor, chain: Chain, workspace: Workspace) -> None:
    """Replaces each matrix by its iterate; no allocation beyond what torch's products make."""
    tall = x_BMN.shape[-2] > x_BMN.shape[-1]
    x_BRL = x_BMN.mT if tall else x_BMN
    spare_BRL = workspace.spare_BMN.mT if tall else workspace.spare_BMN
    product: Product = symmetric_product if chain.products == "symmetric" else torch_product
    iterate = _gram if chain.method == "gram" else _standard
    result_BRL = iterate(x_BRL, spare_BRL, workspace.squares, chain.rows, product)
    if result_BRL is not x_BRL:
        x_BRL.copy_(result_BRL)


def torch_product(
    left: Tensor,
    right: Tensor,
    added: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor,
) -> None:
    """A `Product` that computes all of it, by the library's batched GEMM."""
    if added is None:
        assert alpha == 1.0
        torch.bmm(left, right.mT, out=out)
    else:
        # Named as they come: the transpose of a symmetric operand is itself, but not to the bit.
        torch.baddbmm(added, left, right, beta=beta, alpha=alpha, out=out)


def symmetric_product(
    left: Tensor,
    right: Tensor,
    added: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor,
) -> None:
    """A `Product` that computes half of it, in Triton."""
    from epctl.kernels.symmetric import symmetric_matmul

    symmetric_matmul(left, right, added, alpha=alpha, beta=beta, out=out)


Rows = tuple[tuple[float, float, float], ...]
Squares = tuple[Tensor, ...]


def _standard(
    x_BRL: Tensor, spare_BRL: Tensor, squares: Squares, rows: Rows, product: Product
) -> Tensor:
    gram_BRR, poly_BRR = squares
    for a, b, c in rows:
        product(x_BRL, x_BRL, out=gram_BRR)
        product(gram_BRR, gram_BRR, gram_BRR, alpha=c, beta=b, out=poly_BRR)
        torch.baddbmm(x_BRL, poly_BRR, x_BRL, beta=a, out=spare_BRL)
        x_BRL, spare_BRL = spare_BRL, x_BRL
    return x_BRL


def _gram(
    x_BRL: Tensor, spare_BRL: Tensor, squares: Squares, rows: Rows, product: Product
) -> Tensor:
    """Iterates on X X^T alone, applying the accumulated factor once a segment.

    Polynomials of one Gram matrix commute, so each of their products is symmetric.

    `a I` goes into the factor, never into the polynomial: rounding `a` there costs stability.
    """
    gram_BRR, poly_BRR, factor_BRR, half_BRR = squares
    for segment in gram_segments(len(rows)):
        product(x_BRL, x_BRL, out=gram_BRR)
        for step in segment:
            a, b, c = rows[step]
            product(gram_BRR, gram_BRR, gram_BRR, alpha=c, beta=b, out=poly_BRR)
            if step != segment[-1]:
                product(gram_BRR, poly_BRR, gram_BRR, beta=a, out=half_BRR)
                product(poly_BRR, half_BRR, half_BRR, beta=a, out=gram_BRR)
            if step == segment[0]:
                # The polynomial is not needed again: it becomes the factor where it lies.
                factor_BRR, poly_BRR = poly_BRR, factor_BRR
                factor_BRR.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product(factor_BRR, poly_BRR, factor_BRR, beta=a, out=half_BRR)
                factor_BRR, half_BRR = half_BRR, factor_BRR
        torch.bmm(factor_BRR, x_BRL, out=spare_BRL)
        x_BRL, spare_BRL = spare_BRL, x_BRL
    return x_BRL
