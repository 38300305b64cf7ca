"""Balance losses, moving biases and capacity in the live model, one rank.

Shape suffixes: T tokens, E experts, K top_k.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity_ranks import tiny_config
from torch import Tensor, nn

from epctl.config import RunConfig, resolve_config
from epctl.errors import ConfigError
from epctl.kernels.balance import router_z_loss, sequence_balance_loss
from epctl.runtime.balance import DispatchLimits, LossFreeBalance, routers_of, set_up_balance
from epctl.runtime.build import build_model
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe import Router
from epctl.runtime.recompute import checkpoint_activations
from epctl.runtime.weights import RandomWeights

NUM_SEQUENCES, LENGTH = 2, 19


def model_of(**changes: Any) -> nn.Module:
    return build_model(
        tiny_config(**changes),
        Mesh(0, 1, 1, 0),
        RandomWeights(seed=1, std=0.2),
        dtype=torch.float32,
        device=torch.device("cpu"),
    ).train()


def config_of(**moe: Any) -> RunConfig:
    flags = {f"moe.{name}": value for name, value in moe.items()}
    return resolve_config(flags={**flags, "train.micro_batch_size": NUM_SEQUENCES}).config


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (NUM_SEQUENCES, LENGTH), generator=generator)
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: None)


@pytest.mark.parametrize("recompute", ["none", "moe", "full"])
@pytest.mark.parametrize("factors", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_gradients_are_those_of_the_sum_of_all_losses(
    factors: tuple[float, float], recompute: Any
) -> None:
    """By hand: losses made from what the routers returned, added to the model's own."""
    expected, found = model_of(), model_of()
    returned: list[tuple[Tensor, Tensor]] = []
    for router in routers_of(expected):
        router.register_forward_hook(lambda _m, _i, out: returned.append((out[0], out[2])))
    loss = loss_of(expected)
    by_hand = torch.zeros(())
    for logits_TE, experts_TK in returned:
        scores = logits_TE.sigmoid().view(NUM_SEQUENCES, LENGTH, -1)
        chosen = experts_TK.view(NUM_SEQUENCES, LENGTH, -1)
        by_hand = by_hand + factors[0] * sequence_balance_loss(scores, chosen)
        by_hand = by_hand + factors[1] * router_z_loss(logits_TE)
    (loss + by_hand).backward()

    assert set_up_balance(found, config_of(sequence_loss=factors[0], z_loss=factors[1])) is None
    checkpoint_activations(found, recompute)
    own_loss = loss_of(found)
    assert torch.equal(own_loss, loss)  # what is reported stays the cross-entropy
    own_loss.backward()
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-8, msg=name)
    losses = [router.losses for router in routers_of(found)]
    assert [part.num_forwards for part in losses] == [1] * len(losses)
    total = sum(float(part.take_mean()) for part in losses)
    assert total == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_biases_move_towards_even_loads() -> None:
    model = model_of()
    balance = set_up_balance(model, config_of(bias_update_rate=0.01))
    assert balance is not None
    routers = routers_of(model)
    before = [router.e_score_correction_bias.clone() for router in routers]
    loss_of(model)
    balance.after_step()
    for router, bias in zip(routers, before, strict=True):
        counts = router.tokens_per_expert.double()
        moved = router.e_score_correction_bias - bias
        expected = 0.01 * (counts.mean() - counts).sign().float()
        torch.testing.assert_close(moved, expected)
        assert moved.abs().max() > 0


def test_only_the_tokens_of_the_step_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    balance = LossFreeBalance(model, 0.5)
    seen: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: seen.append(tensor.clone()))
    loss_of(model)
    balance.after_step()
    loss_of(model)
    for router in routers_of(model):  # a report in between
        router.tokens_per_expert.zero_()
    balance.forget_counts()
    loss_of(model)
    balance.after_step()
    assert [int(counts.sum()) for counts in seen] == [NUM_SEQUENCES * LENGTH * 3 * 2] * 2


def test_many_updates_balance_a_skewed_router() -> None:
    """The effect itself: with updates the fullest expert comes down to near the mean."""
    model = model_of()
    balance = LossFreeBalance(model, 0.02)
    for router in routers_of(model):
        router.e_score_correction_bias[0] += 1.0  # every token picks expert 0

    def load() -> float:
        for router in routers_of(model):
            router.tokens_per_expert.zero_()
        balance.forget_counts()
        loss_of(model)
        counts = [router.tokens_per_expert.double() for router in routers_of(model)]
        return max(float(count.max() / count.mean()) for count in counts)

    assert load() == pytest.approx(8 / 3)
    for _ in range(60):
        balance.after_step()
        load()
    assert load() < 1.5


@pytest.mark.parametrize("capacity", [0.25, 1.0, 8.0])
def test_capacity_drops_in_training_only(capacity: float) -> None:
    model, plain = model_of(), model_of()
    set_up_balance(model, config_of(capacity_factor=capacity))
    limits = [m.limits for m in model.modules() if isinstance(m, type(_experts(model)))]
    loss = loss_of(model)
    dropped = sum(int(limit.take_dropped()) for limit in limits)
    num_choices = NUM_SEQUENCES * LENGTH * 3 * 2
    assert (dropped == 0) == (capacity == 8.0)  # eight experts: all fit
    assert dropped >= (1 - capacity) * num_choices - 2 * 8
    assert torch.equal(loss, loss_of(plain)) == (capacity == 8.0)
    model.eval()
    plain.eval()
    assert torch.equal(loss_of(model), loss_of(plain))


def _experts(model: nn.Module) -> nn.Module:
    return next(m for n, m in model.named_modules() if n.endswith("mlp.experts"))


def test_capacity_is_rounded_up_and_of_this_ranks_choices() -> None:
    weights, experts = torch.rand(5, 2), torch.zeros(5, 2, dtype=torch.int64)
    _, kept = DispatchLimits(1.0, None).drop(weights, experts, 3)
    assert int((kept >= 0).sum()) == 4  # ceil(10 / 3)


def test_settings_that_nothing_can_follow_are_refused() -> None:
    dense = model_of(first_k_dense_replace=3)
    for setting in ("sequence_loss", "z_loss", "capacity_factor", "bias_update_rate"):
        with pytest.raises(ConfigError, match=setting):
            set_up_balance(dense, config_of(**{setting: 0.5}))
    with pytest.raises(ConfigError, match="max_tokens_per_rank"):
        set_up_balance(dense, config_of(max_tokens_per_rank=5))


def test_routers_without_a_bias_are_told_so() -> None:
    model = model_of()
    for router in routers_of(model):
        assert isinstance(router, Router)
        del router._buffers["e_score_correction_bias"]
    with pytest.raises(ConfigError, match="no correction bias"):
        LossFreeBalance(model, 0.1)
