"""Symmetric products in Triton against the float32 product; on a CPU through the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from epctl.kernels.newton_schulz import orthogonalize

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
symmetric = pytest.importorskip("epctl.kernels.symmetric")
_triangle_place = symmetric._triangle_place


@triton.jit  # type: ignore[untyped-decorator]
def places(out_ptr) -> None:  # type: ignore[no-untyped-def]
    row, column = _triangle_place(tl.program_id(0))
    tl.store(out_ptr + tl.program_id(0) * 2, row)
    tl.store(out_ptr + tl.program_id(0) * 2 + 1, column)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


here = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a GPU or the interpreter"
)
SIZES = [(1, 1, 1), (2, 7, 300), (3, 64, 64), (2, 63, 100), (1, 129, 65), (2, 200, 31), (0, 5, 5)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests below run on this GPU themselves")
@pytest.mark.skipif(interpreting(), reason="already in the interpreter")
def test_in_the_interpreter() -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stdout[-4000:]
    assert "passed" in completed.stdout


def random(device: torch.device, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(device)


def assert_symmetric_product(found: Tensor, expected: Tensor, num_summed: int) -> None:
    assert torch.equal(found, found.mT)
    allowed = 2.0**-22 * max(1, num_summed) ** 0.5 + 2.0**-23
    assert float((found - expected).norm()) <= allowed * float(expected.norm()) + 1e-12


@here
@pytest.mark.parametrize("sizes", SIZES)
def test_gram_of_rows_and_of_columns(sizes: tuple[int, int, int], device: torch.device) -> None:
    wide = random(device, *sizes)
    tall = random(device, sizes[0], sizes[2], sizes[1])
    for x in (wide, tall.mT):  # the second through its strides
        assert_symmetric_product(symmetric.symmetric_matmul(x, x.mT), x @ x.mT, sizes[2])


@here
@pytest.mark.parametrize("size", [1, 63, 64, 130])
def test_added_term_and_factors(size: int, device: torch.device) -> None:
    x = random(device, 2, size, size)
    gram = x @ x.mT / size
    found = symmetric.symmetric_matmul(gram, gram, gram, alpha=-2.5, beta=0.75)
    expected = -2.5 * gram @ gram + 0.75 * gram
    assert_symmetric_product(found, expected, size)


@here
def test_every_tile_of_a_large_triangle_is_written(device: torch.device) -> None:
    """Eleven rows of tiles as at 1,408, poisoned allocations: a missed tile would be NaN."""
    num_rows = 10 * symmetric.SMALL_BLOCK + 5  # above SMALL_ROWS: tiles of 128
    assert num_rows > symmetric.SMALL_ROWS
    x = random(device, 1, num_rows, 16)
    found = symmetric.symmetric_matmul(x, x.mT)
    assert_symmetric_product(found, x @ x.mT, 16)


@here
def test_triangle_is_counted_right_for_every_size_in_use(device: torch.device) -> None:
    num_rows = 40
    count = num_rows * (num_rows + 1) // 2
    out = torch.zeros(count, 2, dtype=torch.int32, device=device)
    places[(count,)](out)
    expected = [[row, column] for row in range(num_rows) for column in range(row + 1)]
    assert out.tolist() == expected


@here
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 70, 30), (3, 33, 33)])
def test_newton_schulz_on_symmetric_products(
    method: str, shape: tuple[int, int, int], device: torch.device
) -> None:
    x = random(device, *shape)
    plain = orthogonalize(x, method=method, dtype=torch.float32, products="torch")  # type: ignore[arg-type]
    found = orthogonalize(x, method=method, dtype=torch.float32, products="symmetric")  # type: ignore[arg-type]
    assert not torch.equal(found, plain)
    assert float((found - plain).norm() / plain.norm()) < 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 1408, 2048), (4, 576, 2048), (64, 100, 63)])
def test_half_precision_on_a_gpu(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    x = (random(torch.device("cuda"), *sizes) / sizes[2] ** 0.5).to(dtype)
    found = symmetric.symmetric_matmul(x, x.mT)
    expected = x.float() @ x.float().mT
    assert torch.equal(found, found.mT)
    roundoff = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    assert float((found.float() - expected).norm() / expected.norm()) <= 2 * roundoff


@here
@pytest.mark.parametrize("size", [5, 64, 100])
def test_the_lower_triangle_decides(size: int, device: torch.device) -> None:
    """Shown on a product that is not symmetric, as rounding leaves those that should be."""
    left, right = random(device, 2, size, 30), random(device, 2, 30, size)
    lower = (left @ right).tril()
    expected = lower + lower.tril(-1).mT
    assert_symmetric_product(symmetric.symmetric_matmul(left, right), expected, 30)
