"""Newton-Schulz orthogonalisation of batches of matrices, by the standard or the Gram iteration.

Shape suffixes: B matrices of a batch, M rows, N columns, R the shorter and L the longer of M and N.

Sources: Muon (K. Jordan, 2024), Polar Express (Amsel et al., arXiv 2505.16932), Gram Newton-Schulz
with restart (Zhang, Amsel, Chen, Dao, 2026).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from epctl.kernels.newton_schulz_chain import Chain, iterate_jointly_
from epctl.kernels.newton_schulz_cost import MethodChoice, Products, choose_iteration, choose_method
from epctl.kernels.tiles import device_name

Coefficients = Sequence[tuple[float, float, float]]
Method = Literal["auto", "standard", "gram"]

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


def coefficient_table(name: str, num_steps: int) -> Coefficients:
    """Returns `num_steps` rows of a named table, its last row repeated where it is shorter.

    Raises ValueError for an unknown name, listing the known ones.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"coefficients {name!r} unknown; known: {', '.join(COEFFICIENTS)}")
    rows = COEFFICIENTS[name]
    return [rows[min(step, len(rows) - 1)] for step in range(num_steps)]


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype to iterate in: float16 on a GPU, float32 on a CPU.

    Not bfloat16: its rounding of a rank-poor matrix, amplified by the polynomial, exceeds the
    update itself (rank 1: 118 %; float16: 10 to 16 %).
    """
    return torch.float16 if device.type == "cuda" else torch.float32


def resolve_iteration(
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_steps: int = 5,
    method: Method = "auto",
    products: Products | Literal["auto"] = "auto",
) -> MethodChoice:
    """Returns the iteration and the implementation of its products for matrices of a shape.

    Raises:
        ValueError: `gram` in bfloat16.
    """
    if method == "gram" and dtype == torch.bfloat16:
        raise ValueError("gram Newton-Schulz in bfloat16 is wrong on rank-poor matrices")
    if products == "auto":
        chosen = _chosen(*shape, device_name(device) if device.type == "cuda" else None, num_steps)
    else:
        chosen = choose_method(*shape, num_steps, products)
    if method == "auto" and dtype == torch.bfloat16:
        return MethodChoice("standard", "gram is wrong in bfloat16", chosen.products)
    return chosen if method == "auto" else MethodChoice(method, "named", chosen.products)


@functools.cache
def _chosen(num_rows: int, num_columns: int, gpu: str | None, num_steps: int) -> MethodChoice:
    """`choose_iteration`, whose reasons take the host longer to write than a launch."""
    return choose_iteration(num_rows, num_columns, gpu, num_steps)


def orthogonalize(
    x_BMN: Tensor,
    *,
    num_steps: int = 5,
    coefficients: str = "you",
    method: Method = "auto",
    dtype: torch.dtype | None = None,
    products: Products | Literal["auto"] = "auto",
    use_graphs: bool = False,
    at_once: int | None = None,
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
        products: `symmetric` computes half of what is symmetric, in Triton; `torch` all of it;
            `auto` goes by the measured rates in newton_schulz_cost.py.
        use_graphs: replay the iteration as a CUDA graph where its products end before the host has
            launched the next; no effect on a CPU.
        at_once: matrices that go through the iteration together; by default what
            `newton_schulz_chain.matrices_at_once` says.

    Raises:
        ValueError: unknown coefficients, or `gram` in bfloat16.
    """
    assert x_BMN.ndim == 3, f"expected a batch of matrices, got shape {tuple(x_BMN.shape)}"
    dtype = dtype or iteration_dtype(x_BMN.device)
    work_BMN = normalize(x_BMN).to(dtype).contiguous()
    orthogonalize_normal_(
        work_BMN,
        num_steps=num_steps,
        coefficients=coefficients,
        method=method,
        products=products,
        use_graphs=use_graphs,
        at_once=at_once,
    )
    return work_BMN.float()


def orthogonalize_normal_(
    *batches: Tensor,
    num_steps: int = 5,
    coefficients: str = "you",
    method: Method = "auto",
    products: Products | Literal["auto"] = "auto",
    use_graphs: bool = False,
    at_once: int | None = None,
) -> None:
    """Orthogonalises matrices of norm one (or zero) in place, in their own dtype; contiguous.

    Batches that share a short side, device, dtype and iteration go through its products together.
    The rest is as in `orthogonalize`.
    """
    rows = tuple(coefficient_table(coefficients, num_steps))
    joint: dict[tuple[Chain, int], list[Tensor]] = {}
    for x_BMN in batches:
        num_rows, num_columns = x_BMN.shape[-2:]
        chosen = resolve_iteration(
            (num_rows, num_columns), x_BMN.device, x_BMN.dtype,
            num_steps=num_steps, method=method, products=products,
        )  # fmt: skip
        chain = Chain(chosen.method, chosen.products, rows, at_once)
        joint.setdefault((chain, min(num_rows, num_columns)), []).append(x_BMN)
    for (chain, _), together in joint.items():
        iterate_jointly_(together, chain, use_graphs=use_graphs)


def normalize(x_BMN: Tensor) -> Tensor:
    """Returns each matrix over its Frobenius norm in float32; an exactly zero one stays zero.

    In two steps, by the largest element and then by the norm: squares of the scaled elements can
    neither overflow nor underflow, and nothing is cast before it has norm one.
    """
    x_BMN = x_BMN.float()
    # By both ends: the largest absolute value without a copy of absolute values.
    low_B11, high_B11 = (end(x_BMN, dim=(-2, -1), keepdim=True) for end in (torch.amin, torch.amax))
    largest_B11 = torch.maximum(high_B11, -low_B11)
    unit_BMN = x_BMN / largest_B11.clamp_min(torch.finfo(torch.float32).tiny)
    norm_B11 = torch.linalg.vector_norm(unit_BMN, dim=(-2, -1), keepdim=True)
    normal_BMN: Tensor = unit_BMN.div_(norm_B11.clamp_min(SMALLEST_NORM))
    return normal_BMN
