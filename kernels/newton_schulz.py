"""Newton-Schulz orthogonalisation of batches of matrices, by the standard or the Gram iteration.

Shape suffixes: B matrices of a batch, M rows, N columns, R the shorter and L the longer of M and N.

Sources: Muon (K. Jordan, 2024), Polar Express (Amsel et al., arXiv 2505.16932), Gram Newton-Schulz
with restart (Zhang, Amsel, Chen, Dao, 2026).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]
Product = Callable[..., Tensor]
Method = Literal["auto", "standard", "gram"]
Products = Literal["torch", "symmetric"]

# The published Polar Express polynomials, optimal for singular values in [1e-3, 1].
_POLAR_EXPRESS: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def with_safety_factor(rows: Coefficients, factor: float) -> Coefficients:
    """Returns rows whose polynomials see `x / factor`, so rounding above 1 cannot diverge."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in rows)


# Named tables: one row (a, b, c) a step of X <- a X + (b A + c A A) X with A = X X^T. At least four
# tables circulate as "Polar Express", so the factor is part of the name; 1.01 is left out because
# the Gram iteration diverges with it.
COEFFICIENTS: dict[str, Coefficients] = {
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express_1.05": with_safety_factor(_POLAR_EXPRESS, 1.05),
    "polar_express_1.02": with_safety_factor(_POLAR_EXPRESS, 1.02),
}

# Below this norm a matrix counts as zero: float32 squares of its elements would underflow.
SMALLEST_NORM = 1e-20

# The Gram iteration is started afresh after this many steps: float16 rounding makes small
# eigenvalues negative, and every further step on the same Gram matrix amplifies them.
RESTART_EVERY = 2


@dataclass(frozen=True)
class MethodChoice:
    """The iteration for one shape, and why."""

    method: Literal["standard", "gram"]
    reason: str


def coefficient_table(name: str, num_steps: int) -> Coefficients:
    """Returns `num_steps` rows of a named table, its last row repeated where it is shorter.

    Raises ValueError for an unknown name, listing the known ones.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"coefficients {name!r} unknown; known: {', '.join(COEFFICIENTS)}")
    rows = COEFFICIENTS[name]
    return [rows[min(step, len(rows) - 1)] for step in range(num_steps)]


def gram_segments(num_steps: int) -> list[range]:
    """Returns the steps between restarts: (0, 1), (2, 3, 4) for five.

    After step 2 is the only stable place for one restart; longer schedules need one after every
    second step. A single left-over step joins the segment before it, unless that is the first.
    """
    starts = list(range(0, num_steps, RESTART_EVERY))
    if num_steps > RESTART_EVERY + 1 and num_steps % RESTART_EVERY:
        starts.pop()
    return [range(begin, end) for begin, end in itertools.pairwise([*starts, num_steps])]


def iteration_flops(
    method: Literal["standard", "gram"],
    num_rows: int,
    num_columns: int,
    num_steps: int = 5,
    products: Products = "torch",
) -> int:
    """Returns the FLOPs of one matrix, two a multiply-add; symmetric products compute half."""
    short, long = sorted((num_rows, num_columns))
    wide, square = 2 * short * short * long, 2 * short**3
    # Of the two wide products, X X^T is symmetric and the one that gives X is not.
    gram, square = (wide // 2, square // 2) if products == "symmetric" else (wide, square)
    if method == "standard":
        return num_steps * (gram + wide + square)
    total = 0
    for segment in gram_segments(num_steps):
        num_later = len(segment) - 1
        total += gram + wide + (len(segment) + num_later + 2 * num_later) * square
    return total


def choose_method(
    num_rows: int, num_columns: int, num_steps: int = 5, products: Products = "torch"
) -> MethodChoice:
    """Returns the cheaper iteration for a shape.

    Break-even of five steps is aspect 1.5, with symmetric products 1.0.
    """
    standard = iteration_flops("standard", num_rows, num_columns, num_steps, products)
    gram = iteration_flops("gram", num_rows, num_columns, num_steps, products)
    ratio = f"{gram:,} FLOPs by gram, {standard:,} by standard"
    return MethodChoice("gram" if gram < standard else "standard", ratio)


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype to iterate in: float16 on a GPU, float32 on a CPU.

    Not bfloat16: its rounding of a rank-poor matrix, amplified by the polynomial, exceeds the
    update itself (rank 1: 118 %; float16: 10 to 16 %).
    """
    return torch.float16 if device.type == "cuda" else torch.float32


def orthogonalize(
    x_BMN: Tensor,
    *,
    num_steps: int = 5,
    coefficients: str = "you",
    method: Method = "auto",
    dtype: torch.dtype | None = None,
    products: Products = "torch",
) -> Tensor:
    """Returns the approximate orthogonal polar factor of each matrix, float32, contiguous.

    Each matrix is normalised in float32 before any cast. An exactly zero matrix stays zero, and
    every finite input gives a finite result, rank one and 1e-30 included.

    Args:
        x_BMN: any floating dtype; not modified.
        num_steps: rows taken from the coefficient table.
        coefficients: a key of `COEFFICIENTS`.
        method: `standard`, `gram`, or by cost.
        dtype: dtype of the iteration; `iteration_dtype` of the device by default.
        products: `symmetric` computes half of what is symmetric, in Triton; `torch` all of it.

    Raises:
        ValueError: unknown coefficients, or `gram` in bfloat16.
    """
    assert x_BMN.ndim == 3, f"expected a batch of matrices, got shape {tuple(x_BMN.shape)}"
    rows = coefficient_table(coefficients, num_steps)
    dtype = dtype or iteration_dtype(x_BMN.device)
    if method == "auto":
        num_rows, num_columns = x_BMN.shape[-2:]
        cheaper = choose_method(num_rows, num_columns, num_steps, products).method
        method = "standard" if dtype == torch.bfloat16 else cheaper
    if method == "gram" and dtype == torch.bfloat16:
        raise ValueError("gram Newton-Schulz in bfloat16 is wrong on rank-poor matrices")
    work_BMN = normalize(x_BMN).to(dtype)
    tall = work_BMN.shape[-2] > work_BMN.shape[-1]
    work_BRL = work_BMN.mT if tall else work_BMN
    iterate = _gram if method == "gram" else _standard
    work_BRL = iterate(work_BRL, rows, _symmetric_product if products == "symmetric" else _product)
    return (work_BRL.mT if tall else work_BRL).float().contiguous()


def _product(
    left: Tensor, right: Tensor, added: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Returns `alpha * left @ right + beta * added`, all of it."""
    if added is None:
        assert alpha == 1.0
        return left @ right
    return torch.baddbmm(added, left, right, beta=beta, alpha=alpha)


def _symmetric_product(
    left: Tensor, right: Tensor, added: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    from epctl.kernels.symmetric import symmetric_matmul

    return symmetric_matmul(left, right, added, alpha=alpha, beta=beta)


def _standard(x_BRL: Tensor, rows: Coefficients, product: Product) -> Tensor:
    for a, b, c in rows:
        gram_BRR = product(x_BRL, x_BRL.mT)
        poly_BRR = product(gram_BRR, gram_BRR, gram_BRR, alpha=c, beta=b)
        x_BRL = torch.baddbmm(x_BRL, poly_BRR, x_BRL, beta=a)
    return x_BRL


def _gram(x_BRL: Tensor, rows: Coefficients, product: Product) -> Tensor:
    """Iterates on X X^T alone, applying the accumulated factor once a segment.

    Polynomials of one Gram matrix commute, so each of their products is symmetric.

    `a I` goes into the factor, never into the polynomial: rounding `a` there costs stability.
    """
    for segment in gram_segments(len(rows)):
        gram_BRR = product(x_BRL, x_BRL.mT)
        factor_BRR = gram_BRR  # replaced in the first step
        for step in segment:
            a, b, c = rows[step]
            poly_BRR = product(gram_BRR, gram_BRR, gram_BRR, alpha=c, beta=b)
            if step == segment[0]:
                factor_BRR = poly_BRR.clone()
                factor_BRR.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                factor_BRR = product(factor_BRR, poly_BRR, factor_BRR, beta=a)
            if step != segment[-1]:
                half_BRR = product(gram_BRR, poly_BRR, gram_BRR, beta=a)
                gram_BRR = product(poly_BRR, half_BRR, half_BRR, beta=a)
        x_BRL = factor_BRR @ x_BRL
    return x_BRL


def normalize(x_BMN: Tensor) -> Tensor:
    """Returns each matrix over its Frobenius norm in float32; an exactly zero one stays zero.

    In two steps, by the largest element and then by the norm: squares of the scaled elements can
    neither overflow nor underflow, and nothing is cast before it has norm one.
    """
    x_BMN = x_BMN.float()
    largest_B11 = x_BMN.abs().amax(dim=(-2, -1), keepdim=True)
    unit_BMN = x_BMN / largest_B11.clamp_min(torch.finfo(torch.float32).tiny)
    norm_B11 = torch.linalg.vector_norm(unit_BMN, dim=(-2, -1), keepdim=True)
    normal_BMN: Tensor = unit_BMN / norm_B11.clamp_min(SMALLEST_NORM)
    return normal_BMN
