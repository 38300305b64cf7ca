"""The router in Triton: scores, biased group-limited top-k, normalised weights, in one pass.

Each program holds its tokens' scores as [tokens, groups, experts of a group], so that a group's
best are reductions over the last axis. Selection runs on one 64-bit key a score, the float's order
above the expert's rank: the largest key is the pick, ties go to the lower id, and NaN or infinite
scores still pick K different experts.
Shape suffixes: see reference.py.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from epctl.kernels.eager import sees_only_autograd
from epctl.kernels.launch import ceil_div, launch, next_power_of_2
from epctl.kernels.reference import (
    NORMALIZE_EPSILON,
    SCORE_FUNCTIONS,
    GroupScore,
    ScoreFunction,
    check_route_arguments,
)

SIGMOID = tl.constexpr(SCORE_FUNCTIONS.index("sigmoid"))
SOFTMAX = tl.constexpr(SCORE_FUNCTIONS.index("softmax"))
SQRT_SOFTPLUS = tl.constexpr(SCORE_FUNCTIONS.index("sqrt_softplus"))
TOPK_SOFTMAX = tl.constexpr(SCORE_FUNCTIONS.index("topk_softmax"))
TOPK_SIGMOID = tl.constexpr(SCORE_FUNCTIONS.index("topk_sigmoid"))
LOWEST_KEY = tl.constexpr(-(2**63))

# Scores in registers at a time; a thread of four warps then holds 32 of each quantity.
SCORES_OF_PROGRAM = 4096


@triton.jit
def _ordered_key(values, rank):
    """64-bit integers in the order of float32 `values`, the lower `rank` first among equals."""
    # Adding zero turns -0.0 into 0.0, which compares equal and must rank so.
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
    return ordered * 4294967296 + (65535 - rank).to(tl.int64)


@triton.jit
def _softplus(values):
    return tl.maximum(values, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(values)))


@triton.jit
def _scores(logits, held, SCORE: tl.constexpr):
    """Scores of logits [tokens, groups, size]; softmax spans both last axes."""
    if SCORE == SIGMOID:
        scores = tl.sigmoid(logits)
    elif SCORE == SOFTMAX:
        shifted = logits - tl.max(tl.max(logits, axis=2), axis=1)[:, None, None]
        raised = tl.where(held, tl.exp(shifted), 0.0)
        scores = raised / tl.sum(tl.sum(raised, axis=2), axis=1)[:, None, None]
    elif SCORE == SQRT_SOFTPLUS:
        scores = tl.sqrt(_softplus(logits))
    else:
        scores = logits
    return scores


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    num_tokens,
    scale,
    floor,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    EPSILON: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    CHOICES: tl.constexpr,
):
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, SIZE)
    ids = group[:, None] * GROUP_SIZE + member[None, :]
    held = ((group[:, None] < NUM_GROUPS) & (member[None, :] < GROUP_SIZE))[None, :, :]
    at = logits_ptr + token.to(tl.int64)[:, None, None] * NUM_EXPERTS + ids[None, :, :]
    logits = tl.load(at, mask=held & exists[:, None, None], other=0.0).to(tl.float32)
    logits = tl.where(held, logits, float("-inf"))
    scores = _scores(logits, held, SCORE)
    choice = scores
    if HAS_BIAS:
        bias = tl.load(bias_ptr + ids[None, :, :], mask=held, other=0.0)
        choice = choice + bias.to(tl.float32)
    rank = tl.broadcast_to(ids[None, :, :], (TOKENS, GROUPS, SIZE))
    key = tl.where(held, _ordered_key(choice, rank), LOWEST_KEY)
    if TOP_GROUPS < NUM_GROUPS:
        best_key = tl.max(key, axis=2)
        is_best = key == best_key[:, :, None]
        of_group = tl.sum(tl.where(is_best, choice, 0.0), axis=2)
        if GROUP_TOP2 and GROUP_SIZE > 1:
            rest = tl.where(is_best, LOWEST_KEY, key)
            is_second = rest == tl.max(rest, axis=2)[:, :, None]
            of_group += tl.sum(tl.where(is_second & held, choice, 0.0), axis=2)
        group_rank = tl.broadcast_to(group[None, :], (TOKENS, GROUPS))
        group_key = _ordered_key(of_group, group_rank)
        group_key = tl.where(group[None, :] < NUM_GROUPS, group_key, LOWEST_KEY)
        kept = tl.zeros((TOKENS, GROUPS), dtype=tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            picked = group_key == tl.max(group_key, axis=1)[:, None]
            kept = tl.where(picked, 1, kept)
            group_key = tl.where(picked, LOWEST_KEY, group_key)
        # One above the lowest: below every real score, but still an expert if all else fails.
        dropped = LOWEST_KEY + (65536 - rank).to(tl.int64)
        key = tl.where((kept[:, :, None] == 0) & held, dropped, key)
    slot = tl.arange(0, CHOICES)
    weights = tl.zeros((TOKENS, CHOICES), dtype=tl.float32)
    experts = tl.zeros((TOKENS, CHOICES), dtype=tl.int32)
    for pick in tl.static_range(TOP_K):
        best = tl.max(tl.max(key, axis=2), axis=1)
        picked = key == best[:, None, None]
        expert = tl.sum(tl.sum(tl.where(picked, rank, 0), axis=2), axis=1)
        score = tl.sum(tl.sum(tl.where(picked, scores, 0.0), axis=2), axis=1)
        key = tl.where(picked, LOWEST_KEY, key)
        weights = tl.where(slot[None, :] == pick, score[:, None], weights)
        experts = tl.where(slot[None, :] == pick, expert[:, None], experts)
    used = slot[None, :] < TOP_K
    if SCORE == TOPK_SOFTMAX:
        raw = tl.where(used, weights, float("-inf"))
        raised = tl.exp(raw - tl.max(raw, axis=1)[:, None])
        weights = raised / tl.sum(raised, axis=1)[:, None]
    if SCORE == TOPK_SIGMOID:
        weights = tl.where(used, tl.sigmoid(weights), 0.0)
    if NORMALIZE:
        total = tl.sum(weights, axis=1)
        divisor = tl.maximum(total, floor) if HAS_FLOOR else total + EPSILON
        weights = weights / divisor[:, None]
    out = token.to(tl.int64)[:, None] * TOP_K + slot[None, :]
    inside = exists[:, None] & used
    tl.store(weights_ptr + out, weights * scale, mask=inside)
    tl.store(experts_ptr + out, experts.to(tl.int64), mask=inside)


@triton.jit
def _route_backward_kernel(
    dweights_ptr,
    logits_ptr,
    experts_ptr,
    dlogits_ptr,
    num_tokens,
    scale,
    floor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    EPSILON: tl.constexpr,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    CHOICES: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    ids = tl.arange(0, SIZE)
    slot = tl.arange(0, CHOICES)
    used = exists[:, None] & (slot[None, :] < TOP_K)
    wide = token.to(tl.int64)[:, None]
    held = (ids < NUM_EXPERTS)[None, :]
    at = logits_ptr + wide * NUM_EXPERTS + ids[None, :]
    logits = tl.load(at, mask=exists[:, None] & held, other=0.0).to(tl.float32)
    experts = tl.load(experts_ptr + wide * TOP_K + slot[None, :], mask=used, other=0)
    dweights = tl.load(dweights_ptr + wide * TOP_K + slot[None, :], mask=used, other=0.0) * scale
    chosen = tl.load(logits_ptr + wide * NUM_EXPERTS + experts, mask=used, other=0.0)
    chosen = chosen.to(tl.float32)
    # The chosen experts' weights before normalisation, as the forward had them.
    if SCORE == SOFTMAX:
        top = tl.max(tl.where(held, logits, float("-inf")), axis=1)
        raised = tl.where(held, tl.exp(logits - top[:, None]), 0.0)
        total = tl.sum(raised, axis=1)
        weights = tl.exp(chosen - top[:, None]) / total[:, None]
    elif SCORE == TOPK_SOFTMAX:
        raw = tl.where(slot[None, :] < TOP_K, chosen, float("-inf"))
        raised = tl.exp(raw - tl.max(raw, axis=1)[:, None])
        weights = raised / tl.sum(raised, axis=1)[:, None]
    elif SCORE == SQRT_SOFTPLUS:
        weights = tl.sqrt(_softplus(chosen))
    else:
        weights = tl.sigmoid(chosen)
    weights = tl.where(used, weights, 0.0)
    if NORMALIZE:
        total_weight = tl.sum(weights, axis=1)
        divisor = tl.maximum(total_weight, floor) if HAS_FLOOR else total_weight + EPSILON
        through_sum = tl.sum(dweights * weights, axis=1) / divisor
        if HAS_FLOOR:
            through_sum = tl.where(total_weight >= floor, through_sum, 0.0)
        dweights = (dweights - through_sum[:, None]) / divisor[:, None]
    # Triton compiles no membership test.
    if SCORE == SIGMOID or SCORE == TOPK_SIGMOID:  # noqa: SIM109
        dchosen = dweights * weights * (1.0 - weights)
    elif SCORE == SQRT_SOFTPLUS:
        dchosen = dweights * tl.sigmoid(chosen) / (2.0 * tl.where(used, weights, 1.0))
    elif SCORE == TOPK_SOFTMAX:
        dchosen = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None])
    else:
        dchosen = dweights
    dchosen = tl.where(used, dchosen, 0.0)
    dense = tl.zeros((TOKENS, SIZE), dtype=tl.float32)
    for pick in tl.static_range(TOP_K):
        mine = slot[None, :] == pick
        expert = tl.sum(tl.where(mine, experts, 0), axis=1)
        value = tl.sum(tl.where(mine, dchosen, 0.0), axis=1)
        dense += tl.where(ids[None, :] == expert[:, None], value[:, None], 0.0)
    if SCORE == SOFTMAX:
        scores = raised / total[:, None]
        dense = scores * (dense - tl.sum(scores * dense, axis=1)[:, None])
    out = dlogits_ptr + wide * NUM_EXPERTS + ids[None, :]
    tl.store(out, dense.to(dlogits_ptr.dtype.element_ty), mask=exists[:, None] & held)


def _forward(
    logits_TE: Tensor,
    correction_bias_E: Tensor | None,
    top_k: int,
    score: int,
    num_groups: int,
    top_groups: int,
    group_top2: bool,
    normalize: bool,
    floor: float | None,
    epsilon: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.float32)
    experts_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    groups = next_power_of_2(num_groups)
    size = next_power_of_2(num_experts // num_groups)
    tokens = max(1, SCORES_OF_PROGRAM // (groups * size))
    if num_tokens:
        launch(
            _route_kernel,
            (ceil_div(num_tokens, tokens),),
            logits_TE,
            correction_bias_E,
            weights_TK,
            experts_TK,
            num_tokens,
            scale,
            0.0 if floor is None else floor,
            NUM_EXPERTS=num_experts,
            NUM_GROUPS=num_groups,
            TOP_GROUPS=top_groups,
            TOP_K=top_k,
            SCORE=score,
            GROUP_TOP2=group_top2,
            HAS_BIAS=correction_bias_E is not None,
            NORMALIZE=normalize,
            HAS_FLOOR=floor is not None,
            EPSILON=epsilon,
            TOKENS=tokens,
            GROUPS=groups,
            SIZE=size,
            CHOICES=next_power_of_2(top_k),
        )
    return weights_TK, experts_TK


_route = torch.library.custom_op("epctl::route", mutates_args=())(_forward)


@_route.register_fake
def _(
    logits_TE: Tensor,
    correction_bias_E: Tensor | None,
    top_k: int,
    score: int,
    num_groups: int,
    top_groups: int,
    group_top2: bool,
    normalize: bool,
    floor: float | None,
    epsilon: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], top_k)
    weights_TK = logits_TE.new_empty(shape, dtype=torch.float32)
    return weights_TK, logits_TE.new_empty(shape, dtype=torch.int64)


def _backward(
    dweights_TK: Tensor,
    logits_TE: Tensor,
    experts_TK: Tensor,
    score: int,
    normalize: bool,
    floor: float | None,
    epsilon: float,
    scale: float,
) -> Tensor:
    num_tokens, num_experts = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE)
    size = next_power_of_2(num_experts)
    tokens = max(1, SCORES_OF_PROGRAM // size)
    if num_tokens:
        launch(
            _route_backward_kernel,
            (ceil_div(num_tokens, tokens),),
            dweights_TK,
            logits_TE,
            experts_TK,
            dlogits_TE,
            num_tokens,
            scale,
            0.0 if floor is None else floor,
            NUM_EXPERTS=num_experts,
            TOP_K=experts_TK.shape[1],
            SCORE=score,
            NORMALIZE=normalize,
            HAS_FLOOR=floor is not None,
            EPSILON=epsilon,
            TOKENS=tokens,
            SIZE=size,
            CHOICES=next_power_of_2(experts_TK.shape[1]),
        )
    return dlogits_TE


_route_backward = torch.library.custom_op("epctl::route_backward", mutates_args=())(_backward)


@_route_backward.register_fake
def _(
    dweights_TK: Tensor,
    logits_TE: Tensor,
    experts_TK: Tensor,
    score: int,
    normalize: bool,
    floor: float | None,
    epsilon: float,
    scale: float,
) -> Tensor:
    return torch.empty_like(logits_TE)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TE, _, _, score, _, _, _, normalize, floor, epsilon, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TE, output[1])
    ctx.rule = score, normalize, floor, epsilon, scale


def _operator_backward(ctx: Any, dweights_TK: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dweights_TK is None:
        return (None,) * 11
    dlogits_TE = _route_backward(dweights_TK.contiguous(), *ctx.saved_tensors, *ctx.rule)
    return dlogits_TE, *(None,) * 10


_route.register_autograd(_operator_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same two functions without the operators around them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights_TK: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if dweights_TK is None:
            return (None,) * 11
        run = _backward if sees_only_autograd(dweights_TK) else _route_backward
        dlogits_TE = run(dweights_TK.contiguous(), *ctx.saved_tensors, *ctx.rule)
        return dlogits_TE, *(None,) * 10


def _operator_or_eager(logits_TE: Tensor, bias_E: Tensor | None) -> Callable[..., Any]:
    tensors = (logits_TE,) if bias_E is None else (logits_TE, bias_E)
    if not sees_only_autograd(*tensors):
        return _route
    if torch.is_grad_enabled() and logits_TE.requires_grad:
        return _Eager.apply
    return _forward


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
) -> tuple[Tensor, Tensor]:
    """Returns each token's weights and experts; see `epctl.kernels.route`."""
    check_route_arguments(
        logits_TE.shape[-1], top_k, score_func, num_groups, top_groups, group_score
    )
    bias_E = None if correction_bias_E is None else correction_bias_E.detach().contiguous()
    logits_TE = logits_TE.contiguous()
    rule = (
        top_k,
        SCORE_FUNCTIONS.index(score_func),
        num_groups,
        top_groups,
        group_score == "top2_sum",
        normalize,
        normalize_floor,
        normalize_epsilon,
        scale,
    )
    weights_TK, experts_TK = _operator_or_eager(logits_TE, bias_E)(logits_TE, bias_E, *rule)
    return weights_TK, experts_TK
