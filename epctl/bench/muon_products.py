"""`epctl bench muon --products`: each kind of product of the iteration alone, by size and tile.

Its rates go into kernels/newton_schulz_cost.py, its fastest tiles into kernels/symmetric.py. Shape
suffixes: see kernels/newton_schulz.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epctl.bench.device import clock_of
from epctl.bench.measure import sample_interleaved, spread
from epctl.bench.muon_shapes import MatrixBatch
from epctl.errors import GateError
from epctl.kernels.newton_schulz import iteration_dtype

# Half a unit in the last place of float16, and sums in float32: twice that is another product.
ERROR_BAR = {torch.float16: 2.0**-10, torch.float32: 2.0**-18}


class Operands(NamedTuple):
    """What the products of one batch are made of."""

    x_BRL: Tensor
    gram_BRR: Tensor
    out_BRR: Tensor
    out_BRL: Tensor


class Product(NamedTuple):
    """One kind of product: what the library runs, and what half of it is needed for."""

    name: str
    by_torch: Callable[[Operands], Tensor]
    by_symmetric: Callable[[Operands, Any], Tensor] | None
    reference: Callable[[Operands], Tensor]


def _symmetric(operands: Operands, tile: Any, *, squares: bool) -> Tensor:
    from epctl.kernels.symmetric import symmetric_matmul

    out = operands.out_BRR
    if not squares:
        return symmetric_matmul(operands.x_BRL, operands.x_BRL, out=out, tile=tile)
    gram = operands.gram_BRR
    return symmetric_matmul(gram, gram, gram, alpha=0.5, beta=2.0, out=out, tile=tile)


PRODUCTS = (
    Product(
        "X X^T",
        lambda o: torch.bmm(o.x_BRL, o.x_BRL.mT, out=o.out_BRR),
        functools.partial(_symmetric, squares=False),
        lambda o: o.x_BRL.float() @ o.x_BRL.float().mT,
    ),
    Product(
        "R R",
        lambda o: torch.baddbmm(
            o.gram_BRR, o.gram_BRR, o.gram_BRR, beta=2.0, alpha=0.5, out=o.out_BRR
        ),
        functools.partial(_symmetric, squares=True),
        lambda o: 0.5 * o.gram_BRR.float() @ o.gram_BRR.float() + 2.0 * o.gram_BRR.float(),
    ),
    Product(
        "Q X",
        lambda o: torch.bmm(o.gram_BRR, o.x_BRL, out=o.out_BRL),
        None,
        lambda o: o.gram_BRR.float() @ o.x_BRL.float(),
    ),
)


def product_rows(
    batch: MatrixBatch, device: torch.device, matmul_tflops: float, repeats: tuple[int, int]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns a row for each product and implementation, and what could not run.

    Args:
        matmul_tflops: of one large product in this process: the floor, of half the work where the
            result is symmetric.
        repeats: warm-up calls and timed rounds.

    Raises:
        GateError: a product is wrong.
    """
    operands = _operands(batch, device)
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for product in PRODUCTS:
        label = f"{batch.label} {product.name}"
        runs: dict[str, Callable[[], Tensor]] = {
            "torch": functools.partial(product.by_torch, operands)
        }
        if product.by_symmetric is not None:
            for tile in _tiles(device):
                by_tile = functools.partial(product.by_symmetric, operands, tile)
                runs[f"symmetric {tile.label}"] = by_tile
        errors: dict[str, float] = {}
        for name, run in list(runs.items()):
            try:
                errors[name] = _gate(run, product, operands, f"{name} at {label}")
            except GateError:
                raise
            except Exception as error:  # a tile too large for this GPU: the others go on
                absent[f"{name} at {label}"] = f"{type(error).__name__}: {error}"[:200]
                del runs[name]
        if device.type == "cuda":
            runs = {name: _without_host(run) for name, run in runs.items()}
        samples = sample_interleaved(
            runs, warm_up=repeats[0], rounds=repeats[1], clock=clock_of(device)
        )
        for name in runs:
            milliseconds = spread([1e3 * seconds for seconds in samples[name]])
            rows.append(
                {
                    "batch": label,
                    "implementation": name,
                    "num_measured": batch.num_measured,
                    "error": errors[name],
                    "gate": {"error": errors[name]},
                    "ms": milliseconds._asdict(),
                    **_rates(product, operands, milliseconds.median / 1e3, matmul_tflops),
                }
            )
    return rows, absent


def _without_host(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns the replay of a graph: a small product ends before the next one is launched."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


def _operands(batch: MatrixBatch, device: torch.device) -> Operands:
    dtype = iteration_dtype(device)
    shape = (batch.num_measured, batch.num_rows, batch.num_columns)
    generator = torch.Generator(device).manual_seed(0)
    x_BMN = torch.randn(shape, device=device, generator=generator).to(dtype)
    x_BMN /= max(batch.num_rows, batch.num_columns) ** 0.5
    x_BRL = x_BMN.mT if batch.num_rows > batch.num_columns else x_BMN
    gram_BRR = x_BRL @ x_BRL.mT
    gram_BRR = ((gram_BRR + gram_BRR.mT) / 2).contiguous()
    return Operands(x_BRL, gram_BRR, torch.empty_like(gram_BRR), torch.empty_like(x_BRL))


def _tiles(device: torch.device) -> Sequence[Any]:
    if device.type != "cuda":
        return ()
    from epctl.kernels.symmetric import CANDIDATES

    return CANDIDATES


def _gate(run: Callable[[], Tensor], product: Product, operands: Operands, where: str) -> float:
    found = run()[:1].float()
    first = Operands(*(tensor[:1] for tensor in operands))
    expected = product.reference(first)
    error = float((found - expected).norm() / expected.norm())
    bar = ERROR_BAR[operands.x_BRL.dtype]
    if not error <= bar:
        raise GateError(f"{where}: error is {error:.2e}, {bar:.2e} allowed")
    return error


def _rates(
    product: Product, operands: Operands, seconds: float, matmul_tflops: float
) -> dict[str, float]:
    num_matrices, short, long = operands.x_BRL.shape
    inner = short if product.name == "R R" else long
    flops = 2.0 * num_matrices * short * short * inner
    half = 0.5 if product.by_symmetric is not None else 1.0
    floor = half * flops / (matmul_tflops * 1e12)
    return {
        "tflops": flops / seconds / 1e12,
        "floor_ms": 1e3 * floor,
        "of_floor": floor / seconds,
    }
