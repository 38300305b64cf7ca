"""Where a transformers model has its decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> list[nn.Module]:
    """Returns the text decoder's layers in their order; none if the model has no such list."""
    if not hasattr(model, "get_decoder"):
        return []
    decoder = model.get_decoder()
    # Llama 4 and Mllama name the model with the head as their decoder.
    for module in (decoder, getattr(decoder, "model", None)):
        children = [] if module is None else module.children()
        lists = [list(child) for child in children if isinstance(child, nn.ModuleList)]
        if lists:
            return max(lists, key=len)
    return []
