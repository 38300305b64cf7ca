"""Attention logits against a plain float64 computation, and clipping that meets its bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epctl.errors import ConfigError
from epctl.runtime import attention_logits
from epctl.runtime.attention_logits import AttentionLogits, largest_logits
from epctl.runtime.qk_clip import clip_factors

BOUND = 2.0


def latent_model(implementation: str = "sdpa") -> nn.Module:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        first_k_dense_replace=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        attn_implementation=implementation,
    )
    return loud(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))


def grouped_model(**changes: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        **changes,
    )
    return loud(AutoModelForCausalLM.from_config(config))


def loud(model: nn.Module) -> nn.Module:
    """Weights and biases at a scale where the largest logits are well above zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.copy_(0.35 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def measure(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.arange(12).view(1, -1) % 32
    logits = AttentionLogits(model, interval=1)
    try:
        model(input_ids=ids, use_cache=False)
        assert logits.collect() is not None
    finally:
        logits.close()
    return logits.latest


def scale_rows(model: nn.Module, factors: dict[int, Tensor]) -> None:
    for parameter in model.parameters():
        if id(parameter) in factors:
            rows = factors[id(parameter)]
            parameter.data.mul_(rows.view(-1, *[1] * (parameter.ndim - 1)))


def test_largest_logits_equal_a_plain_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_logits, "QUERIES_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 7, 8, generator=generator)
    key = torch.randn(2, 2, 7, 8, generator=generator)
    logits = query.double() @ key.double().repeat_interleave(2, dim=1).mT * 0.3
    allowed = torch.ones(7, 7).tril().bool()
    expected = logits.masked_fill(~allowed, -math.inf).amax(dim=(0, 2, 3)).float()
    for mask in (None, allowed[None, None], torch.where(allowed, 0.0, -torch.inf)[None, None]):
        result = largest_logits(query, key, mask, scaling=0.3, causal=True)
        assert torch.allclose(result, expected, rtol=1e-5)
    everything = largest_logits(query, key, None, scaling=0.3, causal=False)
    assert torch.allclose(everything, logits.amax(dim=(0, 2, 3)).float(), rtol=1e-5)
    assert not torch.allclose(everything, expected)


def test_eager_and_sdpa_measure_the_same() -> None:
    sdpa, eager = measure(latent_model("sdpa")), measure(latent_model("eager"))
    assert sdpa.keys() == eager.keys() == {f"model.layers.{i}.self_attn" for i in (0, 1)}
    for name, maxima in sdpa.items():
        assert torch.allclose(maxima, eager[name], rtol=1e-4)


def test_measuring_changes_no_output_and_is_undone() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = latent_model().eval()
    ids = torch.arange(12).view(1, -1)
    before, entry = model(input_ids=ids).logits, ALL_ATTENTION_FUNCTIONS["sdpa"]
    logits = AttentionLogits(model, interval=1)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert logits.collect() is None  # evaluation is not measured
    logits.close()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is entry


@pytest.mark.parametrize("build", [latent_model, grouped_model])
def test_clipped_first_layer_meets_the_bound_exactly(build: Any) -> None:
    """Deeper layers see other inputs afterwards; the first layer's inputs are unchanged."""
    model = build()
    before = measure(model)
    first = before["model.layers.0.self_attn"]
    bound = float(first.sort().values[1:3].mean())  # two heads above, two below
    assert (first > bound).sum() == 2
    scale_rows(model, clip_factors(model, before, bound))
    after = measure(model)["model.layers.0.self_attn"]
    assert torch.allclose(after, first.clamp_max(bound), rtol=1e-4)  # quiet heads keep theirs


def test_shared_rotary_key_and_values_are_left_alone() -> None:
    model = latent_model()
    attention = model.model.layers[0].self_attn
    factors = clip_factors(model, {"model.layers.0.self_attn": torch.full((4,), 8.0)}, BOUND)
    assert set(factors) == {id(attention.q_proj.weight), id(attention.kv_b_proj.weight)}
    query = factors[id(attention.q_proj.weight)].view(4, 12)
    assert torch.allclose(query[:, :8], torch.tensor(0.5))
    assert torch.allclose(query[:, 8:], torch.tensor(0.25))
    key_value = factors[id(attention.kv_b_proj.weight)].view(4, 16)
    assert torch.allclose(key_value[:, :8], torch.tensor(0.5))
    assert torch.equal(key_value[:, 8:], torch.ones(4, 8))


def test_nothing_is_scaled_below_the_bound() -> None:
    maxima = {"model.layers.0.self_attn": torch.full((4,), BOUND)}
    assert clip_factors(latent_model(), maxima, BOUND) == {}


def test_normalised_queries_cannot_be_clipped() -> None:
    model = grouped_model()
    model.model.layers[0].self_attn.q_norm = nn.LayerNorm(8)
    maxima = {"model.layers.0.self_attn": torch.full((4,), 9.0)}
    with pytest.raises(ConfigError, match="normalises queries or keys"):
        clip_factors(model, maxima, BOUND)


def test_a_warning_names_layer_and_head_once() -> None:
    model = latent_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(500)
    ids = torch.arange(12).view(1, -1)
    logits = AttentionLogits(model, interval=1)
    try:
        model(input_ids=ids, use_cache=False)
        where = r"attention logit .* in model\.layers\.\d.*qk_clip"
        with pytest.warns(RuntimeWarning, match=where):
            report = logits.collect()
        assert report is not None
        assert report.largest > 100
        model(input_ids=ids, use_cache=False)
        logits.collect()  # no second warning: warnings are errors in these tests
    finally:
        logits.close()


def test_interval_skips_the_steps_between() -> None:
    model = latent_model()
    ids = torch.arange(12).view(1, -1)
    logits = AttentionLogits(model, interval=3)
    try:
        reports = []
        for _ in range(4):
            model(input_ids=ids, use_cache=False)
            reports.append(logits.collect())
    finally:
        logits.close()
    assert [report is not None for report in reports] == [True, False, False, True]
