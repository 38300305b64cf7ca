"""What the host found out in a layer's first forward, known in its recomputation.

Reading a value of the device makes the host wait until the device gets there, and the device then
wait until the host has started more work. Backward computes a recomputed layer from the very
tensors of its forward, so what was read then need not be read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_current: list[Findings] = []  # innermost last; backward runs one recomputation at a time


class Findings:
    """What one forward of one recomputed layer found, in the order in which it did."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.place: int | None = None  # None while values are written down

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
    def _entered(self, place: int | None) -> Iterator[None]:
        self.place = place
        _current.append(self)
        try:
            yield
        finally:
            _current.pop()


def is_known() -> bool:
    """True in a recomputation: `recall` gives what its forward found."""
    return bool(_current) and _current[-1].place is not None


def note(value: Any) -> None:
    """Writes a finding down for the recomputation of the layer around it, if there will be one."""
    if _current:
        assert not is_known()
        _current[-1].values.append(value)


def recall() -> Any:
    """Returns the next finding of the forward whose recomputation this is."""
    findings = _current[-1]
    assert findings.place is not None
    assert findings.place < len(findings.values), "a recomputation asks more than its forward did"
    findings.place += 1
    return findings.values[findings.place - 1]
