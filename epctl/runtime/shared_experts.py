"""Shared experts computed while the routed tokens travel to their ranks.

transformers' blocks call their shared experts before or after the routed ones, never in between.
`EarlyShared` stands in front of a block's shared experts: the routed experts have it run them
while the exchange is under way, and when the block asks for them it hands the result out.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NAMES = ("shared_experts", "shared_expert", "shared_mlp")


class EarlyShared:
    """A block's shared experts, run once a forward: ahead of time, or when the block asks.

    A block that asks first is served first. One that asks for other tokens than came into it gets
    what it asks for, after work in vain; no known family does.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tokens: Tensor | None = None
        self.output: Tensor | None = None

    def within(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the block's forward that notes its tokens, and keeps nothing once it has ended.

        Not a hook: activation checkpointing calls the forward again without hooks, and may cut
        it short.
        """

        @functools.wraps(forward)
        def noting(*inputs: Any, **options: Any) -> Any:
            self.tokens = inputs[0] if inputs else options.get("hidden_states")
            try:
                return forward(*inputs, **options)
            finally:
                self.forget()

        return noting

    def run_ahead(self) -> None:
        """Computes them now, unless the block has asked already."""
        if self.tokens is not None:
            self.output = self.module(self.tokens)

    def __call__(self, x: Tensor) -> Tensor:
        tokens, output = self.tokens, self.output
        self.forget()
        if output is not None and tokens is not None:
            if x.data_ptr() == tokens.data_ptr() and x.numel() == tokens.numel():
                return output.reshape(x.shape)
            warnings.warn("shared experts ran twice: the block changes their tokens", stacklevel=2)
        result: Tensor = self.module(x)
        return result

    def forget(self) -> None:
        self.tokens = self.output = None


def run_shared_early(block: nn.Module) -> EarlyShared | None:
    """Puts an `EarlyShared` before the shared experts of `block`; None if it has none.

    Parameters keep their names: an instance's own attribute is found before its children.
    """
    for name in NAMES:
        module = block._modules.get(name)
        if module is not None:
            early = EarlyShared(module)
            block.__dict__[name] = early
            block.forward = early.within(block.forward)
            return early
    return None
