"""Which tiles of a symmetric result one multiprocessor computes together (symmetric_hopper.cu).

A result of T panels of 128 rows has a tile for each pair of panels {i, j}, i = j included: edges of
a complete graph with a loop at each panel. Two edges that meet make a part: three panels are read
for two tiles. A connected graph of an even number of edges falls into such pairs, so at most one
tile of a matrix stays alone, where blocks of 128 x 256 compute a tenth too much at n = 1408.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Part(NamedTuple):
    """Tiles {s, o1} and {s, o2}; of the same o twice, one tile."""

    s: int
    o1: int
    o2: int

    def tiles(self) -> set[tuple[int, int]]:
        """Returns the tiles, each with its larger panel first."""
        return {(max(self.s, o), min(self.s, o)) for o in (self.o1, self.o2)}


def num_parts(num_panels: int) -> int:
    """Returns how many parts a matrix has."""
    return (num_panels * (num_panels + 1) // 2 + 1) // 2


@functools.cache
def parts_of(num_panels: int) -> tuple[Part, ...]:
    """Returns parts that cover every tile of a symmetric matrix once.

    Panels are left from the last on. Of those edges that lead to panels not yet left, and its loop,
    each pairs all it can, and leaves an odd one, that to the panel before, for that one to pair.
    """
    parts: list[Part] = []
    handed_on = False  # the edge to the panel after this one
    for panel in reversed(range(num_panels)):
        others = list(range(panel + 1)) + ([panel + 1] if handed_on else [])
        handed_on = len(others) % 2 == 1
        if handed_on:
            alone = max(panel - 1, 0)
            others.remove(alone)
            if panel == 0:
                parts.append(Part(0, alone, alone))
        parts += [Part(panel, *pair) for pair in zip(others[::2], others[1::2], strict=True)]
    return tuple(parts)
