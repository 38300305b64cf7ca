"""The float32 reference, against plain loops, transformers' own modules and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from epctl.kernels import dispatch, grouped_mm, moe_mlp, reference, route, router_logits

RANDOM = {"tokens": 63, "hidden": 16, "intermediate": 24, "experts": 8, "top_k": 3}


def test_moe_mlp_is_the_weighted_sum_of_experts(make_problem: Callable) -> None:
    problem = make_problem(**RANDOM, routing="half elsewhere")
    wanted = torch.zeros_like(problem.x_TD)
    for token in range(63):
        for choice in range(3):
            expert = int(problem.experts_TK[token, choice])
            if expert >= 0:
                x = problem.x_TD[token]
                gate, up = problem.w1_EID[expert] @ x, problem.w3_EID[expert] @ x
                y = problem.w2_EDI[expert] @ (F.silu(gate) * up)
                wanted[token] += problem.weights_TK[token, choice] * y
    torch.testing.assert_close(moe_mlp(*problem[:6]), wanted)


@pytest.mark.parametrize("routing", ["random", "half elsewhere", "all elsewhere", "one expert"])
def test_moe_mlp_gradcheck(make_problem: Callable, routing: str) -> None:
    problem = make_problem(5, 4, 3, 4, 2, torch.float64, routing)
    x, experts, weights, *matrices, _ = problem
    leaves = [tensor.double().requires_grad_() for tensor in (x, weights, *matrices)]
    assert torch.autograd.gradcheck(
        lambda x, weights, *matrices: reference.moe_mlp(x, experts, weights, *matrices), leaves
    )


@pytest.mark.parametrize("tokens", [0, 5])
def test_moe_mlp_gives_zero_gradients_to_experts_without_tokens(
    make_problem: Callable, tokens: int
) -> None:
    problem = make_problem(tokens, 4, 3, 4, 2, routing="one expert")
    x, experts, weights, *matrices, _ = problem
    matrices = [matrix.requires_grad_() for matrix in matrices]
    reference.moe_mlp(x, experts, weights, *matrices).sum().backward()
    for matrix in matrices:
        assert matrix.grad is not None
        assert matrix.grad[:3].abs().max() == 0


def test_weights_of_pairs_held_elsewhere_get_no_gradient(make_problem: Callable) -> None:
    x, experts, weights, *matrices, dy = make_problem(**RANDOM, routing="half elsewhere")
    weights.requires_grad_()
    reference.moe_mlp(x, experts, weights, *matrices).backward(dy)
    elsewhere = experts < 0
    assert weights.grad[elsewhere].abs().max() == 0
    assert weights.grad[~elsewhere].abs().min() > 0


@pytest.mark.parametrize("routing", ["random", "half elsewhere", "all elsewhere", "one expert"])
def test_grouped_mm(make_problem: Callable, assert_matches: Callable, routing: str) -> None:
    assert_matches(grouped_mm.moe_mlp, make_problem(**RANDOM, routing=routing))


@pytest.mark.parametrize("score_func", reference.SCORE_FUNCTIONS)
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2)])
def test_route_gradcheck(score_func: str, groups: int, top_groups: int) -> None:
    generator = torch.Generator().manual_seed(42)
    logits_TE = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits: reference.route(
            logits,
            top_k=3,
            score_func=score_func,
            num_groups=groups,
            top_groups=top_groups,
            normalize=True,
            scale=2.5,
        )[0],
        logits_TE,
    )


def test_route_sends_ties_to_the_lower_expert() -> None:
    _, experts_TK = route(torch.zeros(2, 6), top_k=3, normalize=True, scale=1.0)
    assert experts_TK.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_route_takes_weights_from_unbiased_scores() -> None:
    logits_TE = torch.tensor([[0.0, 1.0, 2.0]])
    bias_E = torch.tensor([5.0, 0.0, 0.0])
    weights_TK, experts_TK = route(logits_TE, bias_E, top_k=2, normalize=False, scale=2.0)
    assert experts_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(weights_TK, 2 * logits_TE[:, [0, 2]].sigmoid())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "top_k is 9; 8 experts"),
        ({"top_k": 5, "num_groups": 4, "top_groups": 2}, "top_k is 5; 4 experts"),
        ({"num_groups": 3}, "num_groups 3 does not divide 8"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups is 3; it must be 1 to num_groups"),
        ({"score_func": "tanh"}, "score_func is 'tanh'; known: sigmoid"),
        ({"group_score": "mean"}, "group_score is 'mean'; known: top2_sum"),
    ],
)
def test_route_refuses_impossible_rules(change: dict[str, object], message: str) -> None:
    rule = {"top_k": 2, "normalize": True, "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(2, 8), **rule)


def _transformers_router(family: str) -> tuple[torch.nn.Module, dict[str, object]]:
    """A router of transformers with random weights, and the rule that epctl follows for it."""
    deepseek_v3 = {"num_groups": 4, "top_groups": 2, "normalize": True, "scale": 2.446}
    common = {"hidden_size": 16, "num_experts_per_tok": 3}
    if family == "deepseek_v3":
        from transformers.models.deepseek_v3 import configuration_deepseek_v3 as configuration
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

        config = configuration.DeepseekV3Config(
            **common, n_routed_experts=16, n_group=4, topk_group=2, routed_scaling_factor=2.446
        )
        return modeling.DeepseekV3TopkRouter(config), deepseek_v3
    if family == "glm4_moe":
        from transformers.models.glm4_moe import configuration_glm4_moe as configuration
        from transformers.models.glm4_moe import modeling_glm4_moe as modeling

        config = configuration.Glm4MoeConfig(
            **common, n_routed_experts=16, n_group=4, topk_group=2, routed_scaling_factor=2.446
        )
        return modeling.Glm4MoeTopkRouter(config), deepseek_v3
    if family == "deepseek_v2":
        from transformers.models.deepseek_v2 import configuration_deepseek_v2 as configuration
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as modeling

        config = configuration.DeepseekV2Config(
            **common,
            n_routed_experts=16,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            num_attention_heads=4,
            routed_scaling_factor=16.0,
        )
        rule = {**deepseek_v3, "group_score": "max", "normalize": False, "scale": 16.0}
        return modeling.DeepseekV2TopkRouter(config), {**rule, "score_func": "softmax"}
    if family == "qwen3_moe":
        from transformers.models.qwen3_moe import configuration_qwen3_moe as configuration
        from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

        config = configuration.Qwen3MoeConfig(**common, num_experts=16, norm_topk_prob=True)
        rule = {"score_func": "softmax", "normalize": True, "scale": 1.0}
        return modeling.Qwen3MoeTopKRouter(config), rule
    if family == "mixtral":
        from transformers.models.mixtral import configuration_mixtral as configuration
        from transformers.models.mixtral import modeling_mixtral as modeling

        config = configuration.MixtralConfig(**common, num_local_experts=16)
        rule = {"score_func": "softmax", "normalize": True, "scale": 1.0}
        return modeling.MixtralTopKRouter(config), rule
    if family == "gpt_oss":
        from transformers.models.gpt_oss import configuration_gpt_oss as configuration
        from transformers.models.gpt_oss import modeling_gpt_oss as modeling

        config = configuration.GptOssConfig(**common, num_local_experts=16)
        rule = {"score_func": "topk_softmax", "normalize": False, "scale": 1.0}
        return modeling.GptOssTopKRouter(config), rule
    assert family == "ernie4_5_moe", family
    from transformers.models.ernie4_5_moe import configuration_ernie4_5_moe as configuration
    from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as modeling

    config = configuration.Ernie4_5_MoeConfig(hidden_size=16, moe_k=3, moe_num_experts=16)
    rule = {"score_func": "softmax", "normalize": True, "normalize_floor": config.moe_norm_min}
    return modeling.Ernie4_5_MoeTopKRouter(config), {**rule, "scale": 1.0}


FAMILIES = [
    "deepseek_v3",
    "glm4_moe",
    "deepseek_v2",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "ernie4_5_moe",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_route_is_what_transformers_does(family: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(42)
    router, rule = _transformers_router(family)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    bias_E = getattr(router, "e_score_correction_bias", None)
    if family == "ernie4_5_moe":
        bias_E = router.moe_statics.e_score_correction_bias
    if bias_E is not None:
        torch.nn.init.normal_(bias_E, std=0.2)
        bias_E = bias_E.detach().reshape(-1)
    x_TD = torch.randn(200, 16)
    _, weights_TK, experts_TK = router(x_TD)
    logits_TE = router_logits(x_TD, router.weight)
    if family == "gpt_oss":
        logits_TE = logits_TE + router.bias
    got_weights_TK, got_experts_TK = route(logits_TE, bias_E, top_k=3, **rule)
    wanted_TE = torch.zeros(200, 16).scatter(1, experts_TK, weights_TK.detach())
    got_TE = torch.zeros(200, 16).scatter(1, got_experts_TK, got_weights_TK.detach())
    assert torch.equal(got_TE > 0, wanted_TE > 0)
    torch.testing.assert_close(got_TE, wanted_TE, rtol=1e-6, atol=1e-6)


def test_router_logits_gradients() -> None:
    generator = torch.Generator().manual_seed(42)
    x_TD = torch.randn(7, 5, generator=generator).bfloat16().requires_grad_()
    weight_ED = torch.randn(3, 5, generator=generator).bfloat16().requires_grad_()
    dlogits_TE = torch.randn(7, 3, generator=generator)
    logits_TE = router_logits(x_TD, weight_ED)
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE, x_TD.float() @ weight_ED.float().T)
    logits_TE.backward(dlogits_TE)
    torch.testing.assert_close(x_TD.grad, (dlogits_TE @ weight_ED.float()).bfloat16())
    torch.testing.assert_close(weight_ED.grad, (dlogits_TE.T @ x_TD.float()).bfloat16())


def test_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPCTL_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    choice = dispatch.choose_implementation(cpu, torch.float32)
    assert choice.implementation == "reference"
    assert "on cpu" in choice.reason
    monkeypatch.setenv("EPCTL_KERNELS", "grouped_mm")
    assert dispatch.choose_implementation(cpu, torch.float32).implementation == "grouped_mm"
    assert (
        dispatch.choose_implementation(cpu, torch.float32, "reference").implementation
        == "reference"
    )
    with pytest.raises(ValueError, match="cannot run on cpu"):
        dispatch.choose_implementation(cpu, torch.float32, "triton")
    with pytest.raises(ValueError, match="names 'cuda'; known: triton, grouped_mm, reference"):
        dispatch.choose_implementation(cpu, torch.float32, "cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "has_triton", "implementation"),
    [
        ((9, 0), torch.bfloat16, True, "triton"),
        ((8, 0), torch.bfloat16, True, "triton"),
        ((9, 0), torch.bfloat16, False, "grouped_mm"),
        ((7, 5), torch.float16, True, "reference"),
        ((9, 0), torch.float64, True, "reference"),
    ],
)
def test_choice_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    has_triton: bool,
    implementation: str,
) -> None:
    monkeypatch.delenv("EPCTL_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: has_triton)
    choice = dispatch.choose_implementation(torch.device("cuda"), dtype)
    assert choice.implementation == implementation
    assert choice.reason


def test_moe_mlp_refuses_shapes_that_do_not_fit(make_problem: Callable) -> None:
    x, experts, weights, w1, w3, w2, _ = make_problem(**RANDOM)
    with pytest.raises(ValueError, match=r"w2_EDI is \(8, 24, 16\); it must be \(8, 16, 24\)"):
        moe_mlp(x, experts, weights, w1, w3, w2.transpose(1, 2))


def test_recompute_keeps_nothing_and_changes_nothing(make_problem: Callable) -> None:
    x, experts, weights, *matrices, dy = make_problem(63, 64, 48, 4, 2)
    kept, gradients = [], []
    for recompute in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weights, *matrices)]
        inputs = {t.untyped_storage().data_ptr() for t in (*leaves, experts)}
        saved: dict[int, int] = {}

        def keep(t: torch.Tensor, inputs: set = inputs, saved: dict = saved) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in inputs:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = moe_mlp(leaves[0], experts, *leaves[1:], recompute=recompute)
        y.backward(dy)
        kept.append(sum(saved.values()))
        gradients.append([y, *(t.grad for t in leaves)])
    assert kept[0] > 63 * 2 * 48 * 4
    assert kept[1] == 0
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
