"""Where a transformers model has its decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> list[nn.Module]:
    """Returns the text decoder's layers in their order; none if the model has no such list."""
    if not hasattr(model, "get_decoder"):
        return []
    children = model.get_decoder().children()
    lists = [list(child) for child in children if isinstance(child, nn.ModuleList)]
    return max(lists, key=len, default=[])
