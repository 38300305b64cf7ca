"""Where a packed vision sequence is cut: coarse boundaries exchange less, fine ones balance. Pure.

A unit of cost is one attended pair of patch rows in one layer; the linear part of a layer counts
as `linear_cost` pairs a row, so that images of different sizes compare rightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Tiles of one image are brought together once; up to this much imbalance buys whole images.
BALANCED = 1.1
# What an exchange in every layer adds to a tower's work: on two H200 it added 10, 16 and 25 % of a
# balanced step to a video, 64 tiles and 16 images (benchmarks/multimodal_sp_h200x2_202611.md), and
# a tower is part of its step.
EXCHANGE_COST = 0.25
# Cuts that balance like this have next to nothing to gain from a finer boundary.
EVEN = 1.01


@dataclass(frozen=True)
class LayerKind:
    """Layers that attend within the same segments: `offsets` are cumulative patch rows."""

    num_layers: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """A kind of boundary, from 0 to the number of rows."""

    name: str
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Cuts:
    """Rank r holds the rows from `offsets[r]` to `offsets[r + 1]`.

    `costs` are the ranks' shares of the work, shared attention included.
    """

    level: str
    offsets: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.offsets))

    @property
    def imbalance(self) -> float:
        """The slowest rank over the mean; 1.0 is perfect."""
        mean = sum(self.costs) / len(self.costs)
        return max(self.costs) / mean if mean else 1.0


def choose_cuts(
    levels: Sequence[Level], layers: Sequence[LayerKind], linear_cost: float, num_ranks: int
) -> Cuts:
    """Returns the cuts on the one of `levels` (coarse to fine) that should take the least time.

    That is the slowest rank's work and, for the layers with a segment across a cut, the exchange.
    Layers none of whose segments straddles a cut attend locally; the attention of the others is
    shared evenly over the ranks. Of equals the coarsest is taken, and none finer than one that
    balances is looked at: it exchanges no less, and every forward waits for this choice.
    """
    assert levels, "no level"
    found: list[Cuts] = []
    for level in levels:
        found.append(cut_at(level, layers, linear_cost, num_ranks))
        if found[-1].imbalance <= EVEN:
            break
    return min(found, key=lambda cuts: _expected_time(cuts, layers))


def _expected_time(cuts: Cuts, layers: Sequence[LayerKind]) -> float:
    """Time over that of perfectly balanced ranks without an exchange."""
    num_layers = sum(kind.num_layers for kind in layers)
    exchanging = sum(k.num_layers for k in layers if not is_local(k.offsets, cuts.offsets))
    return cuts.imbalance * (1 + EXCHANGE_COST * exchanging / max(1, num_layers))


def cut_at(level: Level, layers: Sequence[LayerKind], linear_cost: float, num_ranks: int) -> Cuts:
    """Returns the best contiguous cuts on one kind of boundary."""
    allowed = set(level.offsets)
    local = [kind for kind in layers if allowed.issubset(kind.offsets)]
    prefix = _prefix_costs(level.offsets, layers, local, linear_cost)
    offsets = tuple(level.offsets[place] for place in _balanced_places(prefix, num_ranks))
    return Cuts(level.name, offsets, rank_costs(offsets, layers, linear_cost))


def rank_costs(
    offsets: Sequence[int], layers: Sequence[LayerKind], linear_cost: float
) -> tuple[float, ...]:
    """Returns every rank's work under `offsets`."""
    num_ranks = len(offsets) - 1
    shared = sum(
        kind.num_layers * sum(_squares(kind.offsets))
        for kind in layers
        if not is_local(kind.offsets, offsets)
    )
    local = [kind for kind in layers if is_local(kind.offsets, offsets)]
    prefix = _prefix_costs(offsets, layers, local, linear_cost)
    return tuple(after - before + shared / num_ranks for before, after in pairwise(prefix))


def is_local(segment_offsets: Sequence[int], cut_offsets: Sequence[int]) -> bool:
    """True if no segment lies on two ranks."""
    return set(cut_offsets).issubset(segment_offsets)


def even_offsets(num_rows: int, num_parts: int) -> tuple[int, ...]:
    """Returns cuts of `num_rows` into parts whose sizes differ by at most one."""
    size, extra = divmod(num_rows, num_parts)
    return tuple(part * size + min(part, extra) for part in range(num_parts + 1))


def _squares(offsets: Sequence[int]) -> list[int]:
    return [(stop - start) ** 2 for start, stop in pairwise(offsets)]


def _prefix_costs(
    offsets: Sequence[int],
    layers: Sequence[LayerKind],
    local: Sequence[LayerKind],
    linear_cost: float,
) -> list[float]:
    """Returns the work before each offset: linear parts, and attention that stays on one rank."""
    num_layers = sum(kind.num_layers for kind in layers)
    prefix = [row * linear_cost * num_layers for row in offsets]
    for kind in local:
        place, total = 0, 0.0
        segments = list(pairwise(kind.offsets))
        for index, offset in enumerate(offsets):
            while place < len(segments) and segments[place][1] <= offset:
                start, stop = segments[place]
                total += kind.num_layers * (stop - start) ** 2
                place += 1
            prefix[index] += total
    return prefix


def _balanced_places(prefix: Sequence[float], num_parts: int) -> list[int]:
    """Returns `num_parts + 1` indices into `prefix` with the least largest difference.

    Bisects the bound; for a bound the parts are filled greedily, which is optimal for intervals.
    """
    low = max([after - before for before, after in pairwise(prefix)], default=0.0)
    low = max(low, (prefix[-1] - prefix[0]) / num_parts)
    high = prefix[-1] - prefix[0]
    for _ in range(50):
        if high - low <= 1e-9 * max(high, 1.0):
            break
        middle = (low + high) / 2
        if _fill(prefix, middle, num_parts) is None:
            low = middle
        else:
            high = middle
    places = _fill(prefix, high, num_parts)
    assert places is not None
    return places


def _fill(prefix: Sequence[float], bound: float, num_parts: int) -> list[int] | None:
    """Returns the ends of at most `num_parts` parts within `bound`, or None if too few."""
    from bisect import bisect_right

    places, last = [0], len(prefix) - 1
    bound *= 1 + 1e-12
    for _ in range(num_parts):
        limit = prefix[places[-1]] + bound
        places.append(max(places[-1], bisect_right(prefix, limit) - 1))
    return places if places[-1] == last else None
