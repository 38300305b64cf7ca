"""The model that `epctl bench train` measures: by name, at any depth, from its config alone.

The catalog answers first, so a known name needs no network; weights are made on the devices.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from epctl.config import OptimSection
from epctl.errors import ConfigError
from epctl.hub import resolve
from epctl.launch.memory_default import deepseek_v3_source
from epctl.launch.memory_shape import ModelShape, model_shape
from epctl.launch.model_reference import require_trainable
from epctl.layout.catalog import catalog_source
from epctl.layout.detect import detect
from epctl.layout.model import ModelLayout
from epctl.layout.source import ModelSource
from epctl.runtime.default_model import NAME, VALUES

TINY = "tiny"
_LAYER = re.compile(r"\.(?:layers|blocks|h)\.(\d+)\.")


@dataclass(frozen=True)
class BenchModel:
    """A model at the measured depth: config values and what its tensors would be."""

    name: str
    source: ModelSource
    layout: ModelLayout

    @property
    def values(self) -> Mapping[str, Any]:
        """Returns config.json's values."""
        return self.source.config

    @property
    def num_layers(self) -> int:
        return int(self.values["num_hidden_layers"])

    @property
    def first_moe_layer(self) -> int:
        assert self.layout.moe is not None
        return min(self.layout.moe.layers)

    def shape(self, optim: OptimSection) -> ModelShape:
        """Returns what memory and FLOPs are counted from."""
        return model_shape(self.layout, self.values, optim)

    def cut(self, num_layers: int | None) -> BenchModel:
        """Returns the model with its first layers only; all for None.

        Raises ConfigError for a depth without experts, or more layers than there are.
        """
        if num_layers is None or num_layers == self.num_layers:
            return self
        if not self.first_moe_layer < num_layers <= self.num_layers:
            raise ConfigError(
                f"`--layers {num_layers}`: `{self.name}` has {self.num_layers} layers, the first "
                f"{self.first_moe_layer} without experts",
                hint=f"use {self.first_moe_layer + 1} to {self.num_layers}",
            )
        source = cut_source(self.source, num_layers)
        return BenchModel(self.name, source, detect(source))


def open_bench_model(reference: str) -> BenchModel:
    """Returns the model that `reference` names: `tiny`, a catalog name, a folder or a hub id.

    Raises InputError or HubError for a name that nobody knows, LayoutError for a model without
    trainable routed experts, ConfigError for one whose depth is stated in another way.
    """
    if reference in (TINY, NAME):
        source = deepseek_v3_source(NAME, VALUES)
    else:
        source = catalog_source(reference) or resolve(reference)
    layout = detect(source)
    require_trainable(layout)
    if "num_hidden_layers" not in source.config:
        raise ConfigError(f"the config of `{reference}` states no `num_hidden_layers`")
    return BenchModel(source.id, source, layout)


def cut_source(source: ModelSource, num_layers: int) -> ModelSource:
    """Returns the source as a checkpoint of the first `num_layers` layers would be."""
    whole = int(source.config["num_hidden_layers"])
    values = {
        key: value[:num_layers] if isinstance(value, list) and len(value) == whole else value
        for key, value in source.config.items()
    }
    values |= {"num_hidden_layers": num_layers, "num_nextn_predict_layers": 0}
    if "num_nextn_predict_layers" not in source.config:
        del values["num_nextn_predict_layers"]
    kept = {n: tensor for n, tensor in source.tensors.items() if _layer_of(n) < num_layers}
    return replace(source, config=values, tensors=kept)


def _layer_of(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[1]) if found else -1
