"""Newton-Schulz orthogonalisation of batches of matrices.

Shape suffixes: B matrices of a batch, M rows, N columns, R the shorter of M and N.

Sources: Muon (K. Jordan, 2024) and Polar Express (Amsel et al., arXiv 2505.16932).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]

# Named tables: one row (a, b, c) a step of X <- a X + (b A + c A A) X with A = X X^T.
COEFFICIENTS: dict[str, Coefficients] = {
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}

# Below this norm a matrix counts as zero: float32 squares of its elements would underflow.
SMALLEST_NORM = 1e-20


def coefficient_table(name: str, num_steps: int) -> Coefficients:
    """Returns `num_steps` rows of a named table, its last row repeated where it is shorter.

    Raises ValueError for an unknown name, listing the known ones.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"coefficients {name!r} unknown; known: {', '.join(COEFFICIENTS)}")
    rows = list(COEFFICIENTS[name])
    return [rows[min(step, len(rows) - 1)] for step in range(num_steps)]


def orthogonalize(
    x_BMN: Tensor,
    *,
    num_steps: int = 5,
    coefficients: str = "you",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the approximate orthogonal polar factor of each matrix, float32, same shape.

    Each matrix is normalised in float32 before any cast. An exactly zero matrix stays zero, and
    every finite input gives a finite result, rank one and 1e-30 included.

    Args:
        x_BMN: any floating dtype; not modified.
        num_steps: rows taken from the coefficient table.
        dtype: dtype of the iteration; float32 by default.
    """
    work_BMN = _normalized(x_BMN.float())
    work_BMN = work_BMN.to(dtype or torch.float32)
    tall = work_BMN.shape[-2] > work_BMN.shape[-1]
    work_BRN = work_BMN.mT if tall else work_BMN
    for a, b, c in coefficient_table(coefficients, num_steps):
        gram_BRR = work_BRN @ work_BRN.mT
        poly_BRR = torch.baddbmm(gram_BRR, gram_BRR, gram_BRR, beta=b, alpha=c)
        work_BRN = torch.baddbmm(work_BRN, poly_BRR, work_BRN, beta=a)
    return (work_BRN.mT if tall else work_BRN).float()


def _normalized(x_BMN: Tensor) -> Tensor:
    """Divides each matrix by its Frobenius norm, in two steps so that squares cannot underflow."""
    largest_B11 = x_BMN.abs().amax(dim=(-2, -1), keepdim=True)
    unit_BMN = x_BMN / largest_B11.clamp_min(torch.finfo(torch.float32).tiny)
    norm_B11 = torch.linalg.vector_norm(unit_BMN, dim=(-2, -1), keepdim=True)
    return unit_BMN / norm_B11.clamp_min(SMALLEST_NORM)


def orthogonalize_flops(num_rows: int, num_columns: int, num_steps: int = 5) -> int:
    """Returns the multiply-add FLOPs of the standard iteration for one matrix."""
    short, long = sorted((num_rows, num_columns))
    return num_steps * (4 * short * short * long + 2 * short**3)
