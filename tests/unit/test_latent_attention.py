"""Latent attention by epctl's kernels, where a class computes just that, and nowhere else."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epctl.runtime import latent_attention
from epctl.runtime.attention_logits import AttentionLogits
from epctl.runtime.latent_attention import FusedLatentAttention, fuse_latent_attention

SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 20,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_hidden_layers": 2,
    "intermediate_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 4, "vocab_size": 64,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
    "pad_token_id": 0,
}  # fmt: skip


def model_of(family: str, name: str, **changes: Any) -> nn.Module:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config = getattr(configs, f"{name}Config")(**SIZES, **changes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model: nn.Module = getattr(module, f"{name}ForCausalLM")(config).train()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    return model


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


CASES = [
    ("deepseek_v3", "DeepseekV3", {"q_lora_rank": None}),
    ("deepseek_v3", "DeepseekV3", {"q_lora_rank": 12}),
    ("deepseek_v3", "DeepseekV3", {"q_lora_rank": 12, "rope_interleave": False}),
    ("youtu", "Youtu", {"q_lora_rank": 12}),
]


@pytest.mark.parametrize(("family", "name", "changes"), CASES)
def test_a_model_computes_the_same(
    family: str, name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family, name, **changes)
    ours = copy.deepcopy(model)
    assert fuse_latent_attention(ours) == 2
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]
    kernels = latent_attention.choose_implementation(torch.device("cpu"), torch.float32)
    # On a CPU the class's own forward runs; here the reference of the kernels does.
    monkeypatch.setattr(
        latent_attention,
        "choose_implementation",
        lambda *_: kernels._replace(implementation="triton"),
    )
    for found, expected in zip(loss_and_gradients(ours), loss_and_gradients(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_the_kernels_the_class_runs_its_own_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("deepseek_v3", "DeepseekV3", q_lora_rank=None)
    expected = loss_and_gradients(model)
    assert fuse_latent_attention(model) == 2

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("kernels on a CPU")

    monkeypatch.setattr(latent_attention, "attend", never)
    for ours, theirs in zip(loss_and_gradients(model), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_cache_goes_through_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v3", "DeepseekV3", q_lora_rank=None).eval()
    assert fuse_latent_attention(model) == 2
    kernels = latent_attention.choose_implementation(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(
        latent_attention,
        "choose_implementation",
        lambda *_: kernels._replace(implementation="triton"),
    )
    prompt = torch.tensor([[1, 2, 3]])
    words = model.generate(prompt, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert words.shape == (1, 7)


def test_eager_attention_is_found_where_the_class_has_it() -> None:
    """Attention logits wrap what the class's module calls eager attention."""
    model = model_of("deepseek_v3", "DeepseekV3", q_lora_rank=None)
    model.config._attn_implementation = "eager"  # type: ignore[union-attr]
    assert fuse_latent_attention(model) == 2
    logits = AttentionLogits(model, 1)
    loss_and_gradients(model)
    assert logits is not None
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    assert hasattr(importlib.import_module(type(attention).__module__), "eager_attention_forward")


def test_another_rotation_stays_as_it_is() -> None:
    """DeepSeek-V2 rotates complex numbers: angles of another form."""
    model = model_of("deepseek_v2", "DeepseekV2", q_lora_rank=None)
    assert fuse_latent_attention(model) == 0
    assert not any(isinstance(m, FusedLatentAttention) for m in model.modules())


def test_a_class_that_computes_something_else_stays_as_it_is() -> None:
    model = model_of("deepseek_v3", "DeepseekV3", q_lora_rank=None)

    class Doubled(type(model.model.layers[0].self_attn)):  # type: ignore[misc,union-attr,index]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            y, weights = super().forward(*inputs, **named)
            return 2 * y, weights

    model.model.layers[0].self_attn.__class__ = Doubled  # type: ignore[union-attr,index]
    assert fuse_latent_attention(model) == 1
    assert fuse_latent_attention(model) == 0
