"""The chain of products of a Newton-Schulz iteration, on buffers of bounded size.

A GPU takes some matrices at a time, so that the workspace does not grow with the batch. Nearly all
products are of square matrices, so batches that share a short side go through them together: few
tiles leave a GPU idle. Shape suffixes: see newton_schulz.py; G is all matrices of the batches at
hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """What a chain writes beside its batches: one more of each, and square ones for all of them."""

    spares: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]


class Part(NamedTuple):
    """One batch in a chain: its matrices, what they go to, and which of the square ones are its."""

    x_BRL: Tensor
    spare_BRL: Tensor
    place: slice

    def swapped(self) -> Part:
        return Part(self.spare_BRL, self.x_BRL, self.place)


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
    return create_joint_workspace((x_BMN,), method)


def create_joint_workspace(batches: Sequence[Tensor], method: Iteration) -> Workspace:
    """Returns the workspace for one chain over batches that share a short side."""
    short, count = min(batches[0].shape[-2:]), sum(len(x) for x in batches)
    squares = batches[0].new_empty(NUM_SQUARES[method], count, short, short)
    return Workspace(tuple(torch.empty_like(x) for x in batches), squares.unbind())


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
    iterate_together_((x_BMN,), chain, size)


def _even_parts(num_matrices: int, most: int) -> int:
    """Returns the size of parts that are as equal as can be, none larger than `most`."""
    return -(-num_matrices // -(-num_matrices // most))


def _is_short(num_matrices: int, num_rows: int, num_columns: int) -> bool:
    """True if launching a product takes longer than computing it."""
    return _multiply_adds(num_matrices, num_rows, num_columns) < GRAPH_PRODUCTS


def _multiply_adds(num_matrices: int, num_rows: int, num_columns: int) -> int:
    """Of one product with the short side's square matrices."""
    short, long = sorted((num_rows, num_columns))
    return num_matrices * short * short * long


def iterate_jointly_(batches: Sequence[Tensor], chain: Chain, *, use_graphs: bool = False) -> None:
    """Runs a chain over each matrix of contiguous batches that share a short side, in place.

    Batches one by one on a CPU, which idles for none, and where all are done before the host has
    launched a product for all: those have their graphs.
    """
    batches = [x for x in batches if x.numel()]
    work = sum(_multiply_adds(*x.shape) for x in batches)
    if len(batches) < 2 or not batches[0].is_cuda or (use_graphs and work < GRAPH_PRODUCTS):
        for x_BMN in batches:
            iterate_(x_BMN, chain, use_graphs=use_graphs)
        return
    longest = max(max(x.shape[-2:]) for x in batches)
    shape = min(batches[0].shape[-2:]), longest
    size = matrices_at_once(shape, chain, batches[0].dtype, batches[0].device)
    iterate_together_(batches, chain, size or LARGEST_GRID)


def iterate_together_(batches: Sequence[Tensor], chain: Chain, size: int) -> None:
    """As `iterate_jointly_`, at most `size` matrices in every product."""
    size = _even_parts(sum(len(x) for x in batches), size)
    for parts in _cut(batches, size):
        run_chains_(parts, chain, create_joint_workspace(parts, chain.method))


def _cut(batches: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yields lists of parts of batches, `size` matrices a list but for the last."""
    parts: list[Tensor] = []
    for x_BMN in batches:
        while len(x_BMN):
            room = size - sum(len(part) for part in parts)
            parts.append(x_BMN[:room])
            x_BMN = x_BMN[room:]
            if sum(len(part) for part in parts) == size:
                yield parts
                parts = []
    if parts:
        yield parts


def run_chain_(x_BMN: Tensor, chain: Chain, workspace: Workspace) -> None:
    """Replaces each matrix by its iterate; no allocation beyond what torch's products make."""
    run_chains_((x_BMN,), chain, workspace)


def run_chains_(batches: Sequence[Tensor], chain: Chain, workspace: Workspace) -> None:
    """As `run_chain_`, of batches that share a short side."""
    product: Product = symmetric_product if chain.products == "symmetric" else torch_product
    iterate = _gram if chain.method == "gram" else _standard
    parts = list(_parts(batches, workspace.spares))
    results = iterate(parts, workspace.squares, chain.rows, product)
    for part, result in zip(parts, results, strict=True):
        if result.x_BRL is not part.x_BRL:
            part.x_BRL.copy_(result.x_BRL)


def _parts(batches: Sequence[Tensor], spares: Sequence[Tensor]) -> Iterator[Part]:
    begin = 0
    for x_BMN, spare_BMN in zip(batches, spares, strict=True):
        tall = x_BMN.shape[-2] > x_BMN.shape[-1]
        place = slice(begin, begin + len(x_BMN))
        yield Part(x_BMN.mT if tall else x_BMN, spare_BMN.mT if tall else spare_BMN, place)
        begin = place.stop


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
    """A `Product` that computes half of it, in Triton or in CUDA C++."""
    from epctl.kernels.symmetric import symmetric_matmul

    symmetric_matmul(left, right, added, alpha=alpha, beta=beta, out=out)


Rows = tuple[tuple[float, float, float], ...]
Squares = tuple[Tensor, ...]


def _standard(parts: list[Part], squares: Squares, rows: Rows, product: Product) -> list[Part]:
    gram_GRR, poly_GRR = squares
    for a, b, c in rows:
        for part in parts:
            product(part.x_BRL, part.x_BRL, out=gram_GRR[part.place])
        product(gram_GRR, gram_GRR, gram_GRR, alpha=c, beta=b, out=poly_GRR)
        for x_BRL, spare_BRL, place in parts:
            torch.baddbmm(x_BRL, poly_GRR[place], x_BRL, beta=a, out=spare_BRL)
        parts = [part.swapped() for part in parts]
    return parts


def _gram(parts: list[Part], squares: Squares, rows: Rows, product: Product) -> list[Part]:
    """Iterates on X X^T alone, applying the accumulated factor once a segment.

    Polynomials of one Gram matrix commute, so each of their products is symmetric.

    `a I` goes into the factor, never into the polynomial: rounding `a` there costs stability.
    """
    gram_GRR, poly_GRR, factor_GRR, half_GRR = squares
    for segment in gram_segments(len(rows)):
        for part in parts:
            product(part.x_BRL, part.x_BRL, out=gram_GRR[part.place])
        for step in segment:
            a, b, c = rows[step]
            product(gram_GRR, gram_GRR, gram_GRR, alpha=c, beta=b, out=poly_GRR)
            if step != segment[-1]:
                product(gram_GRR, poly_GRR, gram_GRR, beta=a, out=half_GRR)
                product(poly_GRR, half_GRR, half_GRR, beta=a, out=gram_GRR)
            if step == segment[0]:
                # The polynomial is not needed again: it becomes the factor where it lies.
                factor_GRR, poly_GRR = poly_GRR, factor_GRR
                factor_GRR.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product(factor_GRR, poly_GRR, factor_GRR, beta=a, out=half_GRR)
                factor_GRR, half_GRR = half_GRR, factor_GRR
        for x_BRL, spare_BRL, place in parts:
            torch.bmm(factor_GRR[place], x_BRL, out=spare_BRL)
        parts = [part.swapped() for part in parts]
    return parts
