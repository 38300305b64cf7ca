"""Expert biases and clamped SwiGLU in Triton, against the reference: forward and every gradient.

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

from epctl.kernels import Activation, ExpertBiases, reference

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
NEEDS = "needs a CUDA GPU, or TRITON_INTERPRET=1 (test_interpreter.py)"
pytestmark = pytest.mark.skipif(not (INTERPRETING or torch.cuda.is_available()), reason=NEEDS)

gpu = pytest.mark.gpu
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
NAMES = ("x", "weights", "w1", "w3", "w2", "b1", "b3", "b2")
# Limits inside the range of the pre-activations, so that each clamp acts on some and not on all.
# Half way between two numbers of bfloat16: backward sees pre-activations as they were kept,
# rounded, and on whichever side of such a limit one was, it still is. 0.564453125 is so for `up`,
# and what silu makes it of, 0.81444, is so for `gate` (0.497 of the way).
ACTIVATIONS = {
    "swiglu": Activation(),
    "clamped": Activation(form="clamped", limit=0.900390625),
    "clamped after": Activation(form="clamped_after", limit=0.564453125),
    "no limit": Activation(form="clamped_after"),
    "gpt-oss": Activation(form="shifted", limit=0.900390625, alpha=1.702),
}


def run(
    block: Callable[..., Tensor],
    problem: Any,
    biases: list[Tensor],
    activation: Activation,
    **options: Any,
) -> list[Tensor]:
    """Returns the output and the gradients of everything, on copies."""
    x, experts, weights, *matrices, dy = problem
    leaves = [t.clone().requires_grad_() for t in (x, weights, *matrices, *biases)]
    y = block(
        leaves[0],
        experts,
        leaves[1],
        *leaves[2:5],
        ExpertBiases(*leaves[5:]),
        activation,
        **options,
    )
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def biases_of(problem: Any, has_biases: bool) -> list[Tensor]:
    if not has_biases:
        return []
    generator = torch.Generator().manual_seed(7)
    experts, intermediate, hidden = problem.w1_EID.shape
    shapes = ((experts, intermediate), (experts, intermediate), (experts, hidden))
    x = problem.x_TD
    return [torch.randn(shape, generator=generator).to(x.device, x.dtype) / 2 for shape in shapes]


def assert_equal_runs(
    problem: Any, activation: Activation, has_biases: bool, **options: Any
) -> None:
    from epctl.kernels import moe

    dtype = problem.x_TD.dtype
    biases = biases_of(problem, has_biases)
    got = run(moe.moe_mlp, problem, biases, activation, **options)
    wide = type(problem)(*(t.float() if t.is_floating_point() else t for t in problem))
    wanted = run(reference.moe_mlp, wide, [b.float() for b in biases], activation)
    longest_sum = max(len(problem.x_TD), problem.x_TD.shape[1], 2 * problem.w1_EID.shape[1])
    allowed = 4 * (UNIT_ROUNDOFF[dtype] + math.sqrt(longest_sum) * UNIT_ROUNDOFF[torch.float32])
    for name, one, other in zip(("y", *NAMES), got, wanted, strict=False):
        distance = (one.float() - other).norm()
        assert distance <= allowed * other.norm(), f"{name}: {distance / other.norm():.2e}"


@pytest.mark.parametrize("has_biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_activation(make_problem: Callable, activation: Activation, has_biases: bool) -> None:
    assert_equal_runs(make_problem(37, 40, 24, 5, 3), activation, has_biases)


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
def test_routing(make_problem: Callable, shape: tuple[int, ...], routing: str) -> None:
    problem = make_problem(*shape, routing=routing)
    assert_equal_runs(problem, ACTIVATIONS["gpt-oss"], has_biases=True)


def test_recompute(make_problem: Callable) -> None:
    problem = make_problem(63, 64, 64, 4, 2)
    assert_equal_runs(problem, ACTIVATIONS["gpt-oss"], has_biases=True, recompute=True)


def test_some_biases_are_refused(make_problem: Callable) -> None:
    from epctl.kernels import moe

    problem = make_problem(5, 64, 64, 4, 2)
    biases = ExpertBiases(down_ED=torch.zeros(4, 64, device=problem.x_TD.device))
    with pytest.raises(ValueError, match="1 of the three projections have biases"):
        moe.moe_mlp(*problem[:6], biases)


@gpu
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_bfloat16(make_problem: Callable, activation: Activation) -> None:
    problem = make_problem(1000, 256, 320, 16, 4, torch.bfloat16)
    assert_equal_runs(problem, activation, has_biases=True)
