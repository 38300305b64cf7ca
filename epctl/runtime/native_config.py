"""transformers' own config for a model, whatever code its repository brings along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epctl.errors import LayoutError

# Published under a name of their own with code in the repository; the same architecture.
SAME_ARCHITECTURE = {"kimi_k2": "deepseek_v3"}


def native_config(values: Mapping[str, Any]) -> Any:
    """Returns the config of transformers' class for the `model_type` in config.json's values.

    `auto_map` is dropped: saved beside weights without that code it would break loading.

    Raises LayoutError if transformers builds no language model of that type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stated = str(values.get("model_type"))
    model_type = SAME_ARCHITECTURE.get(stated, stated)
    if model_type not in CONFIG_MAPPING:
        raise LayoutError(
            f"transformers has no model_type `{stated}`; training needs its model code",
            hint="a newer transformers may have it: `pip install -U transformers`",
        )
    known = {
        key: _decoded(value)
        for key, value in values.items()
        if key not in ("auto_map", "model_type")
    }
    config = CONFIG_MAPPING[model_type].from_dict(known)
    model_class = auto_class(config)._model_mapping.get(type(config), None)
    if model_class is None:
        raise LayoutError(f"transformers builds no causal language model of type `{stated}`")
    config.architectures = [model_class.__name__]
    for part in (config, text_config(config)):
        if getattr(part, "output_router_logits", False):
            # epctl's router keeps no logits for transformers' balancing loss.
            part.output_router_logits = False
    return config


def auto_class(config: Any) -> Any:
    """Returns transformers' auto class that builds what trains on `config`, images included."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if is_visual(config) and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def is_visual(config: Any) -> bool:
    """True for the config of a model with a vision tower."""
    return getattr(config, "vision_config", None) is not None


def text_config(config: Any) -> Any:
    """Returns the part of a transformers config that describes the decoder."""
    return config.get_text_config()


def _decoded(value: Any) -> Any:
    """Returns a value of config.json; transformers writes the floats that JSON lacks as objects."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


def config_of(folder: Path) -> Any:
    """Returns the native config of a model folder; raises as `native_config` does."""
    return native_config(json.loads((folder / "config.json").read_text("utf-8")))


def cut_depth(config: Any, num_layers: int | None) -> int:
    """Reduces a transformers config to its first decoder layers; returns how many are left."""
    config = text_config(config)
    whole = int(config.num_hidden_layers)
    if num_layers is not None and num_layers < whole:
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == whole:
                setattr(config, key, value[:num_layers])
        config.num_hidden_layers = num_layers
    return int(config.num_hidden_layers)
