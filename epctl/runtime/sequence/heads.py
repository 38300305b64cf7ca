"""Who attends what: heads over ranks, or all keys to every rank, by bytes moved. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from epctl.runtime.sequence.cuts import even_offsets

Method = Literal["heads", "keys"]


@dataclass(frozen=True)
class HeadPlacement:
    """Rank r attends the query heads `query[r]` and needs the key/value heads `kv[r]`.

    Head counts that the ranks do not divide are shared out unevenly; a key/value head that query
    heads of two ranks use goes to both.
    """

    query: tuple[range, ...]
    kv: tuple[range, ...]

    def kv_of_query(self, rank: int, num_heads: int, num_kv_heads: int) -> list[int] | None:
        """Returns the local kv head of each local query head; None if they pair one to one."""
        group = num_heads // num_kv_heads
        if num_heads == num_kv_heads:
            return None
        return [head // group - self.kv[rank].start for head in self.query[rank]]


@lru_cache(maxsize=64)
def place_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> HeadPlacement:
    """Returns contiguous shares of the query heads and the kv heads they use."""
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    group = num_heads // num_kv_heads
    offsets = even_offsets(num_heads, num_ranks)
    query = tuple(range(offsets[r], offsets[r + 1]) for r in range(num_ranks))
    kv = tuple(
        range(heads.start // group, (heads.stop - 1) // group + 1) if heads else range(0)
        for heads in query
    )
    return HeadPlacement(query, kv)


def halves(placement: HeadPlacement, num_heads: int, num_kv_heads: int) -> list[HeadPlacement]:
    """Returns two shares of every rank's heads, to attend one while the other travels.

    One share, the whole, if a rank has a single kv head: that would travel twice.
    """
    if min(map(len, placement.kv)) < 2:
        return [placement]
    group = num_heads // num_kv_heads
    middles = [kv.start + len(kv) // 2 for kv in placement.kv]
    ranks = list(zip(placement.query, placement.kv, middles, strict=True))
    first = HeadPlacement(
        tuple(range(query.start, middle * group) for query, _, middle in ranks),
        tuple(range(kv.start, middle) for _, kv, middle in ranks),
    )
    second = HeadPlacement(
        tuple(range(middle * group, query.stop) for query, _, middle in ranks),
        tuple(range(middle, kv.stop) for _, kv, middle in ranks),
    )
    return [first, second]


def elements_by_heads(
    placement: HeadPlacement, row_sizes: Sequence[int], dims: tuple[int, int, int]
) -> int:
    """Returns the elements that all ranks together send to others in one forward.

    Args:
        dims: query, key and value head sizes; the output has the value's.
    """
    query_dim, key_dim, value_dim = dims
    total = 0
    for rank, (query, kv) in enumerate(zip(placement.query, placement.kv, strict=True)):
        elsewhere = sum(row_sizes) - row_sizes[rank]
        total += elsewhere * (
            len(query) * (query_dim + value_dim) + len(kv) * (key_dim + value_dim)
        )
    return total


def elements_by_keys(
    num_kv_heads: int, row_sizes: Sequence[int], dims: tuple[int, int, int]
) -> int:
    """Returns the same for gathering every key and value on every rank."""
    _, key_dim, value_dim = dims
    return sum(row_sizes) * (len(row_sizes) - 1) * num_kv_heads * (key_dim + value_dim)


def sent_elements(
    placement: HeadPlacement | None,
    num_kv_heads: int,
    row_sizes: Sequence[int],
    dims: tuple[int, int, int],
) -> list[int]:
    """Returns what each rank sends to others in one forward; no placement gathers the keys."""
    query_dim, key_dim, value_dim = dims
    if placement is None:
        width = (len(row_sizes) - 1) * num_kv_heads * (key_dim + value_dim)
        return [rows * width for rows in row_sizes]
    there = [
        len(query) * query_dim + len(kv) * (key_dim + value_dim)
        for query, kv in zip(placement.query, placement.kv, strict=True)
    ]
    back = [len(query) * value_dim for query in placement.query]
    total = sum(row_sizes)
    return [
        rows * (sum(there) - there[rank]) + (total - rows) * back[rank]
        for rank, rows in enumerate(row_sizes)
    ]


def choose_method(
    num_heads: int,
    num_kv_heads: int,
    row_sizes: Sequence[int],
    dims: tuple[int, int, int],
    *,
    causal: bool = False,
) -> Method:
    """Returns `heads` (all-to-all, each rank some heads) or `keys` (all keys and values gathered).

    Heads that divide are exchanged: that balances any mask. Otherwise the ranks would differ by a
    head, and what moves fewer bytes wins; fewer heads than ranks would leave ranks idle. With
    gathered keys the last rank of a causal sequence has nearly twice the mean work, so there they
    must move less than half.
    """
    num_ranks = len(row_sizes)
    if num_heads % num_ranks == 0:
        return "heads"
    if num_heads < num_ranks:
        return "keys"
    placement = place_heads(num_heads, num_kv_heads, num_ranks)
    by_heads = elements_by_heads(placement, row_sizes, dims)
    by_keys = elements_by_keys(num_kv_heads, row_sizes, dims) * (2 if causal else 1)
    return "heads" if by_heads <= by_keys else "keys"
