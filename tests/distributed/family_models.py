"""Tiny random models of every family, made and written by transformers itself.

Sizes are small and odd where they may be; config values differ from class defaults, so that a rule
that is read from the wrong key shows. Layer 0 is dense wherever the family can say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCAB_SIZE = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.75,
    "norm_topk_prob": True, "first_k_dense_replace": 1,
}  # fmt: skip
QWEN = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True,
}  # fmt: skip
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 40}
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
FULL = {"layer_types": ["full_attention"] * 3}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip

# One entry a model_type that `epctl train` builds: config keys beside SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**QWEN, **FULL, "num_dense_layers": 1, "num_shared_experts": 1, "route_scale": 1.75},
    "aria_text": {
        "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2, "intermediate_size": 24,
    },
    "axk1": {**DEEPSEEK, **MLA},
    "axk2": {**DEEPSEEK, **MLA},
    "beam": {**QWEN, **SPARSE, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.75},
    "cohere2_moe": {
        **FULL, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 2,
        "expert_selection_fn": "sigmoid", "norm_topk_prob": True,
        "shared_expert_combination_strategy": "average",
    },
    "deepseek_v2": {**DEEPSEEK, **MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**DEEPSEEK, **MLA},
    "deepseek_v32": {**DEEPSEEK, **MLA, **INDEXER},
    "dots1": DEEPSEEK,
    "dots3_note_text": {**DEEPSEEK, **FULL, "num_key_value_heads": 4},
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
    },
    "exaone_moe": {
        **QWEN, **FULL, **SPARSE, "num_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 1.75, "first_k_dense_replace": 1,
    },
    "flex_olmo": {**QWEN, "norm_topk_prob": False},
    "flint": {**QWEN, **SHARED},
    "glm4_moe": DEEPSEEK,
    "glm4_moe_lite": {**DEEPSEEK, **MLA, **SPARSE},
    "glm_moe_dsa": {**DEEPSEEK, **MLA, **INDEXER, **SPARSE},
    "gpt_oss": {
        **LOCAL, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8, "intermediate_size": 24, "swiglu_limit": 0.6,
    },
    "granitemoe": LOCAL,
    "granitemoe_swa": LOCAL,
    "granitemoehybrid": {
        **LOCAL, "shared_intermediate_size": 40, "layer_types": ["attention", "mamba", "attention"],
        "mamba_n_heads": 8, "mamba_d_head": 8,
    },
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "moe_intermediate_size": 24},
    "hy_v3": {**QWEN, **SPARSE, "num_shared_experts": 1, "router_scaling_factor": 1.75},
    "hy_v4": {**DEEPSEEK, **MLA, **SPARSE, "swiglu_limit": 0.6},
    "jamba": {
        "num_experts": 8, "num_experts_per_tok": 2, "expert_layer_period": 2,
        "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 0,
        "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
    "kolibri1": {**QWEN, "num_local_experts": 8},
    "laguna": {
        **QWEN, **SHARED, "moe_routed_scaling_factor": 1.75, "moe_router_logit_softcapping": 2.0,
    },
    "lfm2_moe": {
        **QWEN, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1,
        "routed_scaling_factor": 1.75, "use_expert_bias": True,
    },
    "llama4_text": {
        **LOCAL, **FULL, "num_experts_per_tok": 2, "intermediate_size": 24,
        "intermediate_size_mlp": 48, "moe_layers": [1, 2], "attention_chunk_size": 64,
    },
    "mellum": {**QWEN, **FULL},
    "mimo_v2_flash": {**DEEPSEEK, "v_head_dim": 8},
    "minimax": {
        **LOCAL, "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "block_size": 16,
    },
    "minimax_m2": {**LOCAL, "rotary_dim": 8},
    "minimax_m3_vl_text": {
        **LOCAL, "shared_intermediate_size": 40, "routed_scaling_factor": 1.75,
        "dense_intermediate_size": 48, "swiglu_limit": 0.6,
    },
    "mixtral": LOCAL,
    "nemotron_h": {
        **DEEPSEEK, "layers_block_type": ["mamba", "moe", "attention"],
        "moe_shared_expert_intermediate_size": 40, "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 2, "moe_latent_size": 20,
    },
    "olmoe": {**QWEN, "norm_topk_prob": False},
    "phimoe": LOCAL,
    "qwen2_moe": {**QWEN, **SHARED, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_5_moe_text": {**QWEN, **SHARED, **LINEAR},
    "qwen3_moe": {**QWEN, "mlp_only_layers": [0]},
    "qwen3_next": {**QWEN, **SHARED, **LINEAR},
    "qwen4_exp_text": {
        **QWEN, **SHARED, **LINEAR, "indexer_budget": 16, "indexer_compress_ratio": 4,
        "indexer_head_dim": 16, "indexer_n_heads": 4, "indexer_kv_heads": 1,
    },
    "solar_open": {**DEEPSEEK, "first_k_dense_replace": 0},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """Returns the transformers config of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type]})


def tiny_model(model_type: str) -> nn.Module:
    """Returns transformers' model with weights large enough to route and clamp unevenly."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)  # norms, decay rates and the like keep what the class draws
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return model


def write_tiny_model(model_type: str, folder: Path) -> Path:
    """Writes the model as `save_pretrained` does: the hub's names and storage."""
    tiny_model(model_type).save_pretrained(folder)
    return folder


def inputs() -> torch.Tensor:
    """Returns the token ids of the first loss."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB_SIZE, (2, 17), generator=generator)
