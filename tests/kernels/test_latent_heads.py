"""Queries and keys of latent attention against float64 formulas, both ways, odd sizes and layouts.

By the reference on a CPU, by Triton on a GPU or in its interpreter (test_interpreter.py). Shape
suffixes as in latent_heads.py.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from epctl.kernels.latent_heads import Rotation, expand_keys, rotate_queries

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
# B, S, H, N, R, V: the usual, odd ones, more heads than a program takes, none without a position
SHAPES = [(2, 5, 4, 16, 8, 16), (1, 3, 3, 5, 6, 7), (1, 2, 19, 9, 2, 4), (2, 3, 1, 0, 4, 1)]
LAYOUTS = ["one", "each"]


@pytest.fixture(autouse=True)
def _triton_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        monkeypatch.setenv("EPCTL_KERNELS", "triton")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def angles(batch: int, length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines in transformers' form: each half the same."""
    half = random(batch, length, size // 2, seed=3)
    both = torch.cat((half, half), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """transformers' formula: pairs become halves, then `x cos + rotate_half(x) sin`."""
    if interleaved:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(2)


def expected_queries(q: Tensor, rotation: Rotation) -> Tensor:
    size = q.shape[-1] - rotation.cos.shape[-1]
    parts = q[..., :size], rotated(q[..., size:], *rotation)
    return torch.cat(parts, dim=-1).transpose(1, 2)


def expected_keys(kv: Tensor, k: Tensor, rotation: Rotation, value: int) -> tuple[Tensor, Tensor]:
    size = kv.shape[-1] - value
    shared = rotated(k.unsqueeze(2), *rotation).expand(-1, -1, kv.shape[2], -1)
    key = torch.cat((kv[..., :size], shared), dim=-1)
    return key.transpose(1, 2), kv[..., size:].transpose(1, 2)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """One rounding to the storage dtype on top of float32's own."""
    assert found.dtype == dtype
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=2e-6 * scale)


def both_ways(
    run: Any, inputs: list[Tensor], strided: bool, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Results of `run`, then gradients of its inputs for random ones of its results, in `dtype`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = run(*inputs)
    results = list(results) if isinstance(results, tuple) else [results]
    gradients = []
    for number, y in enumerate(results):
        gradient = random(*y.shape, seed=9 + number).to(dtype).to(y.dtype)
        # As attention gives it: rows of all heads of a token together, or head by head.
        gradients.append(
            gradient.transpose(1, 2).contiguous().transpose(1, 2) if strided else gradient
        )
    return [*results, *torch.autograd.grad(results, inputs, gradients)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries(shape: tuple[int, ...], interleaved: bool, layout: str) -> None:
    batch, length, heads, plain, size, _ = shape
    q = random(batch, length, heads, plain + size)
    rotation = Rotation(
        *angles(1 if layout == "one" else batch, length, size, q.dtype), interleaved
    )
    wide = Rotation(rotation.cos.double(), rotation.sin.double(), interleaved)
    found = both_ways(lambda x: rotate_queries(x, rotation), [q], layout == "one")
    exact = both_ways(lambda x: expected_queries(x, wide), [q.double()], layout == "one")
    for ours, theirs in zip(found, exact, strict=True):
        close(ours, theirs, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_and_values(shape: tuple[int, ...], interleaved: bool, layout: str) -> None:
    batch, length, heads, plain, size, value = shape
    kv = random(batch, length, heads, plain + value)
    k = random(batch, length, 11 + size, seed=1)[..., 11:]  # as split off the latent
    rotation = Rotation(
        *angles(1 if layout == "one" else batch, length, size, kv.dtype), interleaved
    )
    wide = Rotation(rotation.cos.double(), rotation.sin.double(), interleaved)
    found = both_ways(lambda *x: expand_keys(*x, rotation, value), [kv, k], layout == "one")
    exact = both_ways(
        lambda *x: expected_keys(*x, wide, value), [kv.double(), k.double()], layout == "one"
    )
    for ours, theirs in zip(found, exact, strict=True):
        close(ours, theirs, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cuts bfloat16 off where a GPU rounds")
def test_half_precision_rounds_once() -> None:
    """transformers' own rounds each product and the sum."""
    batch, length, heads, plain, size, value = 2, 129, 16, 128, 64, 128
    half = torch.bfloat16
    q = random(batch, length, heads, plain + size).to(half)
    kv, k = (
        random(batch, length, heads, plain + value).to(half),
        random(batch, length, size).to(half),
    )
    rotation = Rotation(*angles(1, length, size, half), True)
    wide = Rotation(rotation.cos.double(), rotation.sin.double(), True)
    found = both_ways(lambda x: rotate_queries(x, rotation), [q], True, half)
    exact = both_ways(lambda x: expected_queries(x, wide), [q.double()], True, half)
    inputs, wide_inputs = [kv, k], [kv.double(), k.double()]
    found += both_ways(lambda *x: expand_keys(*x, rotation, value), inputs, True, half)
    exact += both_ways(lambda *x: expected_keys(*x, wide, value), wide_inputs, True, half)
    for ours, theirs in zip(found, exact, strict=True):
        close(ours, theirs, half)


def test_no_tokens() -> None:
    rotation = Rotation(*angles(1, 0, 4, torch.float32), True)
    found = both_ways(lambda x: rotate_queries(x, rotation), [random(1, 0, 2, 7)], True)
    inputs = [random(1, 0, 2, 7), random(1, 0, 4)]
    found += both_ways(lambda *x: expand_keys(*x, rotation, 4), inputs, True)
    assert [t.numel() for t in found] == [0] * len(found)


def test_nothing_is_rotated_at_angle_zero() -> None:
    """Halves stay; pairs are only laid out anew. The value is the very memory it came in."""
    ones, zeros = torch.ones(1, 5, 8, device=DEVICE), torch.zeros(1, 5, 8, device=DEVICE)
    q = random(2, 5, 3, 14)
    assert torch.equal(rotate_queries(q, Rotation(ones, zeros, False)), q.transpose(1, 2))
    kv = random(2, 5, 3, 10)
    key, value = expand_keys(kv, random(2, 5, 8), Rotation(ones, zeros, False), 4)
    assert torch.equal(key[..., :6], kv[..., :6].transpose(1, 2))
    assert value.data_ptr() == kv[..., 6:].data_ptr()
