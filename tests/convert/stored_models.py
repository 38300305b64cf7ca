"""Small checkpoints of every expert storage, as raw bytes: written here, not by what is tested."""

import json
import struct

import numpy as np

WIDTH = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1, "I64": 8, "F8_E8M0": 1}

# storage -> (config, names of an expert's tensors below `PREFIX`)
PREFIX = "model.layers.{layer}."
COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4}


def gated(block, gate, up, down, config):
    names = {
        f"{block}.{{e}}.{gate}": ("I", "H"),
        f"{block}.{{e}}.{up}": ("I", "H"),
        f"{block}.{{e}}.{down}": ("H", "I"),
    }
    return config, names


STORAGES = {
    "per_expert": gated(
        "mlp.experts", "gate_proj.weight", "up_proj.weight", "down_proj.weight",
        {"model_type": "qwen3_moe", "num_experts": "E", "moe_intermediate_size": "I"},
    ),
    "w1w3w2": gated(
        "block_sparse_moe.experts", "w1.weight", "w3.weight", "w2.weight",
        {"model_type": "mixtral", "num_local_experts": "E", "intermediate_size": "I"},
    ),
    "fused": (
        {"model_type": "qwen3_moe", "num_experts": "E", "moe_intermediate_size": "I"},
        {"mlp.experts.gate_up_proj": ("E", "2I", "H"), "mlp.experts.down_proj": ("E", "H", "I")},
    ),
    "fused_transposed": (
        {"model_type": "qwen3_vl_moe_text", "num_experts": "E", "moe_intermediate_size": "I"},
        {"mlp.experts.gate_up_proj": ("E", "H", "2I"), "mlp.experts.down_proj": ("E", "I", "H")},
    ),
    "llama4": (
        {"model_type": "llama4_text", "num_local_experts": "E", "intermediate_size": "I",
         "interleave_moe_layer_step": 1},
        {"feed_forward.experts.gate_up_proj": ("E", "H", "2I"),
         "feed_forward.experts.down_proj": ("E", "I", "H")},
    ),
    "interleaved": (
        {"model_type": "gpt_oss", "num_local_experts": "E", "intermediate_size": "I"},
        {"mlp.experts.gate_up_proj": ("E", "H", "2I"), "mlp.experts.down_proj": ("E", "I", "H"),
         "mlp.experts.gate_up_proj_bias": ("E", "2I"), "mlp.experts.down_proj_bias": ("E", "H")},
    ),
    "input_output_linear": (
        {"model_type": "granitemoe", "num_local_experts": "E", "intermediate_size": "I"},
        {"block_sparse_moe.input_linear.weight": ("E", "2I", "H"),
         "block_sparse_moe.output_linear.weight": ("E", "H", "I")},
    ),
    "flat_rows": (
        {"model_type": "dbrx", "ffn_config": {"moe_num_experts": "E", "ffn_hidden_size": "I"}},
        {"ffn.experts.mlp.w1": ("E*I", "H"), "ffn.experts.mlp.v1": ("E*I", "H"),
         "ffn.experts.mlp.w2": ("E*I", "H")},
    ),
    "stacked": (
        {"model_type": "step3p5", "moe_num_experts": "E", "moe_intermediate_size": "I"},
        {"moe.gate_proj.weight": ("E", "I", "H"), "moe.up_proj.weight": ("E", "I", "H"),
         "moe.down_proj.weight": ("E", "H", "I")},
    ),
    "ungated": (
        {"model_type": "nemotron_h", "n_routed_experts": "E", "moe_intermediate_size": "I"},
        {"mixer.experts.{e}.up_proj.weight": ("I", "H"),
         "mixer.experts.{e}.down_proj.weight": ("H", "I")},
    ),
    "w13": (
        {"model_type": "inkling_text", "n_routed_experts": "E", "moe_intermediate_size": "I"},
        {"mlp.experts.w13_weight": ("E", "2I", "H"), "mlp.experts.w2_weight": ("E", "H", "I")},
    ),
    "fp8": gated(
        "mlp.experts", "gate_proj.weight", "up_proj.weight", "down_proj.weight",
        {"model_type": "deepseek_v3", "n_routed_experts": "E", "moe_intermediate_size": "I",
         "first_k_dense_replace": 0,
         "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ),
    "mxfp4": (
        {"model_type": "gpt_oss", "num_local_experts": "E", "intermediate_size": "I",
         "quantization_config": {"quant_method": "mxfp4"}},
        {"mlp.experts.gate_up_proj_blocks": ("E", "2I", "H/32", "16"),
         "mlp.experts.gate_up_proj_scales": ("E", "2I", "H/32"),
         "mlp.experts.gate_up_proj_bias": ("E", "2I"),
         "mlp.experts.down_proj_blocks": ("E", "H", "I/32", "16"),
         "mlp.experts.down_proj_scales": ("E", "H", "I/32"),
         "mlp.experts.down_proj_bias": ("E", "H")},
    ),
}  # fmt: skip
PLAIN = [name for name in STORAGES if name not in ("fp8", "mxfp4")]


def size_of(text, sizes):
    return int(eval(text.replace("2I", "2*I").replace("/", "//"), {}, sizes))


def fill(config, sizes):
    """Returns the config with E and I as numbers."""
    return {
        key: fill(value, sizes) if isinstance(value, dict) else sizes.get(value, value)
        if isinstance(value, str) else value
        for key, value in config.items()
    }  # fmt: skip


def dtype_of(name, dtype, storage):
    if storage == "mxfp4" and name.endswith(("_blocks", "_scales")):
        return "U8"
    return "F8_E4M3" if storage == "fp8" and name.endswith("_proj.weight") else dtype


def model_tensors(storage, *, num_experts=8, hidden=6, width=4, dtype="BF16", num_layers=2):
    """Returns (config, tensors); tensors map each name to (dtype, shape)."""
    template, names = STORAGES[storage]
    sizes = {"E": num_experts, "H": hidden, "I": width}
    config = fill(template, sizes) | COMMON | {"hidden_size": hidden, "torch_dtype": "bfloat16"}
    config["num_hidden_layers"] = num_layers
    tensors = {"model.embed_tokens.weight": (dtype, (7, hidden))}
    for layer in range(num_layers):
        prefix = PREFIX.format(layer=layer)
        tensors[f"{prefix}self_attn.q_proj.weight"] = (
            "F8_E4M3" if storage == "fp8" else dtype, (hidden, hidden),
        )  # fmt: skip
        tensors[f"{prefix}self_attn.rotary_emb.inv_freq"] = ("F32", (3,))
        tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = ("F32", (num_experts,))
        tensors |= router(storage, prefix, num_experts, hidden, dtype)
        for name, shape in names.items():
            for expert in range(num_experts) if "{e}" in name else [None]:
                full = prefix + name.replace("{e}", str(expert))
                tensors[full] = (
                    dtype_of(name, dtype, storage), tuple(size_of(s, sizes) for s in shape),
                )  # fmt: skip
    tensors["model.norm.weight"] = ("F32", (hidden,))
    if storage == "fp8":
        for name, (kind, shape) in list(tensors.items()):
            if kind == "F8_E4M3":
                grid = tuple(-(-side // 128) for side in shape)
                tensors[f"{name}_scale_inv"] = ("F32", grid)
    return config, tensors


def router(storage, prefix, num_experts, hidden, dtype):
    names = {
        "w1w3w2": "block_sparse_moe.gate.weight", "interleaved": "mlp.router.weight",
        "mxfp4": "mlp.router.weight", "llama4": "feed_forward.router.weight",
        "input_output_linear": "block_sparse_moe.router.layer.weight",
        "flat_rows": "ffn.router.layer.weight", "stacked": "moe.gate.weight",
        "ungated": "mixer.gate.weight",
    }  # fmt: skip
    return {prefix + names.get(storage, "mlp.gate.weight"): (dtype, (num_experts, hidden))}


def random_bytes(name, dtype, shape, seed):
    count = int(np.prod(shape, dtype=np.int64)) * WIDTH[dtype]
    rng = np.random.default_rng([seed, *name.encode()])
    if dtype == "F32":
        return (rng.standard_normal(count // 4) * 0.02).astype("<f4").tobytes()
    if dtype == "F8_E4M3":  # no NaN, so that values can be compared
        codes = rng.integers(0, 254, count, dtype=np.uint8)
        return np.where((codes & 0x7F) == 0x7F, 0, codes).astype(np.uint8).tobytes()
    if name.endswith("_scales"):
        return rng.integers(110, 130, count, dtype=np.uint8).tobytes()
    if dtype == "BF16":
        values = rng.standard_normal(count // 2).astype("<f4")
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    if dtype == "F16":
        return rng.standard_normal(count // 2).astype("<f2").tobytes()
    return rng.bytes(count)


def write_shard(path, tensors, seed=0):
    """Writes one safetensors file; `tensors` map names to (dtype, shape)."""
    header, offset, parts = {}, 0, []
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda t: -WIDTH[t[1][0]]):
        data = random_bytes(name, dtype, shape, seed)
        header[name] = {
            "dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)],
        }  # fmt: skip
        offset += len(data)
        parts.append(data)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(parts))


def write_model(folder, storage, *, num_files=2, seed=0, **sizes):
    """Writes a model folder with its tensors dealt out to `num_files` shards in runs."""
    config, tensors = model_tensors(storage, **sizes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    names = list(tensors)
    if num_files == 1:
        write_shard(folder / "model.safetensors", tensors, seed)
        return folder
    step = -(-len(names) // num_files)
    weight_map = {}
    for number, start in enumerate(range(0, len(names), step), 1):
        file = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        part = names[start : start + step]
        write_shard(folder / file, {name: tensors[name] for name in part}, seed)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_tensors(folder):
    """Returns {name: (dtype, shape, bytes)} of all safetensors files at the top of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                body = data[8 + size + start : 8 + size + end]
                found[name] = (entry["dtype"], tuple(entry["shape"]), body)
    return found


def read_tree(folder):
    """Returns every file of a folder by its path, as bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
