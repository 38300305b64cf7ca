"""Reads the next step's samples in a thread while this one computes: images come from the disk.

The order of samples is a function of the step alone, so what is read early is what would have been
read. A file that cannot be read raises where its step begins, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Drawn = TypeVar("Drawn")


class ReadAhead(Generic[Drawn]):
    """Gives what `draw(step)` returns, one step ahead; `draw` never runs twice at once."""

    def __init__(self, draw: Callable[[int], Drawn], last_step: int) -> None:
        self._draw = draw
        self._last_step = last_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._next: tuple[int, Future[Drawn]] | None = None

    def take(self, step: int) -> Drawn:
        """Returns the step's samples and begins to read those of the next.

        Raises what reading them raised.
        """
        found = self._waiting(step)
        if step < self._last_step:
            self._next = (step + 1, self._thread.submit(self._draw, step + 1))
        return found

    def _waiting(self, step: int) -> Drawn:
        read, self._next = self._next, None
        if read is None:
            return self._draw(step)
        number, future = read
        found = future.result()
        # Another step than the next is asked for: what was read is let go.
        return found if number == step else self._draw(step)

    def close(self) -> None:
        """Lets go of what was read ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)
