"""A share added to a sum: exact for halves, rounded once for thirds, over whatever was there."""

from __future__ import annotations

import os

import pytest
import torch

from epctl.kernels.gradient_share import add_share_

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
RUNS_TRITON = INTERPRETING or torch.cuda.is_available()


@pytest.fixture(autouse=True, params=["triton"] if INTERPRETING else ["reference", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "triton" and not RUNS_TRITON:
        pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1 (test_interpreter.py)")
    monkeypatch.setenv("EPCTL_KERNELS", request.param)


@pytest.mark.parametrize("share", [1.0, 0.25, 1 / 3])
@pytest.mark.parametrize("size", [0, 1, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share(share: float, size: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(size)
    gradient_P = torch.randn(size, generator=generator).to(device, dtype)
    total_P = torch.full((size,), float("nan"), device=device)
    exact = gradient_P.double() * share
    add_share_(total_P, gradient_P, share, first=True)
    torch.testing.assert_close(total_P.double(), exact, rtol=2**-23, atol=0.0)
    add_share_(total_P, gradient_P, share, first=False)
    torch.testing.assert_close(total_P.double(), 2 * exact, rtol=2**-22, atol=0.0)


def test_a_gradient_laid_out_otherwise(device: torch.device) -> None:
    gradient = torch.arange(12.0, device=device).view(3, 4).t()
    total = torch.zeros(4, 3, device=device)
    add_share_(total, gradient, 0.5, first=False)
    assert torch.equal(total, gradient * 0.5)
