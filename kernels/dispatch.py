"""Which implementation a call runs on, and why.

The order of preference is the project's own Triton kernels, then the float32 reference. A choice
carries its reason, so that a caller can say once why a slower path runs. `EPCTL_KERNELS` or the
`implementation` argument of a function names one by hand.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from epctl.kernels import reference
from epctl.kernels.reference import GroupScore, ScoreFunction

Implementation = Literal["triton", "reference"]

IMPLEMENTATIONS: tuple[Implementation, ...] = ("triton", "reference")
ENVIRONMENT_VARIABLE = "EPCTL_KERNELS"


class Choice(NamedTuple):
    """An implementation's name and the reason it was taken."""

    implementation: Implementation
    reason: str


def choose_implementation(
    device: torch.device, dtype: torch.dtype, override: str | None = None
) -> Choice:
    """Returns what runs for tensors of `dtype` on `device`.

    Args:
        override: a name of `IMPLEMENTATIONS`; without one, `EPCTL_KERNELS` counts if it is set.

    Raises:
        ValueError: the override, or the environment variable, names no implementation.
    """
    for source, name in (("argument", override), (ENVIRONMENT_VARIABLE, _from_environment())):
        if name is not None:
            return _named(name, source)
    return Choice("reference", f"no kernel of epctl runs on {device.type}")


def _from_environment() -> str | None:
    return os.environ.get(ENVIRONMENT_VARIABLE) or None


def _named(name: str, source: str) -> Choice:
    for implementation in IMPLEMENTATIONS:
        if name == implementation:
            return Choice(implementation, f"named by {source}")
    raise ValueError(f"{source} names {name!r}; known: {', '.join(IMPLEMENTATIONS)}")


def route(
    logits_TE: Tensor,
    correction_bias_E: Tensor | None = None,
    *,
    top_k: int,
    score_func: ScoreFunction = "sigmoid",
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "top2_sum",
    normalize: bool,
    normalize_floor: float | None = None,
    scale: float,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns each token's weights (float32 [T, K], differentiable) and experts (int64 [T, K]).

    Selection looks at scores plus bias, within the best groups when there are groups; weights are
    the scores without the bias. Equal scores go to the lower expert id.

    Args:
        logits_TE: router outputs; scores are computed in float32.
        correction_bias_E: added for the selection alone (DeepSeek-V3, arXiv 2412.19437, 2.1.2).
        top_k: experts a token is sent to.
        score_func: `sigmoid`, `softmax` or `sqrt_softplus` of all logits; `topk_softmax` and
            `topk_sigmoid` select on the logits and apply the function to the chosen ones.
        num_groups: equal groups of neighbouring experts.
        top_groups: groups that a token may choose from; the others count as minus infinity.
        group_score: a group's score, the sum of its two best experts or its best (DeepSeek-V2).
        normalize: divide a token's weights by their sum, plus 1e-20 as DeepSeek-V3 does.
        normalize_floor: with it the divisor is the sum, but no less than this (ERNIE-4.5).
        scale: factor on every weight, after normalisation.
        implementation: overrides the choice of `choose_implementation`.

    Raises:
        ValueError: an unknown function name, or counts that do not fit each other.
    """
    choose_implementation(logits_TE.device, logits_TE.dtype, implementation)
    return reference.route(
        logits_TE,
        correction_bias_E,
        top_k=top_k,
        score_func=score_func,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        normalize=normalize,
        normalize_floor=normalize_floor,
        scale=scale,
    )


def moe_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Returns `sum_k weights * w2 (silu(w1 x) * w3 x)` over the experts held here, [T, D].

    Differentiable in `x_TD`, `weights_TK` and the three weights. Any number of tokens, also none,
    and any number of rows an expert, also none: such an expert's gradient is zero, never missing.

    Args:
        x_TD: tokens, in the dtype of the result.
        experts_TK: integer, 0 to E-1; -1 is "held elsewhere": it adds nothing, and its weight's
            gradient is zero.
        weights_TK: the router's weights, float32.
        w1_EID: gate projections.
        w3_EID: up projections.
        w2_EDI: down projections.
        implementation: overrides the choice of `choose_implementation`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_shapes(x_TD, experts_TK, weights_TK, w1_EID, w3_EID, w2_EDI)
    choose_implementation(x_TD.device, x_TD.dtype, implementation)
    return reference.moe_mlp(x_TD, experts_TK, weights_TK, w1_EID, w3_EID, w2_EDI)


def _check_shapes(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
) -> None:
    num_tokens, hidden = x_TD.shape
    num_experts, intermediate, _ = w1_EID.shape
    needed: tuple[tuple[str, Tensor, tuple[int, ...]], ...] = (
        ("experts_TK", experts_TK, (num_tokens, experts_TK.shape[-1])),
        ("weights_TK", weights_TK, tuple(experts_TK.shape)),
        ("w1_EID", w1_EID, (num_experts, intermediate, hidden)),
        ("w3_EID", w3_EID, (num_experts, intermediate, hidden)),
        ("w2_EDI", w2_EDI, (num_experts, hidden, intermediate)),
    )
    for name, tensor, shape in needed:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be {shape}")
