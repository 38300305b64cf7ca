"""Tensor names, folded: `model.layers.3.mlp.experts.7.w1.weight` has the pattern
`model.layers.#.mlp.experts.#.w1.weight` and the indices (3, 7).

A checkpoint of a hundred thousand tensors has some fifty patterns; everything after this module
works on patterns, so detection costs one regular expression a name and nothing more.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

HOLE = "#"
# A whole component, or what follows `_` as in `expert_3`; leading zeros stay text, so that a
# name can always be rebuilt from its pattern and indices.
_INDEX = re.compile(r"(?<![A-Za-z0-9])(0|[1-9][0-9]{0,7})(?![A-Za-z0-9])")
_RANGES = re.compile(r"\{([0-9,\-]+)\}")


@dataclass(slots=True)
class NameGroup:
    """All names of one pattern; `indices[i]` belongs to `names[i]`."""

    pattern: str
    indices: list[tuple[int, ...]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns the pattern of `name` and its indices, left to right."""
    if HOLE in name:  # never seen in a real checkpoint; kept apart instead of confused
        return name.replace(HOLE, "\ufffd"), ()
    parts = _INDEX.split(name)
    return HOLE.join(parts[::2]), tuple(map(int, parts[1::2]))


def fill_pattern(pattern: str, indices: Sequence[int]) -> str:
    """Returns `pattern` with its holes filled from the left; surplus holes stay."""
    texts = pattern.split(HOLE)
    filled = [texts[0]]
    for position, text in enumerate(texts[1:]):
        filled.append(str(indices[position]) if position < len(indices) else HOLE)
        filled.append(text)
    return "".join(filled)


def group_names(names: Iterable[str]) -> dict[str, NameGroup]:
    """Returns the names grouped by pattern, in order of first appearance."""
    groups: dict[str, NameGroup] = {}
    for name in names:
        pattern, indices = split_name(name)
        group = groups.get(pattern)
        if group is None:
            group = groups[pattern] = NameGroup(pattern)
        group.indices.append(indices)
        group.names.append(name)
    return groups


def format_ranges(numbers: Iterable[int]) -> str:
    """Returns sorted numbers as ranges: `0-2,5`."""
    parts: list[str] = []
    ordered = sorted(set(numbers))
    for _, run in itertools.groupby(enumerate(ordered), lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ",".join(parts)


def format_gaps(present: Iterable[int], size: int) -> str:
    """Returns what is missing from 0 to `size` - 1 as ranges, `` for nothing.

    The work grows with `present` alone, however large a size a file claims.
    """
    parts: list[str] = []
    first = 0
    for number in [*sorted(n for n in set(present) if n < size), size]:
        if number > first:
            parts.append(str(first) if number == first + 1 else f"{first}-{number - 1}")
        first = number + 1
    return ",".join(parts)


def parse_ranges(text: str) -> list[int]:
    """Returns the numbers of `0-2,5`. Raises ValueError for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def fold_indices(pattern: str, indices: Sequence[tuple[int, ...]]) -> list[str]:
    """Returns folded names such as `layers.{1-26}.mlp.experts.{0-63}.w1.weight`.

    One text when the indices are a full product of ranges, else one for each first index.
    """
    if not pattern.count(HOLE):
        return [pattern]
    columns = [sorted(set(column)) for column in zip(*indices, strict=True)]
    size = 1
    for column in columns:
        size *= len(column)
    if size == len(indices):
        return [_fill_ranges(pattern, [format_ranges(column) for column in columns])]
    return _fold_ragged(pattern, indices, columns[0])


def _fold_ragged(
    pattern: str, indices: Sequence[tuple[int, ...]], firsts: Sequence[int]
) -> list[str]:
    """Groups first indices whose remaining index sets are equal, then folds each group."""
    by_rest: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in firsts:
        rest = frozenset(index[1:] for index in indices if index[0] == first)
        by_rest.setdefault(rest, []).append(first)
    head, _, tail = pattern.partition(HOLE)
    folded: list[str] = []
    for rest, group in by_rest.items():
        for text in fold_indices(tail, sorted(rest)):
            folded.append(f"{head}{{{format_ranges(group)}}}{text}")
    return folded


def _fill_ranges(pattern: str, ranges: Sequence[str]) -> str:
    texts = pattern.split(HOLE)
    return texts[0] + "".join(
        f"{{{numbers}}}{text}" for numbers, text in zip(ranges, texts[1:], strict=True)
    )


def unfold_name(folded: str) -> Iterator[str]:
    """Yields every name that a folded text stands for."""
    parts = _RANGES.split(folded)
    choices = [parse_ranges(text) for text in parts[1::2]]
    for values in itertools.product(*choices):
        texts = [parts[0]]
        for value, text in zip(values, parts[2::2], strict=True):
            texts.append(f"{value}{text}")
        yield "".join(texts)


def fold_table(table: Iterable[tuple[str, Hashable]]) -> list[tuple[str, Hashable]]:
    """Returns (folded name, value) pairs; names of one pattern and equal value share a text."""
    grouped: dict[tuple[str, Hashable], list[tuple[int, ...]]] = {}
    for name, value in table:
        pattern, indices = split_name(name)
        grouped.setdefault((pattern, value), []).append(indices)
    return [
        (text, value)
        for (pattern, value), indices in grouped.items()
        for text in fold_indices(pattern, indices)
    ]
