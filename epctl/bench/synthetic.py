"""A synthetic checkpoint in Moonlight's layout: real names and shapes, random bytes, any size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from epctl.convert.plan import PlannedTensor, planned_file
from epctl.convert.recipes import Block, Copy
from epctl.convert.view import Extent, num_bytes
from epctl.layout.shards import INDEX_NAME

NOISE_BYTES = 32 * 2**20
FULL_WIDTH = 1408


class Shape(NamedTuple):
    """Moonlight's sizes, with as many MoE layers (and, below one layer, as much width) as fit."""

    num_layers: int
    expert_width: int
    hidden_size: int = 2048
    num_experts: int = 64

    @property
    def fusion_unit_bytes(self) -> int:
        """Bytes of one projection of all experts of a layer."""
        return 2 * self.num_experts * self.hidden_size * self.expert_width


def shape_for(size_bytes: int) -> Shape:
    """Returns the shape whose checkpoint is nearest to `size_bytes`."""
    layer = 3 * Shape(1, FULL_WIDTH).fusion_unit_bytes
    if size_bytes >= layer:
        return Shape(max(1, round(size_bytes / (1.03 * layer))), FULL_WIDTH)
    return Shape(1, max(32, round(FULL_WIDTH * size_bytes / layer / 32) * 32))


def layer_tensors(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of one decoder layer."""
    hidden, width = shape.hidden_size, shape.expert_width
    prefix = f"model.layers.{layer}"
    tensors: dict[str, tuple[int, ...]] = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (16 * 192, hidden),
        f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (576, hidden),
        f"{prefix}.self_attn.kv_a_layernorm.weight": (512,),
        f"{prefix}.self_attn.kv_b_proj.weight": (16 * 256, 512),
        f"{prefix}.self_attn.o_proj.weight": (hidden, 16 * 128),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.mlp.gate.weight": (shape.num_experts, hidden),
        f"{prefix}.mlp.gate.e_score_correction_bias": (shape.num_experts,),
    }
    for part, size in [("shared_experts", 2 * width)] + [
        (f"experts.{expert}", width) for expert in range(shape.num_experts)
    ]:
        tensors[f"{prefix}.mlp.{part}.gate_proj.weight"] = (size, hidden)
        tensors[f"{prefix}.mlp.{part}.up_proj.weight"] = (size, hidden)
        tensors[f"{prefix}.mlp.{part}.down_proj.weight"] = (hidden, size)
    return tensors


def config_of(shape: Shape) -> dict[str, object]:
    """Returns config.json's keys that the layout needs."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden_size,
        "moe_intermediate_size": shape.expert_width,
        "n_routed_experts": shape.num_experts,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "num_hidden_layers": shape.num_layers,
        "first_k_dense_replace": 0,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "routed_scaling_factor": 2.446,
    }


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Writes the checkpoint, a file a layer as on the hub; returns its bytes of weights."""
    folder.mkdir(parents=True)
    noise = os.urandom(NOISE_BYTES)
    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(shape.num_layers):
        name = f"model-{layer + 1:05d}-of-{shape.num_layers:05d}.safetensors"
        tensors = layer_tensors(shape, layer)
        _write_file(folder / name, tensors, noise, seed=layer)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(num_bytes("BF16", sizes) for sizes in tensors.values())
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1), encoding="utf-8")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    return total


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], noise: bytes, seed: int) -> None:
    planned = planned_file(path.name, [_planned(name, shape) for name, shape in tensors.items()])
    position = seed * 7919
    with path.open("wb", buffering=0) as file:
        file.write(planned.header())
        for tensor in planned.tensors:
            left = tensor.num_bytes
            while left:
                # The start moves on, so that no two tensors are equal.
                start = position % (NOISE_BYTES // 2)
                file.write(memoryview(noise)[start : start + left])
                written = min(left, NOISE_BYTES - start)
                left -= written
                position += written + 4099
        os.fsync(file.fileno())


def _planned(name: str, shape: tuple[int, ...]) -> PlannedTensor:
    size = num_bytes("BF16", shape)
    return PlannedTensor(name, "BF16", shape, (Block(None, (Copy((Extent("", 0, size),)),)),))
