"""Raw bytes of checkpoints, good and bad, for the attack tests."""

import json
import struct

CONFIG = {"model_type": "mixtral", "hidden_size": 4, "num_hidden_layers": 1}
WIDTH = {"F32": 4, "BF16": 2, "U8": 1, "I32": 4, "F8_E4M3": 1}


def shard(header, data=b"", length=None):
    """Returns the bytes of a shard; `header` may be a dict or the raw header bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor_shard(tensors):
    """Returns a sound shard; `tensors` maps a name to (dtype, shape)."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = WIDTH[dtype]
        for side in shape:
            size *= side
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    return shard(header, bytes(offset))


def write_model(folder, shards, config=CONFIG, index=None):
    """Writes a model folder: shard bytes by name, config, and an index when given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, data in shards.items():
        (folder / name).write_bytes(data)
    if index is not None:
        text = index if isinstance(index, str) else json.dumps(index)
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def moe_tensors(num_experts=4, hidden_size=4, width=6, prefix="model.layers.0", dtype="F32"):
    """Returns the tensors of one Mixtral layer."""
    block = f"{prefix}.block_sparse_moe"
    tensors = {f"{block}.gate.weight": (dtype, (num_experts, hidden_size))}
    for expert in range(num_experts):
        tensors[f"{block}.experts.{expert}.w1.weight"] = (dtype, (width, hidden_size))
        tensors[f"{block}.experts.{expert}.w3.weight"] = (dtype, (width, hidden_size))
        tensors[f"{block}.experts.{expert}.w2.weight"] = (dtype, (hidden_size, width))
    return tensors


MOE_CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
}
