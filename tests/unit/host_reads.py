"""A spy for what makes the host wait for a value of the device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Methods of a tensor that read it; on the CPU some never reach the dispatcher.
READING_METHODS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__")
READING_OPERATORS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class HostReads(TorchDispatchMode):
    """Records operations that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in READING_OPERATORS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
