"""Which parameter is on which optimizer, on transformers' own classes (meta device, no memory)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_models import tiny_config
from torch import nn

from epctl.config import OptimSection
from epctl.errors import ConfigError
from epctl.runtime.build import meta_model
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe_blocks import swap_moe_blocks
from epctl.runtime.parameter_groups import classify, count_split, parameter_groups, row_blocks

MUON = OptimSection()


def deepseek_v3(**changes: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=2,
        n_routed_experts=8,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        **changes,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def vision_language_model() -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def kinds(model: nn.Module, optim: OptimSection = MUON) -> dict[str, tuple[str, str]]:
    return {a.name: (a.kind, a.reason) for a in classify(model, optim)}


def blocks_by_name(model: nn.Module, optim: OptimSection) -> dict[str, tuple[int, ...]]:
    blocks = row_blocks(model, optim)
    return {name: blocks[id(p)] for name, p in model.named_parameters() if id(p) in blocks}


def test_every_parameter_of_a_moonlight_layout_is_where_it_belongs() -> None:
    model = deepseek_v3()
    swap_moe_blocks(model, model.config, Mesh(0, 1, 1, 0), torch.float32)
    on_adamw = {name for name, (kind, _) in kinds(model).items() if kind == "adamw"}
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert on_adamw == norms | {"model.embed_tokens.weight", "lm_head.weight"}
    assert kinds(model)["model.layers.1.mlp.gate.weight"][0] == "muon"
    assert kinds(model)["model.layers.1.mlp.experts.w1"] == ("muon", "stacked expert matrices")
    assert not any("e_score_correction_bias" in name for name in kinds(model))


def test_unswapped_experts_are_on_muon_with_gate_and_up_apart() -> None:
    model = deepseek_v3()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert kinds(model)[name][0] == "muon"
    assert blocks_by_name(model, MUON) == {name: (24, 24)}
    split = count_split(model, MUON, ep_size=1)
    # layer 0: 4 attention, 3 MLP; layer 1: 4 attention, router, 3 shared, 3 of each expert
    assert split.num_muon_matrices == 7 + 8 + 24
    assert split.num_muon + split.num_adamw == sum(p.numel() for p in model.parameters())


def test_experts_of_all_ranks_are_counted() -> None:
    split = {}
    for ep in (1, 4):
        model = deepseek_v3()
        swap_moe_blocks(model, model.config, Mesh(0, ep, ep, 0), torch.float32)
        split[ep] = count_split(model, MUON, ep)
    assert split[1] == split[4]


def test_router_is_switchable() -> None:
    model = deepseek_v3()
    router = "model.layers.1.mlp.gate.weight"
    for choice in ("muon", "adamw"):
        kind, reason = kinds(model, OptimSection(router=choice))[router]
        assert (kind, reason) == (choice, f"router: optim.router = {choice}")


def test_vision_tower_keeps_patches_positions_and_class_token_on_adamw() -> None:
    on = kinds(vision_language_model())
    reasons = {
        "patch_embedding.weight": "embedding or position table",
        "position_embedding.weight": "embedding or position table",
        "class_embedding": "embedding or position table",
        "lm_head.weight": "embedding or head",
        "embed_tokens.weight": "embedding or head",
        "q_proj.bias": "vector or scalar",
        "layer_norm1.weight": "vector or scalar",
    }
    for ending, reason in reasons.items():
        found = {value for name, value in on.items() if name.endswith(ending)}
        assert found == {("adamw", reason)}, ending
    assert {v[0] for name, v in on.items() if name.endswith("q_proj.weight")} == {"muon"}


def test_convolutions_gate_vectors_and_loose_tables_are_on_adamw() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4)
            self.shared_expert_gate = nn.Linear(8, 1, bias=False)
            self.decay = nn.Parameter(torch.zeros(8, 4))
            self.linear = nn.Linear(8, 8)

    assert {name: kind for name, (kind, _) in kinds(Odd()).items()} == {
        "patch.weight": "adamw",
        "patch.bias": "adamw",
        "shared_expert_gate.weight": "adamw",
        "decay": "adamw",
        "linear.weight": "muon",
        "linear.bias": "adamw",
    }


def test_all_adamw_under_zero_init_shapes_are_the_whole_ones() -> None:
    """A partitioned Parameter is 1-D and empty; upstream silently trained all of it on AdamW."""
    model = deepseek_v3()
    whole = kinds(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0, device="meta")
    assert kinds(model) == whole
    assert sum(kind == "muon" for kind, _ in whole.values()) > 10


def test_per_head_splits_queries_and_interleaved_keys_and_values() -> None:
    per_head = blocks_by_name(deepseek_v3(), OptimSection(per_head=True))
    assert per_head["model.layers.0.self_attn.q_proj.weight"] == (24, 24)
    assert per_head["model.layers.0.self_attn.kv_b_proj.weight"] == (16, 12, 16, 12)
    assert "model.layers.0.self_attn.o_proj.weight" not in per_head
    grouped = blocks_by_name(vision_language_model(), OptimSection(per_head=True))
    text = {name: rows for name, rows in grouped.items() if "language_model" in name}
    assert sorted(text.values()) == [(8,) * 2, (8,) * 2, (8,) * 4]


def test_a_transposed_expert_stack_stays_whole() -> None:
    class Experts(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.num_experts = 4
            shape = (4, 10, 12) if transposed else (4, 12, 10)
            self.gate_up_proj = nn.Parameter(torch.zeros(shape))
            self.down_proj = nn.Parameter(torch.zeros((4, 6, 10) if transposed else (4, 10, 6)))

    for transposed, expected in ((False, {"gate_up_proj": (6, 6)}), (True, {})):
        assert blocks_by_name(Experts(transposed), MUON) == expected


def test_fused_vision_qkv_is_three_matrices() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

    assert blocks_by_name(nn.Sequential(Attention()), MUON) == {"0.qkv.weight": (16, 16, 16)}


def test_rates_reach_both_groups_and_nothing_is_left_out() -> None:
    model = deepseek_v3()
    groups = parameter_groups(model, OptimSection(lr=1e-2, adamw_lr=1e-4, weight_decay=0.3))
    assert {g["kind"]: g["lr"] for g in groups} == {"muon": 1e-2, "adamw": 1e-4}
    assert {g["weight_decay"] for g in groups} == {0.3}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    trained = sum(p.requires_grad for p in model.parameters())
    assert sum(len(g["params"]) for g in parameter_groups(model, MUON)) == trained


def swapped(model_type: str) -> nn.Module:
    """A tiny model of another family with epctl's layers, on the meta device."""
    config = tiny_config(model_type)
    model = meta_model(config, torch.float32)
    swap_moe_blocks(model, config, Mesh(0, 2, 2, 0), torch.float32)
    return model


def test_expert_biases_and_router_biases_are_on_adamw() -> None:
    """They are [E, I]: matrices by shape, vectors by nature."""
    found = {name: kind for name, (kind, _) in kinds(swapped("gpt_oss")).items()}
    block = "model.layers.0.mlp"
    muon = {name for name, kind in found.items() if kind == "muon" and name.startswith(block)}
    stacks = {f"{block}.experts.{leaf}" for leaf in ("w1", "w3", "w2")}
    assert muon == stacks | {f"{block}.router.weight"}
    assert {f"{block}.experts.b1", f"{block}.router.bias"} <= found.keys() - muon


def test_gate_and_up_of_granites_shared_experts_are_apart() -> None:
    blocks = blocks_by_name(swapped("granitemoeshared"), MUON)
    assert blocks["model.layers.0.shared_mlp.input_linear.weight"] == (40, 40)


def test_correction_biases_that_are_parameters_are_not_trained() -> None:
    """ERNIE and Trinity hold them as Parameters; no optimizer may touch them."""
    for model_type in ("ernie4_5_moe", "afmoe", "laguna"):
        model = swapped(model_type)
        assert not any("bias" in name for name, _ in model.named_parameters() if ".mlp" in name)
        buffers = {name: buffer for name, buffer in model.named_buffers() if "bias" in name}
        assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
        assert len(buffers) == sum(hasattr(m, "local_experts") for m in model.modules())


def test_adamw_takes_everything_when_asked() -> None:
    assert {kind for kind, _ in kinds(deepseek_v3(), OptimSection(name="adamw")).values()} == {
        "adamw"
    }


def test_muon_without_a_matrix_is_an_error() -> None:
    with pytest.raises(ConfigError, match="none of the model's parameters is a matrix"):
        parameter_groups(nn.LayerNorm(4), MUON)
