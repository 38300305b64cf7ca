"""Builds tests/layout/fixtures: names and shapes of models that transformers itself makes.

    .venv/bin/python tests/layout/build_fixtures.py [name ...]

Each model is built on the meta device (no weights), its state dict is folded and stored beside
its config and the facts its own modules state. The `hub` naming is transformers' own reversal of
its loading conversion, which is what `save_pretrained` writes. Run it after a transformers upgrade.
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers
from specs import SPECS
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from epctl.layout.names import fold_table

FIXTURES = Path(__file__).parent / "fixtures"
AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM", "AutoModelForTextToWaveform", "AutoModel",
)  # fmt: skip
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
DTYPES |= {torch.bool: "BOOL", torch.float16: "F16"}
NOISE = re.compile(
    r"^(_name_or_path|id2label|label2id|transformers_version|chunk_size_feed_forward|is_encoder_decoder|"
    r"output_(attentions|hidden_states|router_logits)|return_dict|problem_type|(bos|eos|pad|cls|sep|"
    r"decoder_start)_token_id|initializer_.*|.*dropout.*|use_cache|add_cross_attention|is_decoder|"
    r"cross_attention_.*|torchscript|pruned_heads|tie_encoder_decoder|rope_.*|layer_norm_eps|"
    r"rms_norm_eps|attention_probs.*|.*_loss_.*|dtype|experts_implementation)$"
)


def clean(config):
    """Returns a config without keys that say nothing about layout."""
    if isinstance(config, dict):
        return {key: clean(value) for key, value in config.items() if not NOISE.match(str(key))}
    return config


def build(spec):
    """Returns the model of a spec on the meta device."""
    config = AutoConfig.for_model(spec["model_type"], **spec.get("config", {}))
    for path, value in spec.get("set", {}).items():
        target = config
        *parents, last = path.split(".")
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    with torch.device("meta"):
        if "class" in spec:
            return getattr(transformers, spec["class"])(config)
        order = AUTO_CLASSES if not hasattr(config, "vision_config") else AUTO_CLASSES[1:]
        for name in order:
            auto = getattr(transformers, name, None)
            if auto is not None and type(config) in auto._model_mapping:
                return auto.from_config(config)
        return class_by_config(type(config))(config)


def class_by_config(config_class):
    """Returns the model class of a section that no auto class builds, such as a text config."""
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    found = [
        value
        for name, value in vars(module).items()
        if getattr(value, "config_class", None) is config_class
        and value.__module__ == module.__name__
        and name.endswith(("Model", "ForConditionalGeneration"))
        and "PreTrained" not in name
    ]
    return found[-1]


def facts(model):
    """Returns what the live modules say about experts and routers."""
    found = {"parameters": sum(p.numel() for p in unique(model.parameters()))}
    experts = {}
    for name, module in model.named_modules():
        if not re.search(r"(^|\.)experts$", name):
            continue
        up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
        if isinstance(up, torch.nn.Parameter) and up.dim() == 3:
            experts[name] = (module, up)
    if experts:
        module, up = next(iter(experts.values()))
        down = module.down_proj
        transposed = getattr(module, "is_transposed", None)
        if transposed is None:  # a class without the attribute: its own shapes say
            transposed = up.shape[1] == down.shape[2]
        found["experts"] = {
            "modules": sorted(experts),
            "num_experts": [module.down_proj.shape[0] for module, _ in experts.values()],
            "intermediate_size": down.shape[1 if transposed else 2],
            "hidden_size": down.shape[2 if transposed else 1],
            "transposed": transposed,
            "interleaved": not getattr(module, "is_concatenated", True),
            "gated": hasattr(module, "gate_up_proj"),
        }
    top_k = {m.top_k for _, m in model.named_modules() if isinstance(getattr(m, "top_k", 0), int)
             and getattr(m, "top_k", 0)}  # fmt: skip
    found["top_k"] = sorted(top_k)
    return found


def unique(parameters):
    return {id(parameter): parameter for parameter in parameters}.values()


def entries(state):
    for name, tensor in state.items():
        yield name, (DTYPES.get(tensor.dtype, "F32"), tuple(tensor.shape))


def fold(state):
    return [[text, dtype, list(shape)] for text, (dtype, shape) in fold_table(entries(state))]


def fixture(name):
    """Returns the fixture document of a spec."""
    spec = SPECS[name]
    model = build(spec)
    state = dict(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {key: value for key, value in state.items() if key not in tied}
    document = {
        "name": name,
        "transformers": transformers.__version__,
        "class": type(model).__name__,
        "config": {**clean(model.config.to_dict()), "architectures": [type(model).__name__]},
        "facts": facts(model),
        "module": fold(state),
    }
    hub = revert_weight_conversion(model, dict(state))
    hub = {key: value for key, value in hub.items() if not re.search(spec.get("no_hub", "^$"), key)}
    if set(hub) != set(state) or any(hub[key].shape != state[key].shape for key in hub):
        document["hub"] = fold(hub)
    return document


def write(document):
    lines = []
    for key, value in document.items():
        if key in ("module", "hub"):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            lines.append(f' "{key}": [\n{rows}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (FIXTURES / f"{document['name']}.json").write_text(text)


def main():
    FIXTURES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or SPECS:
        try:
            document = fixture(name)
        except Exception as error:
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}"[:300] + "\n")
            continue
        write(document)
        sys.stdout.write(f"{name} {document['class']}\n")


if __name__ == "__main__":
    main()
