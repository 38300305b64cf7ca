"""The blocked cross-entropy against PyTorch's, loss and every gradient.

By torch on a CPU, by Triton on a GPU or in its interpreter (test_interpreter.py). Shape suffixes:
T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from epctl.kernels import cross_entropy
from epctl.kernels.cross_entropy import IGNORED, chunked_cross_entropy, rows_within

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        monkeypatch.setenv("EPCTL_KERNELS", "triton")


SHAPES = [(1, 8, 5), (63, 16, 100), (100, 32, 1000), (3, 8, 5001), (0, 8, 20)]


def tensors(num_tokens: int, hidden: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, hidden, generator=generator)
    weight_VD = torch.randn(vocabulary, hidden, generator=generator) * 0.5
    labels_T = torch.randint(vocabulary, (num_tokens,), generator=generator)
    labels_T[::3] = IGNORED
    x_TD, weight_VD, labels_T = (tensor.to(DEVICE) for tensor in (x_TD, weight_VD, labels_T))
    return x_TD.requires_grad_(), weight_VD.requires_grad_(), labels_T


def expected(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale: float) -> list[Tensor]:
    logits = (x_TD @ weight_VD.t()).float() * scale
    loss = F.cross_entropy(logits, labels_T, reduction="sum")
    return [loss / 7, *torch.autograd.grad(loss * 3 / 7, (x_TD, weight_VD))]


def found(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, rows: int, scale: float
) -> list[Tensor]:
    divisor = torch.tensor(7, device=x_TD.device)
    inputs = x_TD, weight_VD, labels_T
    loss = chunked_cross_entropy(*inputs, num_rows=rows, scale=scale, divisor=divisor)
    return [loss, *torch.autograd.grad(loss * 3, (x_TD, weight_VD))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / (expected.detach().double().norm() + 1e-12))


CASES = [(shape, rows) for shape in SHAPES for rows in (1, 7, 64, 5000)]
if INTERPRETING:  # a program a token and block, each in Python
    CASES = [((1, 8, 5), 1), ((13, 16, 100), 5), ((3, 8, 5001), 2), ((0, 8, 20), 7)]


@pytest.mark.parametrize(("shape", "rows"), CASES)
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_loss_and_gradients(shape: tuple[int, int, int], rows: int, scale: float) -> None:
    inputs = tensors(*shape)
    for ours, theirs in zip(found(*inputs, rows, scale), expected(*inputs, scale), strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < 2e-6


def test_every_label_ignored() -> None:
    x_TD, weight_VD, labels_T = tensors(10, 8, 30)
    for tensor in found(x_TD, weight_VD, torch.full_like(labels_T, IGNORED), 7, 1.0):
        assert not tensor.detach().any()


def test_large_logits_stay_finite() -> None:
    x_TD, weight_VD, labels_T = tensors(20, 8, 30)
    x_TD = (x_TD.detach() * 1e4).requires_grad_()
    for ours, theirs in zip(
        found(x_TD, weight_VD, labels_T, 7, 1.0),
        expected(x_TD, weight_VD, labels_T, 1.0),
        strict=True,
    ):
        assert torch.isfinite(ours).all()
        assert relative_error(ours, theirs) < 2e-6


@pytest.mark.skipif(INTERPRETING, reason="the interpreter cuts bfloat16 off where a GPU rounds")
def test_half_precision_adds_one_rounding() -> None:
    """Against float64: the error of the unblocked way and a block's own rounding (2^-9)."""
    x_TD, weight_VD, labels_T = tensors(200, 64, 999)
    exact = expected(x_TD.double(), weight_VD.double(), labels_T, 1.0)
    half = [t.detach().bfloat16().requires_grad_() for t in (x_TD, weight_VD)]
    whole = expected(half[0], half[1], labels_T, 1.0)
    blocked = found(half[0], half[1], labels_T, 100, 1.0)
    for ours, usual, true in zip(blocked, whole, exact, strict=True):
        bound = (relative_error(usual, true) ** 2 + 2**-18) ** 0.5
        assert relative_error(ours, true) <= bound


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    x_TD, weight_VD, labels_T = tensors(10, 8, 30)
    (x_TD if frozen == "x" else weight_VD).requires_grad_(False)
    chunked_cross_entropy(x_TD, weight_VD, labels_T, num_rows=7).backward()
    assert (x_TD.grad is None) == (frozen == "x")
    assert (weight_VD.grad is None) == (frozen == "weight")


def test_a_block_takes_the_bytes_it_may() -> None:
    x_TD = torch.empty(100, 8, dtype=torch.bfloat16, device=DEVICE)
    each = 2 if INTERPRETING or DEVICE == "cuda" else 4
    assert rows_within(each * 20 * 50, x_TD, 20) == 50
    assert rows_within(each * 20 * 49, x_TD, 20) == 34  # three blocks, as equal as they can be
    assert rows_within(1, x_TD, 20) == 1
    assert rows_within(10**9, x_TD, 20) == 100
    assert rows_within(10**9, x_TD[:0], 20) == 1


def test_a_label_that_is_no_word_does_not_pass() -> None:
    x_TD, weight_VD, labels_T = tensors(10, 8, 30)
    for label in (30, -1):
        labels_T[4] = label
        if INTERPRETING or DEVICE == "cuda":
            loss = chunked_cross_entropy(x_TD, weight_VD, labels_T, num_rows=7)
            assert torch.isnan(loss)
        else:
            with pytest.raises(RuntimeError, match="out of bounds"):
                chunked_cross_entropy(x_TD, weight_VD, labels_T, num_rows=7)


def test_a_second_backward_is_refused() -> None:
    """Gradients are made once, in forward, and scaled in place."""
    x_TD, weight_VD, labels_T = tensors(10, 8, 30)
    loss = chunked_cross_entropy(x_TD, weight_VD, labels_T, num_rows=7)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a gradient without backward")

    monkeypatch.setattr(cross_entropy, "_add_product", never)
    x_TD, weight_VD, labels_T = tensors(10, 8, 30)
    trained = chunked_cross_entropy(x_TD.detach(), weight_VD.detach(), labels_T, num_rows=7)
    with torch.no_grad():
        loss = chunked_cross_entropy(x_TD, weight_VD, labels_T, num_rows=7)
    assert float(loss) == float(trained)
