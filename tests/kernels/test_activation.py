"""Activations and expert biases in the reference and on torch's grouped GEMM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from epctl.kernels import Activation, ExpertBiases, grouped_mm, moe_mlp, reference
from epctl.kernels.activation import ACTIVATION_FUNCTIONS, SWIGLU

SIZES = {"tokens": 63, "hidden": 16, "intermediate": 24, "experts": 8, "top_k": 3}
# Limits inside the range of the pre-activations: each clamp acts on some values and not on all.
FORMS = {
    "swiglu": SWIGLU,
    "clamped": Activation(form="clamped", limit=0.9),
    "clamped after": Activation(form="clamped_after", limit=0.4),
    "gpt-oss": Activation(form="shifted", limit=0.9),
    "alpha": Activation(form="shifted", limit=0.9, alpha=0.5),
    **{name: Activation(function=name) for name in ACTIVATION_FUNCTIONS},  # type: ignore[arg-type]
}


def biases_of(problem: Any) -> ExpertBiases:
    generator = torch.Generator().manual_seed(7)
    experts, intermediate, hidden = problem.w1_EID.shape
    shapes = ((experts, intermediate), (experts, intermediate), (experts, hidden))
    return ExpertBiases(*(torch.randn(s, generator=generator) / 2 for s in shapes))


def by_hand(
    problem: Any, biases: ExpertBiases, value: Callable[..., Tensor], gated: bool
) -> Tensor:
    wanted = torch.zeros_like(problem.x_TD)
    for token in range(SIZES["tokens"]):
        for choice in range(SIZES["top_k"]):
            expert = int(problem.experts_TK[token, choice])
            if expert < 0:
                continue
            x = problem.x_TD[token]
            gate = problem.w1_EID[expert] @ x + biases.gate_EI[expert]
            up = problem.w3_EID[expert] @ x + biases.up_EI[expert]
            hidden = value(gate, up) if gated else value(up)
            y = problem.w2_EDI[expert] @ hidden + biases.down_ED[expert]
            wanted[token] += problem.weights_TK[token, choice] * y
    return wanted


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda g, u: F.silu(g) * u,
    "clamped": lambda g, u: F.silu(g.clamp(max=0.9)) * u.clamp(-0.9, 0.9),
    "clamped after": lambda g, u: F.silu(g).clamp(max=0.4) * u.clamp(-0.4, 0.4),
    "gpt-oss": lambda g, u: (
        (u.clamp(-0.9, 0.9) + 1) * g.clamp(max=0.9) * torch.sigmoid(1.702 * g.clamp(max=0.9))
    ),
    "gelu": lambda g, u: F.gelu(g) * u,
    "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "relu2": lambda g, u: F.relu(g) ** 2 * u,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_activations_with_biases_by_hand(make_problem: Callable, name: str) -> None:
    problem = make_problem(**SIZES, routing="half elsewhere")
    biases = biases_of(problem)
    y = moe_mlp(*problem[:6], biases=biases, activation=FORMS[name])
    torch.testing.assert_close(y, by_hand(problem, biases, BY_HAND[name], gated=True))


def test_experts_without_a_gate(make_problem: Callable) -> None:
    problem = make_problem(**SIZES, routing="half elsewhere")
    biases = biases_of(problem)._replace(gate_EI=None)
    x, experts, weights, _, w3, w2, _ = problem
    relu2 = Activation(function="relu2")
    y = moe_mlp(x, experts, weights, None, w3, w2, biases=biases, activation=relu2)
    expected = by_hand(problem, biases_of(problem), lambda u: F.relu(u) ** 2, gated=False)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("name", ["swiglu", "gpt-oss", "gelu"])
@pytest.mark.parametrize("routing", ["random", "half elsewhere", "all elsewhere", "one expert"])
def test_grouped_mm_is_the_reference(
    make_problem: Callable, routing: str, name: str, gated: bool
) -> None:
    """Forward and every gradient, biases included."""
    problem = make_problem(**SIZES, routing=routing)
    activation = FORMS[name] if gated else Activation(function="relu2")
    runs = []
    for block in (grouped_mm.moe_mlp, reference.moe_mlp):
        tensors = (problem.x_TD, problem.weights_TK, *problem[3:6], *biases_of(problem))
        x, weights, w1, w3, w2, b1, b3, b2 = (t.clone().requires_grad_() for t in tensors)
        of_gate = (w1, b1) if gated else (None, None)
        biases = ExpertBiases(of_gate[1], b3, b2)
        y = block(x, problem.experts_TK, weights, of_gate[0], w3, w2, biases, activation)
        y.backward(problem.dy_TD)
        leaves = (x, weights, w3, w2, b3, b2, *((w1, b1) if gated else ()))
        runs.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("activation", FORMS.values(), ids=FORMS.keys())
def test_gradients_by_finite_differences(make_problem: Callable, activation: Activation) -> None:
    problem = make_problem(5, 4, 3, 4, 2, torch.float64)
    x, experts, weights, *matrices, _ = problem
    tensors = (x, weights, *matrices, *biases_of(problem))
    leaves = [tensor.double().requires_grad_() for tensor in tensors]

    def block(x: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
        biases = ExpertBiases(*rest[3:])
        return reference.moe_mlp(x, experts, weights, *rest[:3], biases, activation)

    assert torch.autograd.gradcheck(block, leaves)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (Activation(function="tanh"), "'tanh'; known: silu"),  # type: ignore[arg-type]
        (Activation(form="split"), "'split'; known: product"),  # type: ignore[arg-type]
        (Activation(limit=7.0), "limit 7.0 with gate form 'product'"),
        (Activation(form="clamped", limit=-1.0), "limit -1.0"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    make_problem: Callable, activation: Activation, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        moe_mlp(*make_problem(**SIZES)[:6], activation=activation)


def test_biases_of_other_shapes_are_refused(make_problem: Callable) -> None:
    problem = make_problem(**SIZES)
    with pytest.raises(ValueError, match=r"biases.down_ED is \(8, 24\); it must be \(8, 16\)"):
        moe_mlp(*problem[:6], biases=ExpertBiases(down_ED=torch.zeros(8, 24)))
    x, experts, weights, _, w3, w2, _ = problem
    with pytest.raises(ValueError, match="the experts have no gate"):
        moe_mlp(x, experts, weights, None, w3, w2, biases=biases_of(problem))
