"""Balance losses and expert capacity against loops that state the rule.

Shape suffixes: N sequences, S tokens of one, E experts, K top_k, T tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epctl.kernels.balance import (
    attach_loss,
    drop_over_capacity,
    router_z_loss,
    sequence_balance_loss,
)


def routed(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns (scores, experts) of random tokens, ties included."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(num_tokens, num_experts, generator=generator) * 20).round() / 20 + 0.01
    return scores, scores.topk(top_k).indices


def balance_by_hand(scores_SE: Tensor, experts_SK: Tensor) -> float:
    num_tokens, num_experts = scores_SE.shape
    total = 0.0
    for e in range(num_experts):
        chosen = sum(e in row for row in experts_SK.tolist())
        frequency = num_experts / (experts_SK.shape[1] * num_tokens) * chosen
        share = sum(float(s[e] / s.sum()) for s in scores_SE.double()) / num_tokens
        total += frequency * share
    return total


@pytest.mark.parametrize("shape", [(1, 7, 4, 2), (3, 11, 8, 3), (2, 1, 5, 5)])
def test_sequence_balance_loss(shape: tuple[int, int, int, int]) -> None:
    num_sequences, num_tokens, num_experts, top_k = shape
    scores, experts = routed(num_sequences * num_tokens, num_experts, top_k)
    scores_NSE = scores.view(num_sequences, num_tokens, num_experts)
    experts_NSK = experts.view(num_sequences, num_tokens, top_k)
    by_hand = [balance_by_hand(s, e) for s, e in zip(scores_NSE, experts_NSK, strict=True)]
    found = sequence_balance_loss(scores_NSE, experts_NSK)
    assert float(found) == pytest.approx(sum(by_hand) / num_sequences, rel=1e-5)


def test_sequence_balance_is_one_when_even_and_large_when_not() -> None:
    even = torch.full((1, 8, 8), 0.5)
    assert float(sequence_balance_loss(even, torch.arange(8).view(1, 8, 1))) == pytest.approx(1.0)
    skewed = torch.zeros(1, 8, 8)
    skewed[..., 3] = 1.0
    assert float(sequence_balance_loss(skewed, torch.full((1, 8, 1), 3))) == pytest.approx(8.0)


def test_gradient_lowers_the_score_of_a_crowded_expert() -> None:
    scores, _ = routed(10, 6, 2)
    scores = scores.double().requires_grad_()
    experts = torch.zeros(1, 10, 1, dtype=torch.int64)
    sequence_balance_loss(scores.view(1, 10, 6), experts).backward()
    assert scores.grad is not None
    assert (scores.grad[:, 0] > 0).all()
    assert (scores.grad[:, 1:] < 0).all()


def test_losses_pass_gradcheck() -> None:
    scores, experts = routed(6, 5, 2)
    scores = scores.double().requires_grad_()
    torch.autograd.gradcheck(
        lambda s: sequence_balance_loss(s.view(2, 3, 5), experts.view(2, 3, 2)), scores
    )


def test_z_loss() -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 3
    by_hand = sum(float(torch.exp(row.double()).sum().log()) ** 2 for row in logits) / 9
    assert float(router_z_loss(logits)) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_tokens_no_loss(num_tokens: int) -> None:
    scores, experts = routed(num_tokens, 4, 2)
    assert torch.isfinite(sequence_balance_loss(scores[None], experts[None]))
    assert torch.isfinite(router_z_loss(scores))


def test_attached_loss_gets_its_weight_and_changes_nothing_else() -> None:
    x = torch.randn(4, requires_grad=True)
    y = torch.randn(3, requires_grad=True)
    out = attach_loss(x * 2, (y**2).sum(), weight=0.25)
    assert torch.equal(out, x * 2)
    (out.sum() * 7).backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, torch.full((4,), 14.0))
    torch.testing.assert_close(y.grad, 2 * y.detach() * 0.25)


def kept_by_hand(weights: Tensor, experts: Tensor, capacity: int) -> set[tuple[int, int]]:
    kept = set()
    for e in range(int(experts.max()) + 1):
        places = [(t, k) for t in range(len(experts)) for k in range(experts.shape[1])]
        mine = [place for place in places if int(experts[place]) == e]
        mine.sort(key=lambda place: (-float(weights[place]), place))
        kept |= set(mine[:capacity])
    return kept


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
@pytest.mark.parametrize("shape", [(1, 4, 2), (37, 8, 3), (20, 3, 3)])
def test_capacity_keeps_the_most_probable(shape: tuple[int, int, int], capacity: int) -> None:
    scores, experts = routed(*shape)
    weights = scores.gather(1, experts).requires_grad_()
    kept = kept_by_hand(weights.detach(), experts, capacity)
    found_weights, found_experts = drop_over_capacity(weights, experts, shape[1], capacity)
    for t in range(shape[0]):
        for k in range(shape[2]):
            alive = (t, k) in kept
            assert int(found_experts[t, k]) == (int(experts[t, k]) if alive else -1)
            assert float(found_weights.detach()[t, k]) == (float(weights[t, k]) if alive else 0.0)
    found_weights.sum().backward()
    assert weights.grad is not None
    assert int(weights.grad.sum()) == len(kept)


def test_no_tokens_nothing_dropped() -> None:
    empty = torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64)
    weights, experts = drop_over_capacity(*empty, 4, 1)
    assert weights.shape == experts.shape == (0, 2)
