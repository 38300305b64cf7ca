"""Facts out of config.json: aliases, nested sections, and the reason for every value.

The alias table is the generic one; a family's own aliases come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from epctl.errors import LayoutError
from epctl.layout.safetensors import short_text

# Where a decoder's keys may stand, most specific first.
TEXT_SECTIONS = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config.text_config",
    "talker_config.text_config",
)
ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_experts": (
        "n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts",
        "ffn_config.moe_num_experts",
    ),
    "top_k": (
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
        "top_k_experts", "n_activated_experts", "ffn_config.moe_top_k",
    ),
    "expert_intermediate_size": (
        "moe_intermediate_size", "expert_ffn_hidden_size", "moe_inter_dim",
        "ffn_config.ffn_hidden_size",
    ),
    "expert_hidden_size": ("moe_hidden_size", "moe_latent_size"),
    "hidden_size": ("hidden_size", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "num_kv_heads": (
        "num_key_value_heads", "n_kv_heads", "attn_config.kv_n_heads", "num_attention_groups",
    ),
    "shared_experts": (
        "n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts",
    ),
    "shared_intermediate_size": (
        "shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim",
        "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
    ),
    "activation": ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function"),
    "activation_limit": ("swiglu_limit",),
    "mtp_layers": ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"),
}  # fmt: skip


# Far above any model; a layer number is looked at one by one.
MAX_LAYERS = 100_000


class ConfigValueError(LayoutError):
    """A value of config.json that cannot be what its key means."""


class ConfigFacts:
    """Looks meanings up in a config and records why each value was taken."""

    def __init__(
        self,
        config: Mapping[str, Any],
        aliases: Mapping[str, list[str]] | None = None,
        defaults: Mapping[str, Any] | None = None,
        family: str | None = None,
    ) -> None:
        self.config = config
        self.reasons: dict[str, str] = {}
        self._aliases = aliases or {}
        self._defaults = defaults or {}
        self._family = family
        self._sections = list(_text_sections(config))

    def get(self, meaning: str) -> Any:
        """Returns the value of a meaning such as `num_experts`, None when nothing states it."""
        value, reason = self.look_up(self._aliases.get(meaning, ALIASES.get(meaning, (meaning,))))
        if reason is None and meaning in self._defaults:
            value = self._defaults[meaning]
            reason = f"default of the {self._family} family"
        if reason is not None:
            self.reasons[meaning] = reason
        return value

    def get_int(self, meaning: str) -> int | None:
        """Returns a whole number; a per-layer list counts when all its entries agree."""
        value = self.get(meaning)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        return value if type(value) is int else None

    def get_num_layers(self) -> int | None:
        """Returns the number of decoder layers. Raises ConfigValueError for an impossible one."""
        count = self.get_int("num_layers")
        if count is not None and not 0 <= count <= MAX_LAYERS:
            raise ConfigValueError(f"{self.reasons['num_layers']}: 0 to {MAX_LAYERS} can be read")
        return count

    def look_up(self, keys: Iterable[str]) -> tuple[Any, str | None]:
        """Returns the first of `keys` that has a value, and the reason, or (None, None)."""
        for key in keys:
            for prefix, section in self._sections:
                value = _at(section, key)
                if value is not None:
                    return value, f"config {prefix}{key} = {_shown(value)}"
        return None, None


def _text_sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in TEXT_SECTIONS:
        section = _at(config, path)
        if isinstance(section, Mapping):
            yield f"{path}.", section
    yield "", config


def _at(section: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(section, Mapping):
            return None
        section = section.get(key)
    return section


def finite(value: Any) -> float | None:
    """Returns a number of the config as a float; None for other types, infinities and NaN."""
    # Compared first: an integer of a thousand digits is no float.
    known = type(value) in (int, float) and -1e30 < value < 1e30
    return float(value) if known else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Returns the model_type of the text section, then the top-level one, without repeats."""
    found: list[str] = []
    for _, section in _text_sections(config):
        model_type = section.get("model_type")
        if isinstance(model_type, str) and model_type not in found:
            found.append(short_text(model_type))
    return found


def moe_layers_by_config(facts: ConfigFacts, num_layers: int) -> tuple[set[int], str] | None:
    """Returns the MoE layers that the config's own rule implies, and the rule; None without one."""
    for key, rule in _LAYER_RULES.items():
        value, reason = facts.look_up([key])
        if reason is None or isinstance(value, bool):
            continue
        layers = rule(value, facts, num_layers)
        if layers is not None:
            first = facts.look_up(["first_k_dense_replace"])[1] if key == "moe_layer_freq" else None
            return layers, f"{first}, {reason.removeprefix('config ')}" if first else reason
    return None


def _from_types(value: Any, _: ConfigFacts, num_layers: int) -> set[int] | None:
    # Lists name a layer's kind in full (sparse, moe, hash_moe), hybrid patterns use one letter.
    if not isinstance(value, list | str) or len(value) < num_layers:
        return None
    words = {"sparse", "moe", "hash_moe", "E"}
    if not set(map(str, value)) & (words | {"dense"}):
        return None  # a list of attention or recurrence kinds, silent about experts
    return {layer for layer in range(num_layers) if str(value[layer]) in words}


def _from_list(value: Any, _: ConfigFacts, num_layers: int) -> set[int] | None:
    return {item for item in value if type(item) is int} if isinstance(value, list) else None


def _from_frequency(value: Any, facts: ConfigFacts, num_layers: int) -> set[int] | None:
    if isinstance(value, list):
        return {layer for layer, flag in enumerate(value[:num_layers]) if flag}
    first = facts.look_up(["first_k_dense_replace"])[0] or 0
    if type(value) is not int or value < 1 or type(first) is not int:
        return None
    return {layer for layer in range(first, num_layers) if layer % value == 0}


def _from_first_dense(value: Any, _: ConfigFacts, num_layers: int) -> set[int] | None:
    return set(range(value, num_layers)) if type(value) is int else None


def _from_sparse_step(value: Any, facts: ConfigFacts, num_layers: int) -> set[int] | None:
    if type(value) is not int or value < 1:
        return None
    dense = facts.look_up(["mlp_only_layers"])[0] or []
    return {layer for layer in range(num_layers) if (layer + 1) % value == 0 and layer not in dense}


def _from_period(value: Any, facts: ConfigFacts, num_layers: int) -> set[int] | None:
    offset = facts.look_up(["expert_layer_offset"])[0] or 0
    if type(value) is not int or value < 1 or type(offset) is not int:
        return None
    return {layer for layer in range(num_layers) if layer % value == offset}


def _from_step(value: Any, _: ConfigFacts, num_layers: int) -> set[int] | None:
    if type(value) is not int or value < 1:
        return None
    return {layer for layer in range(num_layers) if (layer + 1) % value == 0}


def _from_interval(value: Any, facts: ConfigFacts, num_layers: int) -> set[int] | None:
    start = facts.look_up(["moe_layer_start_index"])[0] or 0
    end = facts.look_up(["moe_layer_end_index"])[0]
    if type(value) is not int or value < 1 or type(start) is not int:
        return None
    last = num_layers - 1 if type(end) is not int or end < 0 else end
    return {
        layer for layer in range(num_layers) if start <= layer <= last and (layer + 1) % value == 0
    }


# In order: what lists layers one by one wins over what counts them.
_LAYER_RULES = {
    "mlp_layer_types": _from_types,
    "layers_block_type": _from_types,
    "hybrid_override_pattern": _from_types,
    "moe_layers": _from_list,
    "moe_layer_freq": _from_frequency,
    "first_k_dense_replace": _from_first_dense,
    "num_dense_layers": _from_first_dense,
    "expert_layer_period": _from_period,
    "moe_layer_interval": _from_interval,
    "interleave_moe_layer_step": _from_step,
    "decoder_sparse_step": _from_sparse_step,
}
