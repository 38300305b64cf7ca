"""epctl's MoE layer against transformers' own DeepSeek-V3 block, at EP=1, in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from parity_ranks import tiny_config
from torch import nn

from epctl.kernels.row_messages import local_expert_ids
from epctl.runtime import moe
from epctl.runtime.build import materialize, meta_model
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe_blocks import swap_moe_blocks
from epctl.runtime.names import hub_tensors
from epctl.runtime.weights import RandomWeights

ONE_RANK = Mesh(rank=0, num_ranks=1, ep_size=1, ep_rank=0)
CPU = torch.device("cpu")


class BiasedWeights(RandomWeights):
    """Random weights whose correction bias is large enough to change which experts are chosen."""

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        super().read_into(name, destination)
        if name.endswith("e_score_correction_bias"):
            generator = torch.Generator().manual_seed(5)
            destination.copy_(torch.rand(destination.shape, generator=generator))


def both_models(**changes: object) -> tuple[nn.Module, nn.Module]:
    """Returns (ours, transformers') with equal weights, correction bias included."""
    config = tiny_config(**changes)
    models = []
    for swap in (True, False):
        model = meta_model(config, torch.float32)
        if swap:
            assert swap_moe_blocks(model, config, ONE_RANK, torch.float32) == 2
        layer = model.get_submodule("model.layers.1.mlp")
        materialize(layer, "layer", BiasedWeights(seed=3, std=0.2), CPU)
        models.append(layer)
    return models[0], models[1]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="moonlight"),
        pytest.param({"n_group": 4, "topk_group": 2}, id="groups-4-keep-2"),
        pytest.param({"norm_topk_prob": False}, id="not-normalised"),
        pytest.param({"num_experts_per_tok": 8}, id="every-expert"),
        pytest.param({"num_experts_per_tok": 1}, id="top-1"),
    ],
)
def test_layer_equals_transformers_block(changes: dict[str, object]) -> None:
    ours, theirs = both_models(**changes)
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(0))
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, y_theirs = ours(x_ours), theirs(x_theirs)
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-5, atol=1e-6)

    weight = torch.randn(y_ours.shape, generator=torch.Generator().manual_seed(1))
    (y_ours * weight).sum().backward()
    (y_theirs * weight).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-4, atol=1e-5)
    ours_by_name = {t.name: gradient_of(t) for t in hub_tensors(ours, "layer")}
    theirs_by_name = {t.name: gradient_of(t) for t in hub_tensors(theirs, "layer")}
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, gradient in theirs_by_name.items():
        if gradient is not None:
            torch.testing.assert_close(ours_by_name[name], gradient, rtol=1e-4, atol=1e-5)
    assert ours_by_name["layer.gate.weight"].abs().max() > 0


def gradient_of(tensor: object) -> torch.Tensor | None:
    if tensor.tensor.grad is None:
        return None
    return dataclasses.replace(tensor, tensor=tensor.tensor.grad).local()


def test_correction_bias_changes_the_choice_but_not_the_weights() -> None:
    ours, _ = both_models()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    _, weights, experts = ours.gate(x)
    ours.gate.e_score_correction_bias.zero_()
    _, _, unbiased = ours.gate(x)
    assert not torch.equal(experts.sort().values, unbiased.sort().values)
    torch.testing.assert_close(weights.sum(dim=1), torch.full((64,), 2.446))


def test_fault_routed_scaling_factor_left_at_one() -> None:
    """AutoEP once ran Moonlight at scale 1.0: the config key was not mapped."""
    ours, theirs = both_models()
    assert ours.gate.rule.scale == 2.446
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    ours.gate.rule = dataclasses.replace(ours.gate.rule, scale=1.0)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_fault_boolean_taken_for_a_process_group() -> None:
    """AutoEP once let a flag shadow the ep group; every collective then ran over all ranks."""
    mesh = Mesh(rank=0, num_ranks=2, ep_size=2, ep_rank=0, ep_group=True, edp_group=None)
    config = tiny_config()
    with pytest.raises(AssertionError):
        swap_moe_blocks(meta_model(config, torch.float32), config, mesh, torch.float32)


def test_fault_reordering_by_local_instead_of_global_expert_count() -> None:
    """Row ids are relative to the destination's block of *global* ids, -1 for other ranks'."""
    experts_SK = torch.tensor([[0, 5, 7], [0, 5, 7], [4, 5, 6]])
    rank_S = torch.tensor([0, 1, 1])
    local = local_expert_ids(experts_SK, rank_S, num_local_experts=4)
    assert local.tolist() == [[0, -1, -1], [-1, 1, 3], [0, 1, 2]]


def test_routing_counts_are_recorded_in_training_only() -> None:
    ours, _ = both_models()
    x = torch.randn(10, 32)
    ours.eval()
    ours.gate(x)
    assert int(ours.gate.tokens_per_expert.sum()) == 0
    ours.train()
    ours.gate(x)
    assert int(ours.gate.tokens_per_expert.sum()) == 30


def test_router_scores_in_float32_for_bfloat16_models() -> None:
    config = tiny_config()
    model = meta_model(config, torch.bfloat16)
    swap_moe_blocks(model, config, ONE_RANK, torch.bfloat16)
    layer = model.get_submodule("model.layers.1.mlp")
    materialize(layer, "layer", RandomWeights(seed=0, std=0.2), CPU)
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, weights, _ = layer.gate(x)
    logits = x.double() @ layer.gate.weight.double().T
    scores = logits.sigmoid().topk(3).values
    expected = scores / scores.sum(dim=1, keepdim=True) * 2.446
    assert weights.dtype == torch.float32
    torch.testing.assert_close(
        weights.double().sort().values, expected.sort().values, rtol=1e-5, atol=1e-6
    )


def test_shared_experts_run_while_tokens_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    config, two_ranks = tiny_config(), Mesh(rank=0, num_ranks=2, ep_size=2, ep_rank=0)
    model = meta_model(config, torch.float32)
    swap_moe_blocks(model, config, two_ranks, torch.float32)
    layer = model.get_submodule("model.layers.1.mlp")
    layer.experts.ep_group = object()
    seen = []

    def travel(x_TD: torch.Tensor, *_: object, meanwhile: object, **__: object) -> None:
        seen.append(meanwhile)
        raise InterruptedError

    monkeypatch.setattr(moe, "dispatch", travel)
    with pytest.raises(InterruptedError):
        layer(torch.empty(2, 3, 32, device="meta"))
    assert seen == [layer.experts.shared.run_ahead]
