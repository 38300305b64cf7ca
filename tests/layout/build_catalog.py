"""Builds epctl/layout/catalog from the sourced facts: config, published counts, tensor table.

    .venv/bin/python tests/layout/build_catalog.py FACTS.json

Each entry is built on the meta device at full size by transformers from the published config, and
named as the published checkpoint names it. Entries whose sizes or names the facts mark as unsure
are left out, with the reason in SKIPPED.
"""

import json
import sys
from pathlib import Path

import torch
from build_fixtures import AUTO_CLASSES, DTYPES, clean
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

import epctl.layout
from epctl.layout.names import fold_table

CATALOG = Path(epctl.layout.__file__).parent / "catalog"
SKIPPED = {
    "mistralai/Mixtral-8x22B-v0.1": "vocab_size differs between copies",
    "google/gemma-3-4b-it": "vocab_size differs between copies",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "vocab_size differs between copies",
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": "vision depth and width not seen",
    "OpenGVLab/InternVL3-8B": "vision sizes taken from a sibling; remote code",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": "projector widths are class defaults",
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": "vision sizes copied from a sibling",
    "google/gemma-4-26B-A4B": "checkpoint naming not seen",
    "Qwen/Qwen3.5-35B-A3B": "checkpoint naming not seen",
    "inclusionAI/Ling-mini-2.0": "no transformers class",
    "mistralai/Pixtral-12B-2409": "no config.json",
}
BUILD_AS = {"kimi_k2": "deepseek_v3", "hunyuan": "hunyuan_v1_moe"}
# The published Moonlight files carry a table that old releases saved and nothing reads.
STALE = ("moonshotai/Moonlight-16B-A3B", "moonshotai/Moonlight-16B-A3B-Instruct")


def build_model(model_type, config):
    keys = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")}
    keys.pop("model_type", None)
    built = AutoConfig.for_model(BUILD_AS.get(model_type, model_type), **keys)
    import transformers

    order = AUTO_CLASSES if not hasattr(built, "vision_config") else AUTO_CLASSES[1:]
    with torch.device("meta"):
        for name in order:
            auto = getattr(transformers, name, None)
            if auto is not None and type(built) in auto._model_mapping:
                return auto.from_config(built)
    raise TypeError(model_type)


def hub_state(entry):
    """Returns the published names and shapes of an entry."""
    if entry["model_type"] == "kimi_vl":
        return kimi_vl_state(entry["config"])
    model = build_model(entry["model_type"], entry["config"])
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {key: value for key, value in model.state_dict().items() if key not in tied}
    hub = revert_weight_conversion(model, dict(state))
    table = {key: tuple(value.shape) for key, value in hub.items()}
    integers = {key for key, value in hub.items() if DTYPES.get(value.dtype, "F")[0] != "F"}
    if entry["model_type"] == "qwen3_vl_moe":  # published [E, in, out]; the module turns it
        for key, shape in table.items():
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                table[key] = (shape[0], shape[2], shape[1])
    return {key: shape for key, shape in table.items() if key not in integers}


def kimi_vl_state(config):
    """Returns Kimi-VL's tensors: Moonlight under `language_model.` and MoonViT in closed form."""
    text = build_model("deepseek_v3", config["text_config"])
    hub = revert_weight_conversion(text, dict(text.state_dict()))
    table = {f"language_model.{key}": tuple(value.shape) for key, value in hub.items()}
    vision, width = config["vision_config"], config["vision_config"]["hidden_size"]
    inner, patch = vision["intermediate_size"], vision["patch_size"]
    tower = {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "patch_embed.pos_emb.weight": (64, 64, width),
        "encoder.final_layernorm.weight": (width,),
        "encoder.final_layernorm.bias": (width,),
    }
    block = {"wqkv": (3 * width, width), "wo": (width, width), "mlp.fc0": (inner, width)}
    block |= {"mlp.fc1": (width, inner), "norm0": (width,), "norm1": (width,)}
    for layer in range(vision["num_hidden_layers"]):
        for name, shape in block.items():
            tower[f"encoder.blocks.{layer}.{name}.weight"] = shape
            tower[f"encoder.blocks.{layer}.{name}.bias"] = shape[:1]
    table |= {f"vision_tower.{key}": shape for key, shape in tower.items()}
    merged, hidden = width * 4, config["text_config"]["hidden_size"]
    projector = {"pre_norm": (width,), "linear_1": (merged, merged), "linear_2": (hidden, merged)}
    for name, shape in projector.items():
        table[f"multi_modal_projector.{name}.weight"] = shape
        table[f"multi_modal_projector.{name}.bias"] = shape[:1]
    return table


def stored(entry, table):
    """Yields (name, (dtype, shape)) as the published files store it, scales included."""
    base = {"float32": "F32", "float16": "F16"}.get(
        entry["config"].get("torch_dtype", "bfloat16"), "BF16"
    )
    quantization = str(entry["quantization"] or "")
    for name, shape in table.items():
        if "mxfp4" in quantization and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = shape  # [E, in, out] becomes [E, out, in / 32, 16] bytes
            yield name + "_blocks", ("U8", (experts, outer, inner // 32, 16))
            yield name + "_scales", ("U8", (experts, outer, inner // 32))
        elif "fp8" in quantization and is_fp8(name, shape):
            yield name, ("F8_E4M3", shape)
            yield name + "_scale_inv", ("F32", tuple(-(-size // 128) for size in shape))
        else:
            yield name, (base, shape)
    if entry["id"] in STALE:
        for layer in range(entry["config"]["num_hidden_layers"]):
            size = entry["config"]["qk_rope_head_dim"] // 2
            yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", ("F32", (size,))


def is_fp8(name, shape):
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    return not any(part in name for part in ("embed", "lm_head", ".gate.weight", "indexer.w"))


def document(entry):
    config = dict(entry["config"])
    config.setdefault("architectures", entry["architectures"])
    config.setdefault("model_type", entry["model_type"])
    if entry["auto_map"] == "yes":
        config["auto_map"] = True
    published = entry["published"]
    return {
        "id": entry["id"],
        "aliases": entry["aliases"],
        "config": clean_keep_rope(config),
        "published": {
            "total_parameters": published["total_parameters"],
            "active_parameters": published["active_parameters"],
            "source": published["source"],
        },
        "computed_total_parameters": entry["computed_total_parameters"],
        "flag": entry["flag_reason"],
        "confidence": entry["confidence"],
        "quantization": entry["quantization"],
        "tensors": [
            [text, dtype, list(shape)]
            for text, (dtype, shape) in fold_table(stored(entry, hub_state(entry)))
        ],
    }


def clean_keep_rope(config):
    kept = clean(config)
    for key in ("rope_theta", "rope_scaling", "rms_norm_eps", "torch_dtype"):
        if key in config:
            kept[key] = config[key]
    return kept


def write(entry):
    lines = []
    for key, value in entry.items():
        if key == "tensors":
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            lines.append(f' "{key}": [\n{rows}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    name = entry["id"].replace("/", "--")
    (CATALOG / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    facts = json.loads(Path(sys.argv[1]).read_text())
    CATALOG.mkdir(exist_ok=True)
    for old in CATALOG.glob("*.json"):
        old.unlink()
    for entry in facts["entries"]:
        if entry["id"] in SKIPPED:
            continue
        built = document(entry)
        write(built)
        sys.stdout.write(f"{entry['id']} {len(built['tensors'])}\n")


if __name__ == "__main__":
    main()
