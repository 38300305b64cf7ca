"""Newton-Schulz against the float64 value of the same polynomial, by SVD."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from epctl.config import resolve_config
from epctl.kernels import newton_schulz_chain
from epctl.kernels.newton_schulz import COEFFICIENTS, coefficient_table, normalize, orthogonalize
from epctl.kernels.newton_schulz_cost import choose_method, gram_segments, iteration_flops
from epctl.runtime.muon_rule import MuonRule

METHODS = ("standard", "gram")
SHAPE = (88, 128)  # Moonlight's experts, 1408 x 2048, over 16


def polynomial_by_svd(x_MN: Tensor, coefficients: str, num_steps: int = 5) -> Tensor:
    """The exact value of the iteration: the polynomial on the singular values, in float64."""
    x_MN = x_MN.double()
    left, values, right = torch.linalg.svd(x_MN / x_MN.norm(), full_matrices=False)
    for a, b, c in coefficient_table(coefficients, num_steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def matrix_of_rank(rank: int, shape: tuple[int, int] = SHAPE, seed: int = 42) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    short = min(shape)
    if rank == short:  # singular values from 1 to 0.1
        left = torch.linalg.qr(torch.randn(shape[0], short, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(shape[1], short, generator=generator)).Q
        return left @ torch.diag(torch.logspace(0, -1, short)) @ right.T
    left = torch.randn(shape[0], rank, generator=generator)
    return left @ torch.randn(rank, shape[1], generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def largest_singular_value(x_MN: Tensor) -> float:
    return float(torch.linalg.svdvals(x_MN.double())[0])


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(88, 128), (128, 88), (64, 64), (63, 100), (7, 512)])
def test_float32_iteration_equals_the_polynomial_at_full_rank(
    name: str, method: Any, shape: tuple[int, int]
) -> None:
    x_MN = matrix_of_rank(min(shape), shape)
    result = orthogonalize(x_MN[None], coefficients=name, method=method)[0]
    # Rounding of the input grows by the polynomial's slope at zero: the product of all `a`.
    gain = math.prod(a for a, _, _ in COEFFICIENTS[name])
    assert relative_error(result, polynomial_by_svd(x_MN, name)) < gain * 2.0**-24


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("method", METHODS)
def test_float16_iteration_meets_the_error_bars(name: str, method: Any) -> None:
    bars = {88: 5e-3, 64: 0.1}
    for rank, bar in bars.items():
        x_MN = matrix_of_rank(rank)
        result = orthogonalize(x_MN[None], coefficients=name, method=method, dtype=torch.float16)
        assert relative_error(result[0], polynomial_by_svd(x_MN, name)) <= bar
        assert largest_singular_value(result[0]) <= 1.25


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_singular_values_of_a_full_rank_matrix_land_in_a_band_around_one(
    name: str, method: Any, dtype: torch.dtype
) -> None:
    result = orthogonalize(matrix_of_rank(88)[None], coefficients=name, method=method, dtype=dtype)[
        0
    ]
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e4, 1e30])
def test_cast_before_normalisation_scale_does_not_matter(
    method: Any, dtype: torch.dtype, scale: float
) -> None:
    """Casting first overflows at 1e4 in float16 and loses everything below 1e-8."""
    x_MN = matrix_of_rank(88)
    expected = polynomial_by_svd(x_MN, "you")
    result = orthogonalize((x_MN * scale)[None], method=method, dtype=dtype)[0]
    assert relative_error(result, expected) <= 5e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rank_one_keeps_its_direction_and_stays_bounded(method: Any, dtype: torch.dtype) -> None:
    x_MN = matrix_of_rank(1)
    result = orthogonalize(x_MN[None], method=method, dtype=dtype)[0]
    left, _, right = torch.linalg.svd(x_MN.double(), full_matrices=False)
    along = float(left[:, 0] @ result.double() @ right[0])
    assert along == pytest.approx(float(polynomial_by_svd(x_MN, "you").norm()), abs=0.02)
    assert largest_singular_value(result) <= 1.25


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exactly_zero_stays_zero_and_leaves_its_batch_alone(
    method: Any, dtype: torch.dtype
) -> None:
    batch = torch.stack([torch.zeros(SHAPE), matrix_of_rank(64), torch.zeros(SHAPE)])
    result = orthogonalize(batch, method=method, dtype=dtype)
    assert result[0].abs().max() == 0
    assert result[2].abs().max() == 0
    assert relative_error(result[1], polynomial_by_svd(batch[1], "you")) <= 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 96), (96, 1), (1, 1)])
def test_a_vector_becomes_itself_at_the_polynomials_length(
    method: Any, shape: tuple[int, int]
) -> None:
    x_MN = matrix_of_rank(1, shape, seed=7)
    result = orthogonalize(x_MN[None], method=method)[0]
    assert relative_error(result, polynomial_by_svd(x_MN, "you")) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_matrices_one_by_one(method: Any) -> None:
    batch = torch.stack([matrix_of_rank(88, seed=s) * 10.0**s for s in range(4)])
    together = orthogonalize(batch, method=method)
    for x_MN, result in zip(batch, together, strict=True):
        alone = orthogonalize(x_MN[None], method=method)[0]
        # Not bit-equal: the library's kernel depends on the batch size.
        assert relative_error(result, alone.double()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_tall_is_the_transpose_of_wide(method: Any) -> None:
    wide = matrix_of_rank(88)[None]
    tall = orthogonalize(wide.mT, method=method)
    assert relative_error(tall.mT, orthogonalize(wide, method=method).double()) < 1e-5


def test_input_is_not_modified() -> None:
    x_BMN = matrix_of_rank(88)[None]
    before = x_BMN.clone()
    orthogonalize(x_BMN)
    assert torch.equal(x_BMN, before)


def test_gram_restarts_after_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {steps: [len(segment) for segment in gram_segments(steps)] for steps in range(1, 8)}
    assert gram_segments(5) == [range(2), range(2, 5)]
    assert lengths == {1: [1], 2: [2], 3: [2, 1], 4: [2, 2], 5: [2, 3], 6: [2, 2, 2], 7: [2, 2, 3]}
    # Without the restart float16 loses a rank-poor matrix, which is what the restart is for.
    x_MN = matrix_of_rank(8)
    expected = polynomial_by_svd(x_MN, "you")

    def error() -> float:
        result = orthogonalize(x_MN[None], method="gram", dtype=torch.float16)[0]
        return relative_error(result, expected)

    with_restart = error()
    monkeypatch.setattr(newton_schulz_chain, "gram_segments", lambda steps: [range(steps)])
    without = error()
    assert with_restart < 0.1
    assert without > 5 * with_restart


def test_gram_in_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        orthogonalize(matrix_of_rank(88)[None], method="gram", dtype=torch.bfloat16)


def test_cost_table_matches_the_published_counts() -> None:
    """20a + 10 and 28 + 8a in units of n^3; standard for experts, gram for kv_b_proj."""
    for aspect in (1, 2, 4, 8):
        assert iteration_flops("standard", 64, 64 * aspect) == (20 * aspect + 10) * 64**3
        assert iteration_flops("gram", 64 * aspect, 64) == (28 + 8 * aspect) * 64**3
    assert choose_method(1408, 2048).method == "standard"
    assert choose_method(4096, 512).method == "gram"
    assert choose_method(2048, 2048).method == "standard"


def test_auto_follows_the_cost_table() -> None:
    wide = matrix_of_rank(16, (16, 128))[None]
    assert torch.equal(orthogonalize(wide), orthogonalize(wide, method="gram"))
    assert not torch.equal(orthogonalize(wide), orthogonalize(wide, method="standard"))
    square = matrix_of_rank(64, (64, 64))[None]
    assert torch.equal(orthogonalize(square), orthogonalize(square, method="standard"))


@pytest.mark.parametrize("lowest", [1.0, 0.1, 0.01])
def test_the_default_table_is_the_nearest_to_the_polar_factor(lowest: float) -> None:
    """All tables of five steps cost the same, so the most accurate one is the default."""
    values = torch.logspace(0, math.log10(lowest), 88, dtype=torch.float64)
    x_MN = torch.diag(values)
    distances = {
        name: float((polynomial_by_svd(x_MN, name) - torch.eye(88)).norm() / 88**0.5)
        for name in COEFFICIENTS
    }
    defaults = (MuonRule().coefficients, resolve_config(flags={}).config.optim.coefficients)
    assert defaults == ("you", "you")
    assert min(distances, key=lambda name: distances[name]) == "you"
    assert {len(rows) for rows in COEFFICIENTS.values()} == {5}
    x_BMN = x_MN[None].float()
    assert torch.equal(orthogonalize(x_BMN), orthogonalize(x_BMN, coefficients="you"))


def test_unknown_coefficients_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"jordan, you, polar_express_1\.05"):
        coefficient_table("polar_express", 5)


def test_normalized_matrices_have_norm_one_at_any_scale() -> None:
    for scale in (1e-38, 1e-30, 1.0, 1e30):
        x_BMN = matrix_of_rank(88)[None] * scale
        assert math.isclose(float(normalize(x_BMN).norm()), 1.0, rel_tol=1e-5)
