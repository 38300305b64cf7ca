"""The kernels of gated_product.py."""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch

BLOCK = 2048
NUM_WARPS = 4


def product(gate_P: Tensor, up_P: Tensor) -> Tensor:
    """Returns `silu(gate) * up`."""
    result_P = torch.empty_like(gate_P)
    _launch(_forward_kernel, gate_P, up_P, result_P)
    return result_P


def product_gradients(gate_P: Tensor, up_P: Tensor, gradient_P: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up."""
    of_gate_P, of_up_P = torch.empty_like(gate_P), torch.empty_like(up_P)
    _launch(_backward_kernel, gate_P, up_P, gradient_P, of_gate_P, of_up_P)
    return of_gate_P, of_up_P


def _launch(kernel, *tensors: Tensor) -> None:
    num_elements = tensors[0].numel()
    if num_elements:
        grid = (ceil_div(num_elements, BLOCK),)
        launch(kernel, grid, *tensors, num_elements, BLOCK=BLOCK, num_warps=NUM_WARPS)


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, value, inside):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, result_ptr, num_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    gate = _load(gate_ptr, at, inside)
    _store(result_ptr, at, gate * tl.sigmoid(gate) * _load(up_ptr, at, inside), inside)


@triton.jit
def _backward_kernel(
    gate_ptr, up_ptr, gradient_ptr, of_gate_ptr, of_up_ptr, num_elements, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    gate, gradient = _load(gate_ptr, at, inside), _load(gradient_ptr, at, inside)
    share = tl.sigmoid(gate)
    slope = share * (1 + gate * (1 - share))
    _store(of_gate_ptr, at, gradient * _load(up_ptr, at, inside) * slope, inside)
    _store(of_up_ptr, at, gradient * gate * share, inside)
