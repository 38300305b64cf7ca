"""Writes a tiny Moonlight-layout checkpoint as transformers does: several shards, bf16, quirks.

Like the published one it has a non-zero correction bias in bf16, a stale `inv_freq` a layer, and
`auto_map` naming code that is not there and must not be missed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from parity_ranks import tiny_config
from safetensors.torch import load_file, save_file

from epctl.runtime.default_model import VOCAB_SIZE, byte_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_moonlight(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Path:
    """Returns `folder` with weights, config and a byte tokenizer that has a chat template."""
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(**{"vocab_size": VOCAB_SIZE, **changes})
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.8, 1.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    add_quirks(folder, dtype)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def add_quirks(folder: Path, dtype: torch.dtype) -> None:
    """Stores the bias in `dtype`, adds a stale `inv_freq` and an `auto_map`."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / file)
        for name in list(tensors):
            if name.endswith("e_score_correction_bias"):
                tensors[name] = tensors[name].to(dtype)
            if name.endswith("o_proj.weight"):
                stale = name.replace("o_proj.weight", "rotary_emb.inv_freq")
                tensors[stale] = torch.ones(4)
                index["weight_map"][stale] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_absent.DeepseekV3ForCausalLM"}
    config_path.write_text(json.dumps(config))


def reference_loss(folder: Path, ids_BS: torch.Tensor) -> float:
    """Returns transformers' own float32 loss on a batch."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(model.eval()(input_ids=ids_BS, labels=ids_BS).loss)
