"""The kernel of gradient_share.py."""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch

BLOCK = 4096


def add_share_(total_P: Tensor, gradient_P: Tensor, share: float, first: bool) -> None:
    """See `gradient_share.add_share_`."""
    num_elements = total_P.numel()
    assert total_P.is_contiguous()
    assert gradient_P.is_contiguous()
    if num_elements:
        launch(
            _share_kernel, (ceil_div(num_elements, BLOCK),),
            total_P, gradient_P, num_elements, share, FIRST=first, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


@triton.jit
def _share_kernel(
    total_ptr, gradient_ptr, num_elements, share, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    result = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32) * share
    if not FIRST:
        result += tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + at, result.to(total_ptr.dtype.element_ty), mask=inside)
