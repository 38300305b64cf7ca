"""Phi-MoE's router in Triton: two picks, each by its own softmax over the scores near the best.

Each program holds its tokens' scores as [tokens, experts]. The arithmetic, and the gradient that a
pick gets while its weight is scaled, are in reference.py (`sparsemixer`).
Shape suffixes: see reference.py.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch, next_power_of_2
from epctl.kernels.reference import (
    FULL_STEP,
    THIRD_STEP,
    SparseMixerNoise,
    check_sparsemixer_arguments,
)
from epctl.kernels.router import LOWEST_KEY, SCORES_OF_PROGRAM, _ordered_key

FULL = tl.constexpr(FULL_STEP)
THIRD = tl.constexpr(THIRD_STEP)


@triton.jit
def _scores(logits_ptr, token, num_tokens, NUM_EXPERTS: tl.constexpr, SIZE: tl.constexpr):
    """A program's ids, places and float32 scores, [tokens, experts], and which of them exist."""
    ids = tl.broadcast_to(tl.arange(0, SIZE)[None, :], (token.shape[0], SIZE))
    at = token.to(tl.int64)[:, None] * NUM_EXPERTS + ids
    allowed = ids < NUM_EXPERTS
    inside = allowed & (token < num_tokens)[:, None]
    scores = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return ids, at, scores, allowed, inside


@triton.jit
def _near(scores, active, threshold):
    """The active scores near the best of them, others minus infinity, and the softmax of that."""
    best = tl.max(active, axis=1)[:, None]
    # What is not a number compares false, as torch's does. The common division would round.
    distance = tl.div_rn(best - scores, tl.maximum(tl.abs(scores), best))
    near = tl.where(distance > threshold, float("-inf"), active)
    raised = tl.exp(near - best)
    return near, raised / tl.sum(raised, axis=1)[:, None]


@triton.jit
def _largest(values, ids, allowed):
    """The id of each token's largest value, the lower among equals."""
    key = tl.where(allowed, _ordered_key(values, ids), LOWEST_KEY)
    picked = key == tl.max(key, axis=1)[:, None]
    return tl.sum(tl.where(picked, ids, 0), axis=1)


@triton.jit
def _pick(
    scores,
    active,
    allowed,
    ids,
    threshold,
    exponential_at,
    uniform_at,
    exists,
    SAMPLED: tl.constexpr,
):
    """One pick of each token: its expert and its weight."""
    near, gates = _near(scores, active, threshold)
    if SAMPLED:
        drawn = tl.load(exponential_at, mask=allowed & exists[:, None], other=1.0)
        expert = _largest(near - tl.log(drawn), ids, allowed)
    else:
        expert = _largest(near, ids, allowed)
    weight = tl.sum(tl.where(ids == expert[:, None], gates, 0.0), axis=1)
    if SAMPLED:
        whole = tl.load(uniform_at, mask=exists, other=0.0) > 0.75
        whole = whole | (expert == _largest(gates, ids, allowed))
        weight = weight * tl.where(whole, FULL, THIRD)
    return expert, weight


@triton.jit
def _sparsemixer_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    exponential1_ptr,
    uniform1_ptr,
    exponential2_ptr,
    uniform2_ptr,
    num_tokens,
    threshold,
    NUM_EXPERTS: tl.constexpr,
    SAMPLED: tl.constexpr,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    ids, at, scores, allowed, _ = _scores(logits_ptr, token, num_tokens, NUM_EXPERTS, SIZE)
    active = tl.where(allowed, scores, float("-inf"))
    if SAMPLED:
        noise1, noise2 = exponential1_ptr + at, exponential2_ptr + at
        step1, step2 = uniform1_ptr + token, uniform2_ptr + token
    else:
        noise1, noise2, step1, step2 = at, at, token, token
    expert, weight = _pick(scores, active, allowed, ids, threshold, noise1, step1, exists, SAMPLED)
    out = token.to(tl.int64) * 2
    tl.store(weights_ptr + out, weight, mask=exists)
    tl.store(experts_ptr + out, expert.to(tl.int64), mask=exists)
    allowed = allowed & (ids != expert[:, None])
    active = tl.where(allowed, scores, float("-inf"))
    expert, weight = _pick(scores, active, allowed, ids, threshold, noise2, step2, exists, SAMPLED)
    tl.store(weights_ptr + out + 1, weight, mask=exists)
    tl.store(experts_ptr + out + 1, expert.to(tl.int64), mask=exists)


@triton.jit
def _sparsemixer_backward_kernel(
    dweights_ptr,
    logits_ptr,
    experts_ptr,
    dlogits_ptr,
    num_tokens,
    threshold,
    NUM_EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    ids, at, scores, allowed, inside = _scores(logits_ptr, token, num_tokens, NUM_EXPERTS, SIZE)
    dlogits = tl.zeros((TOKENS, SIZE), dtype=tl.float32)
    for pick in tl.static_range(2):
        active = tl.where(allowed, scores, float("-inf"))
        _, gates = _near(scores, active, threshold)
        pair = token.to(tl.int64) * 2 + pick
        expert = tl.load(experts_ptr + pair, mask=exists, other=0).to(tl.int32)
        dweight = tl.load(dweights_ptr + pair, mask=exists, other=0.0)
        chosen = ids == expert[:, None]
        through = dweight * tl.sum(tl.where(chosen, gates, 0.0), axis=1)
        dlogits += through[:, None] * (tl.where(chosen, 1.0, 0.0) - gates)
        allowed = allowed & (ids != expert[:, None])
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


def _sizes(num_experts: int) -> dict[str, int]:
    size = next_power_of_2(num_experts)
    return {"NUM_EXPERTS": num_experts, "TOKENS": max(1, SCORES_OF_PROGRAM // size), "SIZE": size}


@torch.library.custom_op("epctl::sparsemixer", mutates_args=())
def _sparsemixer(logits_TE: Tensor, noise: list[Tensor], jitter: float) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    weights_T2 = logits_TE.new_empty(num_tokens, 2, dtype=torch.float32)
    experts_T2 = logits_TE.new_empty(num_tokens, 2, dtype=torch.int64)
    sizes = _sizes(num_experts)
    if num_tokens:
        launch(
            _sparsemixer_kernel,
            (ceil_div(num_tokens, sizes["TOKENS"]),),
            logits_TE,
            weights_T2,
            experts_T2,
            *(noise or (None,) * 4),
            num_tokens,
            2.0 * jitter,
            SAMPLED=bool(noise),
            **sizes,
        )
    return weights_T2, experts_T2


@_sparsemixer.register_fake
def _(logits_TE: Tensor, noise: list[Tensor], jitter: float) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], 2)
    weights_T2 = logits_TE.new_empty(shape, dtype=torch.float32)
    return weights_T2, logits_TE.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("epctl::sparsemixer_backward", mutates_args=())
def _sparsemixer_backward(
    dweights_T2: Tensor, logits_TE: Tensor, experts_T2: Tensor, jitter: float
) -> Tensor:
    dlogits_TE = torch.empty_like(logits_TE)
    sizes = _sizes(logits_TE.shape[1])
    if len(logits_TE):
        launch(
            _sparsemixer_backward_kernel,
            (ceil_div(len(logits_TE), sizes["TOKENS"]),),
            dweights_T2,
            logits_TE,
            experts_T2,
            dlogits_TE,
            len(logits_TE),
            2.0 * jitter,
            **sizes,
        )
    return dlogits_TE


@_sparsemixer_backward.register_fake
def _(dweights_T2: Tensor, logits_TE: Tensor, experts_T2: Tensor, jitter: float) -> Tensor:
    return torch.empty_like(logits_TE)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TE, noise, ctx.jitter = inputs
    ctx.num_drawn = len(noise)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TE, output[1])


def _backward(ctx: Any, dweights_T2: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    dlogits_TE = None
    if dweights_T2 is not None:
        dlogits_TE = _sparsemixer_backward(dweights_T2.contiguous(), *ctx.saved_tensors, ctx.jitter)
    return dlogits_TE, [None] * ctx.num_drawn, None


_sparsemixer.register_autograd(_backward, setup_context=_save)


def sparsemixer(
    logits_TE: Tensor, jitter: float, noise: SparseMixerNoise | None = None
) -> tuple[Tensor, Tensor]:
    """Returns each token's two weights and experts; see `epctl.kernels.route_sparsemixer`."""
    check_sparsemixer_arguments(logits_TE.shape[-1], jitter)
    drawn = [] if noise is None else [tensor.contiguous() for tensor in noise]
    weights_T2, experts_T2 = _sparsemixer(logits_TE.contiguous(), drawn, jitter)
    return weights_T2, experts_T2
