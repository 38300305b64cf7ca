"""Which implementation a call runs on, and why.

The order of preference is the project's own Triton kernels, torch's grouped GEMM, the float32
reference. A choice carries its reason, so that a caller can say once why a slower path runs.
`EPCTL_KERNELS` or the `implementation` argument of a function names one by hand.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from epctl.kernels import grouped_mm, reference
from epctl.kernels.activation import NO_BIASES, SWIGLU, Activation, ExpertBiases
from epctl.kernels.reference import (
    NORMALIZE_EPSILON,
    GroupScore,
    ScoreFunction,
    SparseMixerNoise,
)

Implementation = Literal["triton", "grouped_mm", "reference"]

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
ENVIRONMENT_VARIABLE = "EPCTL_KERNELS"
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Measured on Hopper; Triton compiles the same kernels from here on.
OLDEST_CAPABILITY = (8, 0)
MEASURED_CAPABILITY = (9, 0)


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
        ValueError: the override, or the environment variable, names no implementation, or one
            that cannot run on this device.
    """
    named = override or os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        source = "the argument" if override else ENVIRONMENT_VARIABLE
        return _named(named, source, device)
    if device.type != "cuda":
        return Choice(
            "reference", f"epctl's kernels need a CUDA GPU; these tensors are on {device.type}"
        )
    if dtype not in KERNEL_DTYPES:
        return Choice("reference", f"epctl's kernels do not compute in {dtype}")
    capability = torch.cuda.get_device_capability(device)
    gpu = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST_CAPABILITY:
        return Choice("reference", f"{gpu} is older than the kernels support (8.0)")
    if not triton_installed():
        return Choice("grouped_mm", "Triton is not installed")
    measured = "" if capability >= MEASURED_CAPABILITY else ", on which the kernels are untested"
    return Choice("triton", f"{gpu}{measured}")


@functools.cache
def triton_installed() -> bool:
    """Returns whether Triton is there, without importing it."""
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _named(name: str, source: str, device: torch.device) -> Choice:
    for implementation in IMPLEMENTATIONS:
        if name == implementation:
            break
    else:
        raise ValueError(f"{source} names {name!r}; known: {', '.join(IMPLEMENTATIONS)}")
    if implementation == "triton" and device.type != "cuda" and not _interpreting():
        raise ValueError(f"{source} names 'triton', which cannot run on {device.type} tensors")
    return Choice(implementation, f"named by {source}")


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
    normalize_epsilon: float = NORMALIZE_EPSILON,
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
        normalize: divide a token's weights by their sum plus `normalize_epsilon`.
        normalize_epsilon: 1e-20 as in DeepSeek-V3; LFM2 has 1e-6.
        normalize_floor: with it the divisor is the sum, but no less than this (ERNIE-4.5).
        scale: factor on every weight, after normalisation.
        implementation: overrides the choice of `choose_implementation`.

    Raises:
        ValueError: an unknown function name, or counts that do not fit each other.
    """
    choice = choose_implementation(logits_TE.device, logits_TE.dtype, implementation)
    if choice.implementation == "triton":
        # Imported late: Triton takes a second to load and is not everywhere.
        from epctl.kernels import router

        run = router.route
    else:
        run = reference.route
    return run(
        logits_TE,
        correction_bias_E,
        top_k=top_k,
        score_func=score_func,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        normalize=normalize,
        normalize_floor=normalize_floor,
        normalize_epsilon=normalize_epsilon,
        scale=scale,
    )


def route_sparsemixer(
    logits_TE: Tensor, *, jitter: float, sampled: bool, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns Phi-MoE's two weights (float32 [T, 2], differentiable) and experts (int64 [T, 2]).

    SparseMixer (arXiv 2409.12136): the second pick is made without the first one's expert, and
    each weight is the pick's share in a softmax over the scores left that are near the best of
    them: those whose distance from it is within `2 * jitter` of the larger of the best and the
    score's own size.

    Args:
        logits_TE: router outputs; computed in float32.
        jitter: how near; `router_jitter_noise` of the config.
        sampled: as in training, picks are drawn from each softmax, with torch's generator, and
            one in four of those that are not the best, on average, keeps its whole weight; the
            others keep a third (Heun's method). Otherwise the best is picked, the lower id among
            equals. The gradient is that of the softmax in both.
        implementation: overrides the choice of `choose_implementation`.

    Raises:
        ValueError: fewer than two experts, or a negative jitter.
    """
    choice = choose_implementation(logits_TE.device, logits_TE.dtype, implementation)
    noise = SparseMixerNoise.draw(logits_TE) if sampled else None
    if choice.implementation == "triton":
        from epctl.kernels import sparsemixer

        return sparsemixer.sparsemixer(logits_TE, jitter, noise)
    return reference.sparsemixer(logits_TE, jitter, noise)


def moe_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    *,
    biases: ExpertBiases = NO_BIASES,
    activation: Activation = SWIGLU,
    recompute: bool = False,
    num_held: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Returns `sum_k weights * (w2 activation(w1 x + b1, w3 x + b3) + b2)` over the experts here.

    [T, D]; without more arguments the activation is `silu(w1 x) * w3 x` and there are no biases.
    Differentiable in `x_TD`, `weights_TK`, the weights and the biases. Any number of tokens, also
    none, and any number of rows an expert, also none: such an expert's gradient is zero, never
    missing.

    Args:
        x_TD: tokens, in the dtype of the result.
        experts_TK: integer, 0 to E-1; -1 is "held elsewhere": it adds nothing, and its weight's
            gradient is zero.
        weights_TK: the router's weights, float32.
        w1_EID: gate projections; None for experts without a gate.
        w3_EID: up projections.
        w2_EDI: down projections.
        biases: of the three projections, in the dtype of the weights.
        activation: what stands between the projections; see `Activation`.
        recompute: keep no pre-activation for the backward but compute it again, which saves 4KI
            bytes a token in bf16 and costs two ninths more arithmetic; the other implementations
            keep nothing and repeat the whole forward. A second backward over the same graph of the
            Triton kernels raises.
        num_held: how many ids are not -1, or a bound on it, where the caller knows: memory is then
            taken for so many rows and not for all T*K. Too small a number is undefined behaviour.
        implementation: overrides the choice of `choose_implementation`.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an unknown activation.
    """
    activation.check(gated=w1_EID is not None)
    _check_shapes(x_TD, experts_TK, weights_TK, w1_EID, w3_EID, w2_EDI, biases)
    choice = choose_implementation(x_TD.device, x_TD.dtype, implementation)
    if choice.implementation == "triton":
        from epctl.kernels import moe

        return moe.moe_mlp(
            x_TD,
            experts_TK,
            weights_TK,
            w1_EID,
            w3_EID,
            w2_EDI,
            biases,
            activation,
            recompute=recompute,
            num_held=num_held,
        )
    fallback = reference if choice.implementation == "reference" else grouped_mm
    arguments = x_TD, experts_TK, weights_TK, w1_EID, w3_EID, w2_EDI, biases, activation
    y_TD: Tensor
    if recompute and torch.is_grad_enabled():
        y_TD = checkpoint(
            fallback.moe_mlp, *arguments, use_reentrant=False, preserve_rng_state=False
        )
    else:
        y_TD = fallback.moe_mlp(*arguments)
    return y_TD


def _check_shapes(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: ExpertBiases,
) -> None:
    num_tokens, hidden = x_TD.shape
    num_experts, intermediate, _ = w3_EID.shape
    inward = (num_experts, intermediate, hidden)
    needed: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("experts_TK", experts_TK, (num_tokens, experts_TK.shape[-1])),
        ("weights_TK", weights_TK, tuple(experts_TK.shape)),
        ("w1_EID", w1_EID, inward),
        ("w3_EID", w3_EID, inward),
        ("w2_EDI", w2_EDI, (num_experts, hidden, intermediate)),
        ("biases.gate_EI", biases.gate_EI, inward[:2]),
        ("biases.up_EI", biases.up_EI, inward[:2]),
        ("biases.down_ED", biases.down_ED, (num_experts, hidden)),
    )
    for name, tensor, shape in needed:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be {shape}")
    if w1_EID is None and biases.gate_EI is not None:
        raise ValueError("biases.gate_EI is given, but the experts have no gate")
