"""The embedded default model as a ModelSource: what its checkpoint would hold, without torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from epctl.layout.detect import detect
from epctl.layout.model import ModelLayout
from epctl.layout.names import unfold_name
from epctl.layout.safetensors import TensorEntry
from epctl.layout.source import ModelSource
from epctl.runtime.default_model import NAME, VALUES


def deepseek_v3_source(name: str, config: Mapping[str, Any]) -> ModelSource:
    """Returns the source of a DeepSeek-V3 checkpoint with a config and no files."""
    tensors = {
        name: TensorEntry("F32", shape, "", 0, 0)
        for folded, shape in _tensors(config)
        for name in unfold_name(folded)
    }
    return ModelSource(
        id=name, kind="embedded", config={**config, "model_type": "deepseek_v3"}, tensors=tensors
    )


@functools.cache
def default_model() -> tuple[ModelSource, ModelLayout]:
    """Returns the embedded default model and its layout."""
    source = deepseek_v3_source(NAME, VALUES)
    return source, detect(source)


def _tensors(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields (folded name, shape) in the order in which the model registers its Parameters."""
    hidden, last = c["hidden_size"], c["num_hidden_layers"] - 1
    first_moe = c["first_k_dense_replace"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    every = f"model.layers.{{0-{last}}}"
    yield from ((f"{every}.self_attn.{n}", s) for n, s in _attention(c))
    if first_moe:
        yield from _mlp(f"model.layers.{{0-{first_moe - 1}}}.mlp", c["intermediate_size"], hidden)
    if first_moe <= last:
        block = f"model.layers.{{{first_moe}-{last}}}.mlp"
        experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
        yield from _mlp(f"{block}.experts.{{0-{experts - 1}}}", width, hidden)
        yield f"{block}.gate.weight", (experts, hidden)
        yield f"{block}.gate.e_score_correction_bias", (experts,)
        if c["n_shared_experts"]:
            yield from _mlp(f"{block}.shared_experts", c["n_shared_experts"] * width, hidden)
    yield f"{every}.input_layernorm.weight", (hidden,)
    yield f"{every}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


def _attention(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    query = heads * (nope + rope)
    if c["q_lora_rank"]:
        yield "q_a_proj.weight", (c["q_lora_rank"], hidden)
        yield "q_a_layernorm.weight", (c["q_lora_rank"],)
        yield "q_b_proj.weight", (query, c["q_lora_rank"])
    else:
        yield "q_proj.weight", (query, hidden)
    yield "kv_a_proj_with_mqa.weight", (rank + rope, hidden)
    yield "kv_a_layernorm.weight", (rank,)
    yield "kv_b_proj.weight", (heads * (nope + value), rank)
    yield "o_proj.weight", (hidden, heads * value)


def _mlp(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)
