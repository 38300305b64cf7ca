"""What tensors a step makes: a rank that holds too much is seen by their shapes, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Spy(TorchDispatchMode):
    """Keeps the shape of every tensor that an operation gives, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            # Floating point, and the masks that attention would take: indices are not rows.
            if isinstance(value, Tensor) and (
                value.is_floating_point() or value.dtype == torch.bool
            ):
                self.shapes.add(tuple(value.shape))
        return result

    def having(self, firsts: set[int], seconds: set[int]) -> list[tuple[int, ...]]:
        """Returns the shapes with one dimension among the first sizes, another among the second."""
        return sorted(
            shape
            for shape in self.shapes
            if any(
                a in firsts and b in seconds
                for i, a in enumerate(shape)
                for j, b in enumerate(shape)
                if i != j
            )
        )


def held(spy: Spy, model: Any, inputs: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """Returns the tensors that no rank of several should make, by what they would be."""
    text = model.config.get_text_config()
    ids_BS = inputs["input_ids"]
    batch, length = ids_BS.shape
    local = {length // num_ranks, -(-length // num_ranks)}
    rows = len(inputs["pixel_values"])
    visual = int((ids_BS == model.config.image_token_id).sum())
    return {
        "masks": spy.having({length, *local}, {length, *local}),
        "embeddings": spy.having({length}, {text.hidden_size}),
        "features": spy.having({visual}, {text.hidden_size}),
        "logits": spy.having({length, *local, *(batch * n for n in local)}, {text.vocab_size}),
        "tower masks": spy.having({rows}, {rows}),
        "tower rows": spy.having({rows}, {32, 40}),  # its width, its MLP's
    }
