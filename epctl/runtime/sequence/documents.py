"""Which rows may see each other, as intervals: no mask of rows by rows is ever built.

Shape suffixes: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from epctl.errors import InputError

# Of each sequence of the batch, the (first, past the last) rows that attend among themselves.
Intervals = tuple[tuple[tuple[int, int], ...], ...]


def of_offsets(offsets: Sequence[int]) -> Intervals:
    """Returns the segments of one packed sequence."""
    return (tuple(pairwise(offsets)),)


def whole_rows(batch: int, length: int) -> Intervals:
    """Returns one document a sequence."""
    return (((0, length),),) * batch


def of_mask(mask_BS: Tensor) -> Intervals:
    """Returns the tokens that a padding mask keeps; padding left or right.

    Raises InputError for a mask with a hole: what lies around it would be two documents.
    """
    kept_BS = mask_BS != 0
    counts = kept_BS.sum(dim=1)
    firsts = kept_BS.int().argmax(dim=1)
    lasts = kept_BS.shape[1] - kept_BS.flip(1).int().argmax(dim=1)
    rows = torch.stack((counts, firsts, lasts), dim=1).tolist()
    for row, (count, first, last) in enumerate(rows):
        if count and last - first != count:
            raise InputError(
                f"the attention mask of sequence {row} keeps {count} of the {last - first} tokens "
                f"from {first} to {last}; sequence parallelism knows padding at the ends only",
                hint="pack documents and give position_ids that restart at each",
            )
    return tuple(((first, last),) if count else () for count, first, last in rows)


def of_positions(positions_BS: Tensor) -> Intervals:
    """Returns the documents of packed rows: one begins where positions do not go on by one."""
    length = positions_BS.shape[1]
    starts_BS = positions_BS.diff(dim=1) != 1
    found = starts_BS.nonzero().tolist()
    cuts: list[list[int]] = [[0] for _ in range(len(positions_BS))]
    for row, place in found:
        cuts[row].append(place + 1)
    return tuple(tuple(pairwise([*row, length])) for row in cuts)
