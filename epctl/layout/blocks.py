"""Which block of a matrix one scale covers: the one place where it is inferred."""

from __future__ import annotations

from collections.abc import Sequence

# 16 to 16,384: what quantisers use; the smallest that explains the grid is taken.
SIDES = tuple(1 << power for power in range(4, 15))


def scale_block(
    shape: Sequence[int], grid: Sequence[int], stated: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Returns the (rows, columns) that one scale covers, None when no block explains the grid.

    With two blocks or more along a dim one power of two fits at most; with one, any that covers it.

    Args:
        shape: the weight's last two dims.
        grid: the scales' last two dims; (1, 1) for one scale, (rows, 1) for one a row.
        stated: the block size that the config states; taken where it fits.
    """
    sides = []
    for dim in range(2):
        size, count = shape[dim], grid[dim]
        candidates = ((stated[dim],) if stated else SIDES) + (max(1, size), 1)
        side = next((c for c in candidates if c > 0 and -(-size // c) == count), None)
        if side is None:
            return None
        sides.append(side)
    return sides[0], sides[1]
