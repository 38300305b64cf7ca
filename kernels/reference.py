"""What every kernel must compute, in plain PyTorch: the CPU path and the oracle of the tests.

Shape suffixes, used in every file of this package:
    T  tokens            D  hidden size               E  experts held here
    K  choices a token   I  expert intermediate size  N  rows, one for each (token, choice)
    S  rows of tokens    P  places that a token may go to

Arithmetic is float32 whatever the inputs are (float64 stays float64, for gradcheck), and the
result is cast back at the end.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from epctl.kernels.activation import NO_BIASES, SWIGLU, Activation, ExpertBiases

ScoreFunction = Literal["sigmoid", "softmax", "sqrt_softplus", "topk_softmax", "topk_sigmoid"]
GroupScore = Literal["top2_sum", "max"]

SCORE_FUNCTIONS: tuple[str, ...] = get_args(ScoreFunction)
GROUP_SCORES: tuple[str, ...] = get_args(GroupScore)

# What DeepSeek-V3's published router adds to the sum it divides by.
NORMALIZE_EPSILON = 1e-20


# What a sampled pick's weight is scaled by: whole, or a third where Heun's method takes its other
# point (arXiv 2409.12136, section 2.2). Transformers' own constants; they add up to 1.
THIRD_STEP = 0.3333
FULL_STEP = 0.3333 + 0.6667


class SparseMixerNoise(NamedTuple):
    """What both picks are sampled with: exponential [T, E] and uniform [T, 1], float32."""

    exponential1_TE: Tensor
    uniform1_T1: Tensor
    exponential2_TE: Tensor
    uniform2_T1: Tensor

    @classmethod
    def draw(cls, logits_TE: Tensor) -> SparseMixerNoise:
        """Draws what transformers' router draws from the same generator, in its order."""
        scores_TE = logits_TE.detach().float()
        one_T1 = scores_TE[:, :1]
        exponential1_TE = torch.empty_like(scores_TE).exponential_()
        uniform1_T1 = torch.rand_like(one_T1)
        exponential2_TE = torch.empty_like(scores_TE).exponential_()
        # It fills the last one twice.
        return cls(
            exponential1_TE, uniform1_T1, exponential2_TE, torch.rand_like(one_T1).uniform_()
        )


def check_sparsemixer_arguments(num_experts: int, jitter: float) -> None:
    """Raises ValueError for what two picks near the best cannot be made of."""
    if num_experts < 2:
        raise ValueError(f"sparsemixer picks two experts; there are {num_experts}")
    if not jitter >= 0:
        raise ValueError(f"jitter is {jitter}; it must be 0 or more")


def check_route_arguments(
    num_experts: int,
    top_k: int,
    score_func: str,
    num_groups: int,
    top_groups: int,
    group_score: str,
) -> None:
    """Raises ValueError for a routing rule that no implementation can follow."""
    if score_func not in SCORE_FUNCTIONS:
        raise ValueError(f"score_func is {score_func!r}; known: {', '.join(SCORE_FUNCTIONS)}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score is {group_score!r}; known: {', '.join(GROUP_SCORES)}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups {num_groups} does not divide {num_experts} experts")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups is {top_groups}; it must be 1 to num_groups ({num_groups})")
    reachable = top_groups * (num_experts // num_groups)
    if not 1 <= top_k <= reachable:
        raise ValueError(f"top_k is {top_k}; {reachable} experts can be chosen from")


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
    """Returns each token's weights (float32 [T, K], differentiable) and experts (int64 [T, K]).

    The arguments are those of `epctl.kernels.route`. Equal scores go to the lower expert id.
    """
    check_route_arguments(
        logits_TE.shape[-1], top_k, score_func, num_groups, top_groups, group_score
    )
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = scores_of(logits_TE, score_func)
    choice_TE = scores_TE.detach()
    if correction_bias_E is not None:
        choice_TE = choice_TE + correction_bias_E.detach().to(choice_TE.dtype)
    if top_groups < num_groups:
        choice_TE = _mask_groups(choice_TE, num_groups, top_groups, group_score)
    experts_TK = _largest(choice_TE, top_k)
    weights_TK = scores_TE.gather(1, experts_TK)
    if score_func == "topk_softmax":
        weights_TK = weights_TK.softmax(dim=-1)
    elif score_func == "topk_sigmoid":
        weights_TK = weights_TK.sigmoid()
    if normalize:
        sum_T1 = weights_TK.sum(dim=-1, keepdim=True)
        floored = normalize_floor is not None
        weights_TK = weights_TK / (
            sum_T1.clamp(min=normalize_floor) if floored else sum_T1 + normalize_epsilon
        )
    return weights_TK * scale, experts_TK


def sparsemixer(
    logits_TE: Tensor, jitter: float, noise: SparseMixerNoise | None = None
) -> tuple[Tensor, Tensor]:
    """Returns each token's two weights (float32 [T, 2], differentiable) and experts (int64 [T, 2]).

    The arguments are those of `epctl.kernels.route_sparsemixer`, and `noise` where picks are
    sampled. A pick's gradient is that of its softmax alone, whatever its weight is scaled by.
    """
    check_sparsemixer_arguments(logits_TE.shape[-1], jitter)
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    excluded_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    drawn = ((None, None),) * 2 if noise is None else (noise[:2], noise[2:])
    picks = []
    for exponential_TE, uniform_T1 in drawn:
        weight_T1, expert_T1 = _pick_near_best(
            logits_TE, excluded_TE, jitter, exponential_TE, uniform_T1
        )
        excluded_TE = excluded_TE.scatter(1, expert_T1, True)
        picks.append((weight_T1, expert_T1))
    weights, experts = zip(*picks, strict=True)
    return torch.cat(weights, dim=1), torch.cat(experts, dim=1)


def _pick_near_best(
    logits_TE: Tensor,
    excluded_TE: Tensor,
    jitter: float,
    exponential_TE: Tensor | None,
    uniform_T1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scores_TE = logits_TE.detach()
    best_T1 = scores_TE.masked_fill(excluded_TE, float("-inf")).amax(dim=1, keepdim=True)
    far_TE = (best_T1 - scores_TE) / scores_TE.abs().clamp(min=best_T1) > 2 * jitter
    near_TE = logits_TE.masked_fill(far_TE | excluded_TE, float("-inf"))
    gates_TE = near_TE.softmax(dim=1)
    if exponential_TE is None or uniform_T1 is None:
        expert_T1 = _largest(near_TE.detach(), 1)
        return gates_TE.gather(1, expert_T1), expert_T1
    # Adding Gumbel noise and taking the largest samples from the softmax.
    expert_T1 = _largest(near_TE.detach() - exponential_TE.log(), 1)
    weight_T1 = gates_TE.gather(1, expert_T1)
    whole_T1 = (expert_T1 == _largest(gates_TE.detach(), 1)) | (uniform_T1 > 0.75)
    scaled_T1 = weight_T1.detach() * torch.where(whole_T1, FULL_STEP, THIRD_STEP)
    return weight_T1 + (scaled_T1 - weight_T1.detach()), expert_T1


def scores_of(logits_TE: Tensor, score_func: ScoreFunction) -> Tensor:
    """Returns what experts are chosen by, before any bias: the logits where scores come after."""
    if score_func == "sigmoid":
        return logits_TE.sigmoid()
    if score_func == "softmax":
        return logits_TE.softmax(dim=-1)
    if score_func == "sqrt_softplus":
        return F.softplus(logits_TE).sqrt()
    return logits_TE


def _mask_groups(
    choice_TE: Tensor, num_groups: int, top_groups: int, group_score: GroupScore
) -> Tensor:
    num_tokens, num_experts = choice_TE.shape
    grouped = choice_TE.view(num_tokens, num_groups, num_experts // num_groups)
    if group_score == "max":
        score_of_group = grouped.amax(dim=-1)
    else:
        score_of_group = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(score_of_group, dtype=torch.bool)
    kept.scatter_(1, _largest(score_of_group, top_groups), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(num_tokens, num_experts)


def _largest(values: Tensor, count: int) -> Tensor:
    # A stable sort, since `topk` leaves the order of equal values open.
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def add_rows(rows_SD: Tensor, row_of_TP: Tensor) -> Tensor:
    """Returns the sum of each token's rows, [T, D] in the dtype of `rows_SD`; -1 is no row."""
    compute = torch.promote_types(rows_SD.dtype, torch.float32)
    # The last row, which -1 names, is zero.
    padded = torch.cat((rows_SD.to(compute), rows_SD.new_zeros(1, rows_SD.shape[1], dtype=compute)))
    total_TD = padded.new_zeros(row_of_TP.shape[0], rows_SD.shape[1])
    for row_T in row_of_TP.unbind(1):
        total_TD += padded[row_T]
    return total_TD.to(rows_SD.dtype)


def moe_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: ExpertBiases = NO_BIASES,
    activation: Activation = SWIGLU,
) -> Tensor:
    """Returns `sum_k weights * w2 (activation(w1 x, w3 x))` as [T, D] in the dtype of `x_TD`.

    The arguments are those of `epctl.kernels.moe_mlp`. Rows are sorted by expert, so that each
    expert's matrices are read once.
    """
    num_tokens, top_k = experts_TK.shape
    compute = torch.promote_types(x_TD.dtype, torch.float32)
    flat_N = experts_TK.reshape(-1)
    order_N = flat_N.argsort(stable=True)
    counts = torch.bincount(flat_N + 1, minlength=w3_EID.shape[0] + 1).tolist()
    mine_N = order_N[counts[0] :]
    token_N = mine_N // top_k
    rows_ND = x_TD.to(compute)[token_N]
    scale_N1 = weights_TK.to(compute).reshape(-1, 1)[mine_N]
    weights = (w1_EID, w3_EID, w2_EDI)
    y_ND = torch.cat(_expert_outputs(rows_ND, counts[1:], weights, biases, activation))
    y_TD = torch.zeros(num_tokens, x_TD.shape[1], dtype=compute, device=x_TD.device)
    return y_TD.index_add(0, token_N, y_ND * scale_N1).to(x_TD.dtype)


def _expert_outputs(
    rows_ND: Tensor,
    counts: list[int],
    weights: tuple[Tensor | None, Tensor, Tensor],
    biases: ExpertBiases,
    activation: Activation,
) -> list[Tensor]:
    outputs = []
    # `unbind` rather than indexing: its backward writes each weight gradient once, where every
    # `w[e]` would add a zero-filled copy of all experts.
    num_experts = len(counts)
    of_expert = zip(
        *(
            [None] * num_experts if tensor is None else tensor.unbind(0)
            for tensor in (*weights, *biases)
        ),
        strict=True,
    )
    for expert, (rows, tensors) in enumerate(
        zip(torch.split(rows_ND, counts), of_expert, strict=True)
    ):
        # Expert 0 runs even on no rows, so that gradients are zeros and never missing.
        if len(rows) == 0 and expert > 0:
            continue
        w1, w3, w2, b1, b3, b2 = (None if t is None else t.to(rows.dtype) for t in tensors)
        assert w3 is not None
        assert w2 is not None
        gate = None if w1 is None else F.linear(rows, w1, b1)
        outputs.append(F.linear(activation(gate, F.linear(rows, w3, b3)), w2, b2))
    return outputs
