"""What attention computed, kept from forward to a layer's recomputation: it is not made again.

Attention grows with the square of a sequence, what it leaves only with its length. So a layer that
is recomputed may keep, beside its input, attention's output and log-sum-exp; queries, keys and
values are made again, and backward is the very one of that output. As torch's selective
checkpointing does it, but its dispatch mode is around attention alone: around a whole layer it
costs every operator some microseconds of Python.
"""

# torch's modes are not typed.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Forward operators whose results are kept; attention by single products is computed again.
KEPT_OPERATORS = (
    "aten::_scaled_dot_product_",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "torch_attn::_varlen_attn",
)


_mode: KeptAttention | None = None  # backward runs one recomputation at a time


class KeptAttention(TorchDispatchMode):
    """Results of the attention operators in one forward of one recomputed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, Any]] = []
        self._replays = False

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """The context of the first forward."""
        return self._wanted(replays=False)

    def replaying(self) -> contextlib.AbstractContextManager[None]:
        """The context of the recomputation: results come back in the order they were made in."""
        return self._wanted(replays=True)

    @contextlib.contextmanager
    def _wanted(self, *, replays: bool) -> Iterator[None]:
        global _mode
        before, _mode, self._replays = _mode, self, replays
        try:
            yield
        finally:
            _mode = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._replays and _is_kept(func):
            assert self.results, "a recomputation attends more often than its forward did"
            name, result = self.results.pop(0)
            assert name == func.name(), (name, func.name())
            return result
        result = func(*args, **(kwargs or {}))
        if _is_kept(func):
            # Aliases without autograd's marks: these it sets on `result` itself, and its graph
            # would be held by what the graph holds.
            self.results.append((func.name(), tree_map(_detached, result)))
        return result


def _is_kept(func: Any) -> bool:
    return bool(func.name().startswith(KEPT_OPERATORS))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def keeping(dropout: float) -> contextlib.AbstractContextManager[Any]:
    """What attention runs in, for its results to be kept where a layer that it is in wants that.

    With dropout nothing is kept: a recomputation that skips attention's random numbers would give
    other ones to what comes after it.
    """
    return contextlib.nullcontext() if _mode is None or dropout else _mode


def register_kept_attention() -> None:
    """Makes transformers' "sdpa" an attention that can be kept; without a wish it is as it was."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention_forward(*inputs: Any, dropout: float = 0.0, **named: Any) -> Any:
        with keeping(dropout):
            return sdpa_attention_forward(*inputs, dropout=dropout, **named)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention_forward)
