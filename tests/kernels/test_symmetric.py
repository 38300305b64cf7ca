"""Symmetric products in Triton against the float32 product; on a CPU through the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from epctl.kernels.newton_schulz import orthogonalize

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
symmetric = pytest.importorskip("epctl.kernels.symmetric")
_triangle_place = symmetric._triangle_place


@triton.jit  # type: ignore[untyped-decorator]
def places(out_ptr, RATIO: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row, column = _triangle_place(tl.program_id(0), RATIO)
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
def test_in_the_interpreter(run_in_interpreter: Callable[..., str]) -> None:
    assert "passed" in run_in_interpreter(__file__)


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
        assert_symmetric_product(symmetric.symmetric_matmul(x, x), x @ x.mT, sizes[2])


@here
@pytest.mark.parametrize("size", [1, 64, 130])
def test_added_term_and_factors(size: int, device: torch.device) -> None:
    x = random(device, 2, size, size)
    gram = x @ x.mT / size
    found = symmetric.symmetric_matmul(gram, gram, gram, alpha=-2.5, beta=0.75)
    expected = -2.5 * gram @ gram + 0.75 * gram
    assert_symmetric_product(found, expected, size)


TILES = [  # every branch of the kernel, small enough for the interpreter
    symmetric.SymmetricTile(16, 16, 16, 4, 1, tma=False),
    symmetric.SymmetricTile(16, 32, 16, 4, 1, tma=False),
    symmetric.SymmetricTile(16, 16, 16, 4, 1, tma=True),
    symmetric.SymmetricTile(16, 32, 16, 4, 1, tma=True),
]


@here
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.label)
@pytest.mark.parametrize(
    ("num_rows", "num_summed"), [(1, 16), (15, 20), (32, 33), (48, 32), (60, 33)]
)
def test_every_tile_is_written_and_nothing_else(
    num_rows: int, num_summed: int, tile: Any, device: torch.device
) -> None:
    """Results start as NaN: a missed block would stay one. What surrounds them stays as it was."""
    x = random(device, 3, num_rows, num_summed)
    for operand in (x, x.mT.contiguous().mT):  # rows next to each other, then columns
        guarded = torch.full((5, num_rows, num_rows), torch.nan, device=device)
        added = x @ x.mT
        symmetric.symmetric_matmul(
            operand, operand, added, alpha=-0.5, beta=2.0, out=guarded[1:4], tile=tile
        )
        expected = -0.5 * x @ x.mT + 2.0 * added
        assert_symmetric_product(guarded[1:4], expected, num_summed)
        assert guarded[[0, 4]].isnan().all()


@here
def test_neighbours_of_a_result_are_left_alone(device: torch.device) -> None:
    x = random(device, 2, 20, 24)
    around = torch.full((4, 20, 20), 7.0, device=device)
    for tile in TILES:
        symmetric.symmetric_matmul(x, x, out=around[1:3], tile=tile)
        assert (around[0] == 7.0).all()
        assert (around[3] == 7.0).all()


@here
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.label)
def test_other_matrices_do_not_leak_into_a_result(tile: Any, device: torch.device) -> None:
    """A window spans all matrices: what it reads beyond one must not count, even if it is NaN."""
    x = random(device, 3, 20, 24)
    x[0] = x[2] = torch.nan
    for operand in (x, x.mT.contiguous().mT):
        found = symmetric.symmetric_matmul(operand, operand, tile=tile)
        assert_symmetric_product(found[1:2], x[1:2] @ x[1:2].mT, 24)


def test_tiles_compute_what_their_comment_says() -> None:
    def of_square(side: int, tile: Any) -> float:
        return tile.num_tiles(side) * tile.block_m * tile.block_n / side**2  # type: ignore[no-any-return]

    assert of_square(1408, symmetric.LARGE_TILE) == pytest.approx(0.545, abs=5e-4)
    assert of_square(576, symmetric.SMALL_TILE) == pytest.approx(0.617, abs=5e-4)
    half = torch.float16
    assert symmetric.choose_tile(1408, half).block_m == 128
    assert symmetric.choose_tile(2048, half).block_m == 128
    assert {symmetric.choose_tile(n, half).block_m for n in (64, 512, 576)} == {64}
    assert all(tile.block_n in (tile.block_m, 2 * tile.block_m) for tile in symmetric.CANDIDATES)


@here
@pytest.mark.parametrize("ratio", [1, 2])
def test_triangle_is_counted_right_for_every_size_in_use(ratio: int, device: torch.device) -> None:
    expected = [[row, column] for row in range(24) for column in range(row // ratio + 1)]
    tile = symmetric.SymmetricTile(1, ratio, 1, 4, 1)
    assert tile.num_tiles(24) == len(expected)
    out = torch.zeros(len(expected), 2, dtype=torch.int32, device=device)
    places[(len(expected),)](out, ratio)
    assert out.tolist() == expected


@here
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 70, 30), (3, 33, 33)])
def test_newton_schulz_on_symmetric_products(
    method: str,
    shape: tuple[int, int, int],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Small float32 products may agree to the bit on a GPU: that they ran is counted."""
    calls, product = [], symmetric.symmetric_matmul

    def counted(*inputs: Any, **options: Any) -> Tensor:
        calls.append(inputs)
        return product(*inputs, **options)

    monkeypatch.setattr(symmetric, "symmetric_matmul", counted)
    x = random(device, *shape)
    plain = orthogonalize(x, method=method, dtype=torch.float32, products="torch")  # type: ignore[arg-type]
    assert not calls
    found = orthogonalize(x, method=method, dtype=torch.float32, products="symmetric")  # type: ignore[arg-type]
    assert len(calls) >= 5
    assert float((found - plain).norm() / plain.norm()) < 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 1408, 2048), (4, 576, 2048), (64, 100, 63)])
def test_half_precision_on_a_gpu(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    x = (random(torch.device("cuda"), *sizes) / sizes[2] ** 0.5).to(dtype)
    found = symmetric.symmetric_matmul(x, x)
    expected = x.float() @ x.float().mT
    assert torch.equal(found, found.mT)
    roundoff = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    assert float((found.float() - expected).norm() / expected.norm()) <= 2 * roundoff


@here
@pytest.mark.parametrize("size", [5, 70])
def test_the_lower_triangle_decides(size: int, device: torch.device) -> None:
    """Shown on a product that is not symmetric, as rounding leaves those that should be."""
    left, right = random(device, 2, size, 30), random(device, 2, size, 32)[..., :30].contiguous()
    lower = (left @ right.mT).tril()
    expected = lower + lower.tril(-1).mT
    for tile in (None, *TILES):
        found = symmetric.symmetric_matmul(left, right, tile=tile)
        assert_symmetric_product(found, expected, 30)
