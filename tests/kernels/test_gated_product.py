"""SwiGLU's middle against float64, both ways; odd sizes, no elements, other layouts, extremes."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from epctl.kernels.gated_product import gated_product

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
RUNS_TRITON = INTERPRETING or torch.cuda.is_available()
# Roundings: float32's few operations; one to bfloat16, of torch's way some.
ALLOWED = {torch.float32: 8 * 2.0**-24, torch.bfloat16: 2.0**-7}


@pytest.fixture(autouse=True, params=["triton"] if INTERPRETING else ["reference", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton" and not RUNS_TRITON:
        pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1 (test_interpreter.py)")
    monkeypatch.setenv("EPCTL_KERNELS", request.param)
    name: str = request.param
    return name


def inputs(*shape: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and a gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, gradient = (
        (3 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(3)
    )
    return gate.requires_grad_(), up.requires_grad_(), gradient


def exact(gate: Tensor, up: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Value and gradients in float64, and what of each is added or multiplied, without signs."""
    gate, up = (x.detach().double().requires_grad_() for x in (gate, up))
    gradient = gradient.double()
    y = F.silu(gate) * up
    values = [y.detach(), *torch.autograd.grad(y, (gate, up), gradient)]
    gate, up, gradient = (x.detach().abs() for x in (gate, up, gradient))
    return list(zip(values, (gate * up, gradient * up * (1 + gate), gradient * gate), strict=True))


def assert_close(found: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    value, scale = expected
    assert found.isfinite().all()
    assert ((found.double() - value).abs() <= ALLOWED[found.dtype] * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (2, 3, 341), (5, 2048), (3, 1025)])
def test_value_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    gate, up, gradient = inputs(*shape, dtype=dtype, device=device)
    y = gated_product(gate, up)
    found = [y.detach(), *torch.autograd.grad(y, (gate, up), gradient)]
    for one, other in zip(found, exact(gate, up, gradient), strict=True):
        assert one.dtype == dtype
        assert_close(one, other)


def test_other_layouts(device: torch.device) -> None:
    gate, up, gradient = inputs(7, 12, dtype=torch.float32, device=device)
    y = gated_product(gate.t(), up.t())
    found = [y.detach().t(), *torch.autograd.grad(y, (gate, up), gradient.t())]
    for one, other in zip(found, exact(gate, up, gradient), strict=True):
        assert_close(one, other)


def test_extremes_stay_finite(device: torch.device) -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device, requires_grad=True)
    up = torch.ones_like(gate).requires_grad_()
    y = gated_product(gate, up)
    y.sum().backward()
    assert torch.equal(y.detach().cpu(), torch.tensor([-0.0, -0.0, 0.0, 100.0, 1e4]))
    assert gate.grad is not None
    torch.testing.assert_close(gate.grad.cpu(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_nothing_beside_it_is_written(implementation: str, device: torch.device) -> None:
    if implementation != "triton":
        pytest.skip("torch allocates what it writes")
    from epctl.kernels import gated_product_triton as kernels

    around = torch.full((3, 1500), torch.nan, device=device)
    gate, up = torch.randn(2, 1000, device=device)
    kernels._launch(kernels._forward_kernel, gate, up, around[1, 200:1200])
    assert around[1, 200:1200].isfinite().all()
    assert int(around.isnan().sum()) == 3 * 1500 - 1000
