"""What the host found out in a layer's first forward, known in its recomputation.

Reading a value of the device makes the host wait until the device gets there, and the device then
wait until the host has started more work. Backward computes a recomputed layer from the very
tensors of its forward, so what was read then need not be read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_current: list[Findings] = []  # innermost last; backward runs one recomputation at a time


class Findings:
    """What one forward of one recomputed layer found, in the order in which it asked."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._next: int | None = None  # None while they are written down

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """The context of the first forward."""
        with self._entered(None):
            yield

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """The context of the recomputation."""
        with self._entered(0):
            yield

    @contextlib.contextmanager
    def _entered(self, position: int | None) -> Iterator[None]:
        self._next = position
        _current.append(self)
        try:
            yield
        finally:
            _current.pop()

    def take(self, find: Callable[[], T]) -> tuple[T, bool]:
        """Returns what `find` gives, or gave in the first forward, and whether it did so then."""
        if self._next is None:
            self.values.append(find())
            return self.values[-1], False
        assert self._next < len(self.values), "a recomputation asks more than its forward did"
        self._next += 1
        return self.values[self._next - 1], True


def found_once(find: Callable[[], T]) -> tuple[T, bool]:
    """Returns `find()` and False; in a recomputation what its first forward found, and True."""
    return _current[-1].take(find) if _current else (find(), False)
