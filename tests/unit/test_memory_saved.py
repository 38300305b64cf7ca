"""Activation formulas against what autograd really keeps of transformers' own layers, in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from epctl.launch.memory_activations import attention_token_bytes, mlp_token_bytes
from epctl.launch.memory_shape import AttentionShape

NUM_TOKENS, HIDDEN, INTERMEDIATE, HEADS = 512, 256, 640, 4


def saved_bytes(layer: nn.Module, run: Any, given: list[torch.Tensor]) -> int:
    """Returns the bytes of every storage that autograd keeps, Parameters and inputs apart."""
    known = {
        t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers(), *given]
    }
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # or a freed storage's address would come again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and not isinstance(tensor, nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def deepseek() -> tuple[Any, Any, AttentionShape]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    config = DeepseekV3Config(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=64, first_k_dense_replace=1, num_hidden_layers=1,
    )  # fmt: skip
    # Equal head sizes: with unequal ones a CPU has only the kernel that keeps every score.
    shape = AttentionShape(HEADS, HEADS, 64, 64, 0, 64, 32)
    return config, modeling.DeepseekV3DecoderLayer, shape


def qwen3() -> tuple[Any, Any, AttentionShape]:
    from transformers import Qwen3Config
    from transformers.models.qwen3 import modeling_qwen3 as modeling

    config = Qwen3Config(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=HEADS,
        num_key_value_heads=2, head_dim=64, num_hidden_layers=1,
    )  # fmt: skip
    return config, modeling.Qwen3DecoderLayer, AttentionShape(HEADS, 2, 64, 64, has_qk_norm=True)


def qwen2() -> tuple[Any, Any, AttentionShape]:
    from transformers import Qwen2Config
    from transformers.models.qwen2 import modeling_qwen2 as modeling

    config = Qwen2Config(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=HEADS,
        num_key_value_heads=2, num_hidden_layers=1,
    )  # fmt: skip
    return config, modeling.Qwen2DecoderLayer, AttentionShape(HEADS, 2, 64, 64)


@pytest.mark.parametrize("family", [deepseek, qwen3, qwen2], ids=lambda f: str(f.__name__))
def test_a_dense_layer_keeps_what_the_formula_says(family: Any) -> None:
    config, layer_class, shape = family()
    config._attn_implementation = "sdpa"
    layer = layer_class(config, 0).to(torch.bfloat16).train()
    x_BSD = torch.randn(1, NUM_TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    rope_dim = shape.rope_dim or shape.qk_head_dim
    cos = torch.randn(1, NUM_TOKENS, rope_dim, dtype=torch.bfloat16)
    sin = torch.randn_like(cos)

    def run() -> Any:
        return layer(x_BSD, position_embeddings=(cos, sin), attention_mask=None)

    kept = saved_bytes(layer, run, [x_BSD, cos, sin])
    norm = HIDDEN * (4 + 2 + 2)
    expected = NUM_TOKENS * (
        attention_token_bytes(shape, HIDDEN, 2) + norm + mlp_token_bytes(INTERMEDIATE, 2)
    )
    assert expected == pytest.approx(kept, rel=0.1), expected / kept
