"""Activation functions and experts without a gate in Triton: forward and every gradient.

Runs on a GPU, or in Triton's interpreter in float32 (test_interpreter.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from epctl.kernels import Activation, ExpertBiases, moe_mlp, reference
from epctl.kernels.activation import ACTIVATION_FUNCTIONS

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
NEEDS = "needs a CUDA GPU, or TRITON_INTERPRET=1 (test_interpreter.py)"
pytestmark = pytest.mark.skipif(not (INTERPRETING or torch.cuda.is_available()), reason=NEEDS)

gpu = pytest.mark.gpu
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
NAMES = ("y", "x", "weights", "w1", "w3", "w2", "b1", "b3", "b2")


def run(block: Callable[..., Tensor], tensors: dict[str, Tensor | None], **options: Any) -> Any:
    """Returns the output and the gradients of everything there is, by name, on copies."""
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None and name in NAMES
    }
    biases = ExpertBiases(*(leaves.get(name) for name in ("b1", "b3", "b2")))
    matrices = (leaves.get(name) for name in ("w1", "w3", "w2"))
    y = block(
        leaves["x"], tensors["experts"], leaves["weights"], *matrices, biases=biases, **options
    )
    y.backward(tensors["dy"].to(y.dtype))  # type: ignore[union-attr]
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def tensors_of(problem: Any, *, gated: bool, biased: bool) -> dict[str, Tensor | None]:
    x, experts, weights, w1, w3, w2, dy = problem
    found = {"x": x, "experts": experts, "weights": weights, "w3": w3, "w2": w2, "dy": dy}
    found["w1"] = w1 if gated else None
    if biased:
        generator = torch.Generator().manual_seed(7)
        shapes = {"b1": w1.shape[:2], "b3": w3.shape[:2], "b2": w2.shape[:2]}
        for name, shape in shapes.items():
            bias = (torch.randn(shape, generator=generator) / 2).to(x.device, x.dtype)
            found[name] = None if name == "b1" and not gated else bias
    return found


def assert_matches_reference(
    problem: Any, activation: Activation, *, gated: bool, biased: bool = True, **options: Any
) -> None:
    tensors = tensors_of(problem, gated=gated, biased=biased)
    got = run(moe_mlp, tensors, activation=activation, implementation="triton", **options)
    wide = {
        name: t.float() if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    wanted = run(reference.moe_mlp, wide, activation=activation)
    dtype = problem.x_TD.dtype
    longest_sum = max(len(problem.x_TD), problem.x_TD.shape[1], 2 * problem.w3_EID.shape[1])
    allowed = 4 * (UNIT_ROUNDOFF[dtype] + math.sqrt(longest_sum) * UNIT_ROUNDOFF[torch.float32])
    assert got.keys() == wanted.keys()
    assert ("w1" in got) is gated
    for name, want in wanted.items():
        distance = (got[name].float() - want).norm()
        assert distance <= allowed * want.norm(), f"{name}: {distance / want.norm():.2e}"


gates = pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])


@gates
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("function", ACTIVATION_FUNCTIONS)
def test_function(make_problem: Callable, function: Any, gated: bool, biased: bool) -> None:
    problem = make_problem(19, 40, 24, 3, 2)
    assert_matches_reference(problem, Activation(function), gated=gated, biased=biased)


@pytest.mark.parametrize("form", ["clamped", "clamped_after"])
@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "relu2"])
def test_function_that_is_clamped(make_problem: Callable, function: Any, form: Any) -> None:
    activation = Activation(function, form, limit=0.5)
    assert_matches_reference(make_problem(19, 40, 24, 3, 2), activation, gated=True)


@pytest.mark.parametrize(
    ("shape", "routing"),
    [
        ((1, 64, 64, 4, 4), "random"),
        ((63, 64, 72, 4, 2), "half elsewhere"),
        ((50, 64, 64, 4, 2), "all elsewhere"),
        ((100, 64, 64, 4, 2), "one expert"),
        ((0, 64, 64, 4, 2), "random"),
    ],
)
def test_routing_without_a_gate(
    make_problem: Callable, shape: tuple[int, ...], routing: str
) -> None:
    problem = make_problem(*shape, routing=routing)
    assert_matches_reference(problem, Activation("relu2"), gated=False)


@gates
def test_recompute(make_problem: Callable, gated: bool) -> None:
    problem = make_problem(63, 64, 64, 4, 2)
    assert_matches_reference(problem, Activation("gelu"), gated=gated, recompute=True)


@gates
def test_tma_stores(make_problem: Callable, monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    from epctl.kernels import tiles

    tile = tiles.Tile(32, 128, 32, num_warps=4, num_stages=1, tma_store=True, slice_n=32)
    weights = tile._replace(block_n=32)
    monkeypatch.setattr(tiles, "FLOAT32", tiles.TileTable(*(tile,) * 4, weights, weights))
    problem = make_problem(200, 64, 192, 3, 2, routing="half elsewhere")
    assert_matches_reference(problem, Activation("relu2"), gated=gated, biased=False)


def test_kept_for_backward_without_a_gate(make_problem: Callable) -> None:
    """One pre-activation a row, where experts with a gate keep two."""
    tensors = tensors_of(make_problem(50, 64, 128, 4, 2), gated=False, biased=False)
    x = tensors["x"].requires_grad_()  # type: ignore[union-attr]
    others = (tensors[name] for name in ("experts", "weights", "w1", "w3", "w2"))
    y = moe_mlp(x, *others, activation=Activation("relu2"), implementation="triton")  # type: ignore[arg-type]
    inward = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    sizes = {t.shape for t in inward.saved_tensors if t is not None}  # type: ignore[union-attr]
    assert torch.Size([100, 128]) in sizes
    assert torch.Size([100, 256]) not in sizes


@gates
def test_operator_tells_torch_the_truth(make_problem: Callable, gated: bool) -> None:
    from epctl.kernels import moe

    x, experts, weights, w1, w3, w2, dy = make_problem(20, 64, 64, 4, 2)
    first = w1 if gated else None
    biases = [torch.randn(4, 64, device=x.device) for _ in range(3 if gated else 2)]
    rule = ("gelu", "product", 1.0, 1.0)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    inputs = (x.requires_grad_(), experts, weights, first, w3, w2, biases)
    torch.library.opcheck(moe._moe_forward, (*inputs, *rule, True, 40), test_utils=checks)
    with torch.no_grad():
        _, h, *tables = moe._moe_forward(*inputs, *rule, True, 40)
        backward = (dy, x.detach(), weights, first, w3, w2, biases, experts, h, tables, *rule)
        torch.library.opcheck(moe._moe_backward, backward, test_utils=checks[:2])


@gates
def test_some_biases_are_refused(make_problem: Callable, gated: bool) -> None:
    from epctl.kernels import moe

    x, experts, weights, w1, *rest, _ = make_problem(5, 64, 64, 4, 2)
    biases = ExpertBiases(down_ED=torch.zeros(4, 64, device=x.device))
    number = "three" if gated else "two"
    with pytest.raises(ValueError, match=f"1 of the {number} projections have biases"):
        moe.moe_mlp(x, experts, weights, w1 if gated else None, *rest, biases)


@pytest.mark.parametrize("function", ACTIVATION_FUNCTIONS)
def test_large_and_missing_values(device: torch.device, function: Any) -> None:
    """Far from zero slopes are 0 or 1 and not NaN; what is NaN stays so."""
    values = torch.tensor([-1e6, -1e4, -30.0, 0.0, 30.0, 1e4], device=device)
    activation = Activation(function)
    results = []
    for implementation in ("triton", "reference"):
        x = torch.zeros(6, 16, device=device)
        x[:, 0] = values
        x.requires_grad_()
        w3 = torch.eye(16, device=device).unsqueeze(0)
        experts = torch.zeros(6, 1, dtype=torch.int64, device=device)
        scale = torch.ones(6, 1, device=device)
        arguments = (experts, scale, None, w3, w3)
        y = moe_mlp(x, *arguments, activation=activation, implementation=implementation)
        y[:, 0].sum().backward()
        results.append((y.detach()[:, 0], x.grad[:, 0]))  # type: ignore[index]
        lost = moe_mlp(
            x.detach() * torch.nan, *arguments, activation=activation, implementation=implementation
        )
        assert lost.isnan().all()
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@gpu
@gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("function", ACTIVATION_FUNCTIONS)
def test_half_precision(
    make_problem: Callable, function: Any, dtype: torch.dtype, gated: bool
) -> None:
    problem = make_problem(1000, 256, 320, 16, 4, dtype)
    assert_matches_reference(problem, Activation(function), gated=gated)


@gpu
def test_half_precision_of_odd_sizes_without_a_gate(make_problem: Callable) -> None:
    problem = make_problem(999, 264, 200, 8, 2, torch.bfloat16, routing="half elsewhere")
    assert_matches_reference(problem, Activation("relu2"), gated=False)
