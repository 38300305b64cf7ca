"""What a Newton-Schulz iteration costs, and which iteration and products to take for a shape.

Data and arithmetic, no tensors. R is the shorter side of a matrix, L the longer one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Iteration = Literal["standard", "gram"]
Products = Literal["torch", "symmetric"]

# The Gram iteration is started afresh after this many steps: float16 rounding makes small
# eigenvalues negative, and every further step on the same Gram matrix amplifies them.
RESTART_EVERY = 2


@dataclass(frozen=True)
class MethodChoice:
    """The iteration for one shape, what computes its products, and why."""

    method: Iteration
    reason: str
    products: Products = "torch"


class ProductCounts(NamedTuple):
    """Products of one matrix: X X^T, square ones of R x R, and a square one times X."""

    gram: int
    square: int
    wide: int


class Rates(NamedTuple):
    """TFLOP/s of each kind of product, counted as if no half of it were left out."""

    gram: float
    square: float
    wide: float
    source: str


class MeasuredAt(NamedTuple):
    """Whose rates: part of a GPU's name, the implementation, and the largest R they are for."""

    gpu: str
    products: Products
    largest_rows: int


# Filled from `epctl bench muon --products` (benchmarks/muon_h100_202611.md, muon_h200_202611.md);
# an entry of both implementations at a size makes `choose_iteration` go by time there.
RATES: dict[MeasuredAt, Rates] = {
    MeasuredAt("H100", "torch", 4096): Rates(770, 467, 708, "64 x 1408x2048, fp16, 2026-11-28"),
    MeasuredAt("H100", "symmetric", 4096): Rates(969, 919, 708, "the same run"),
    MeasuredAt("H200", "torch", 4096): Rates(781, 516, 721, "64 x 1408x2048, fp16, 2026-11-28"),
    MeasuredAt("H200", "symmetric", 4096): Rates(1113, 1000, 721, "the same run"),
}


def gram_segments(num_steps: int) -> list[range]:
    """Returns the steps between restarts: (0, 1), (2, 3, 4) for five.

    After step 2 is the only stable place for one restart; longer schedules need one after every
    second step. A single left-over step joins the segment before it, unless that is the first.
    """
    starts = list(range(0, num_steps, RESTART_EVERY))
    if num_steps > RESTART_EVERY + 1 and num_steps % RESTART_EVERY:
        starts.pop()
    return [range(begin, end) for begin, end in itertools.pairwise([*starts, num_steps])]


def count_products(method: Iteration, num_steps: int = 5) -> ProductCounts:
    """Returns how many products of each kind one matrix takes."""
    if method == "standard":
        return ProductCounts(num_steps, num_steps, num_steps)
    segments = gram_segments(num_steps)
    # Every step makes a polynomial; every step but a segment's first extends the factor, and for
    # each of those the Gram matrix goes on by two products.
    square = sum(len(segment) + 3 * (len(segment) - 1) for segment in segments)
    return ProductCounts(len(segments), square, len(segments))


def iteration_flops(
    method: Iteration,
    num_rows: int,
    num_columns: int,
    num_steps: int = 5,
    products: Products = "torch",
) -> int:
    """Returns the FLOPs of one matrix, two a multiply-add; symmetric products compute half."""
    short, long = sorted((num_rows, num_columns))
    counts = count_products(method, num_steps)
    # Of the two products with X, X X^T is symmetric and the one that gives X is not.
    symmetric = 2 * short * short * (counts.gram * long + counts.square * short)
    if products == "symmetric":
        symmetric //= 2
    return symmetric + 2 * short * short * long * counts.wide


def predicted_seconds(
    method: Iteration, num_rows: int, num_columns: int, rates: Rates, num_steps: int = 5
) -> float:
    """Returns the seconds of one matrix in a full batch at measured rates."""
    short, long = sorted((num_rows, num_columns))
    counts = count_products(method, num_steps)
    wide, square = 2e-12 * short * short * long, 2e-12 * short**3
    return (
        counts.gram * wide / rates.gram
        + counts.square * square / rates.square
        + counts.wide * wide / rates.wide
    )


def choose_method(
    num_rows: int, num_columns: int, num_steps: int = 5, products: Products = "torch"
) -> MethodChoice:
    """Returns the iteration of fewer FLOPs for a shape.

    Break-even of five steps is aspect 1.5, with symmetric products 1.0.
    """
    standard = iteration_flops("standard", num_rows, num_columns, num_steps, products)
    gram = iteration_flops("gram", num_rows, num_columns, num_steps, products)
    reason = f"{gram:,} FLOPs by gram, {standard:,} by standard"
    return MethodChoice("gram" if gram < standard else "standard", reason, products)


def choose_iteration(
    num_rows: int,
    num_columns: int,
    gpu: str | None,
    num_steps: int = 5,
    rates: Mapping[MeasuredAt, Rates] = RATES,
) -> MethodChoice:
    """Returns the fastest iteration and products for a shape on a GPU, where both are measured.

    Elsewhere torch's products stay, with the iteration of fewer FLOPs.

    Args:
        gpu: the GPU's name; None is a CPU.
    """
    by_flops = choose_method(num_rows, num_columns, num_steps)
    if gpu is None:
        return MethodChoice(by_flops.method, f"{by_flops.reason}; no GPU, so torch's products")
    found = {
        products: _rates_for(gpu, products, min(num_rows, num_columns), rates)
        for products in ("torch", "symmetric")
    }
    missing = [products for products, each in found.items() if each is None]
    if missing:
        why = f"torch's products: {' and '.join(missing)} not measured on {gpu} at this size"
        return MethodChoice(by_flops.method, f"{by_flops.reason}; {why}")
    return _fastest(num_rows, num_columns, num_steps, found)


def _rates_for(
    gpu: str, products: str, num_rows: int, rates: Mapping[MeasuredAt, Rates]
) -> Rates | None:
    fitting = [
        at
        for at in rates
        if at.gpu in gpu and at.products == products and num_rows <= at.largest_rows
    ]
    return rates[min(fitting, key=lambda at: at.largest_rows)] if fitting else None


def _fastest(
    num_rows: int, num_columns: int, num_steps: int, found: Mapping[str, Rates | None]
) -> MethodChoice:
    methods: tuple[Iteration, ...] = ("standard", "gram")
    implementations: tuple[Products, ...] = ("torch", "symmetric")
    seconds: dict[tuple[Iteration, Products], float] = {}
    for method, products in itertools.product(methods, implementations):
        rates = found[products]
        assert rates is not None
        seconds[method, products] = predicted_seconds(
            method, num_rows, num_columns, rates, num_steps
        )
    method, products = min(seconds, key=lambda each: seconds[each])
    shown = ", ".join(f"{1e6 * s:.0f} us {m} by {p}" for (m, p), s in seconds.items())
    return MethodChoice(method, f"at measured rates {shown}", products)
