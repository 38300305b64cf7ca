"""Which rank needs which visual token: features go straight to the owner of their placeholder.

Shape suffixes: B sequences, S tokens, V visual tokens of the group in the order of their
placeholders, T those that this rank's tower made, L levels of features, D decoder hidden size.

Every rank knows every sequence's ids, so both ends of the exchange are computed, none is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epctl.errors import InputError
from epctl.runtime.sequence.group import SequenceGroup


def placeholders(config: Any, ids_BS: Tensor, modality: str) -> Tensor:
    """Returns where the tokens of images or videos stand, [B, S] bool.

    GLM-4V writes the frames of a video with the images' token.
    """
    found_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for key in (f"{modality}_token_id", "image_token_id"):
        token = getattr(config, key, None)
        if token is not None:
            found_BS = ids_BS == token
            if found_BS.any():
                break
    return found_BS


def owners(placed_BS: Tensor, offsets: Sequence[int]) -> Tensor:
    """Returns the rank of each placeholder, [V] int64 on the CPU, sequence by sequence."""
    ends = torch.tensor(offsets[1:-1], dtype=torch.int64)
    token_V = placed_BS.nonzero()[:, 1].cpu()
    return torch.bucketize(token_V, ends, right=True)


def check_counts(modality: str, num_tokens: int, num_placeholders: int) -> None:
    """Raises InputError if images and their placeholders do not go together."""
    if num_tokens != num_placeholders:
        raise InputError(
            f"the {modality}s of this batch make {num_tokens} visual tokens, its sequences have "
            f"{num_placeholders} placeholders for them"
        )


def to_owners(
    rows_TLD: Tensor, held: Sequence[Tensor], owners_V: Tensor, group: SequenceGroup
) -> Tensor:
    """Returns the features of this rank's own placeholders, [own of V, L, D], in their order.

    One uneven all-to-all: a row travels once, to the rank that needs it. Differentiable.

    Args:
        rows_TLD: this rank's features, as its tower made them.
        held: of every rank, which of the V visual tokens its rows are.
        owners_V: the rank of each visual token.
    """
    assert len(rows_TLD) == len(held[group.rank]), (len(rows_TLD), len(held[group.rank]))
    coming = [tokens[owners_V[tokens] == group.rank] for tokens in held]
    going_T = owners_V[held[group.rank]]
    rows_TLD = rows_TLD.index_select(0, going_T.argsort(stable=True).to(rows_TLD.device))
    if group.size > 1:
        sent = torch.bincount(going_T, minlength=group.size).tolist()
        rows_TLD = group.exchange(rows_TLD, sent, [len(tokens) for tokens in coming])
    return rows_TLD.index_select(0, torch.cat(coming).argsort().to(rows_TLD.device))


def ranges(sizes: Sequence[int]) -> list[Tensor]:
    """Returns consecutive numbers, as many for each rank as it has."""
    total = torch.arange(sum(sizes))
    return list(torch.split(total, list(sizes)))


def senders(
    wanted: Sequence[Tensor], place_offsets: Sequence[int], group_size: int
) -> list[Tensor]:
    """Returns which rank sends each wanted row: one of the place that holds it.

    A place is the `group_size` ranks that hold the same rows; a rank takes what its place holds
    from itself, and the ranks of a place share the sending to others.

    Args:
        wanted: of every rank, the rows that it needs; rows are numbered place after place.
        place_offsets: the first row of each place, and the number of rows.
    """
    ends = torch.tensor(place_offsets[1:-1], dtype=torch.int64)
    result = []
    for rank, rows in enumerate(wanted):
        place = torch.bucketize(rows, ends, right=True)
        sender = place * group_size + rank % group_size
        result.append(torch.where(place == rank // group_size, rank, sender))
    return result


def fetch_rows(
    rows: Tensor,
    wanted: Sequence[Tensor],
    place_offsets: Sequence[int],
    group_size: int,
    group: SequenceGroup,
) -> Tensor:
    """Returns the rows that this rank wants, in its order, from the places that hold them.

    Args:
        rows: what this rank's place holds, `place_offsets[place:place + 2]` of all rows.
    """
    rank, first = group.rank, place_offsets[group.rank // group_size]
    by_rank = senders(wanted, place_offsets, group_size)
    going = [w[s == rank] - first for w, s in zip(wanted, by_rank, strict=True)]
    order = by_rank[rank].argsort(stable=True)
    received = torch.bincount(by_rank[rank], minlength=group.size).tolist()
    chosen = rows.index_select(0, torch.cat(going).to(rows.device))
    arrived = group.exchange(chosen, [len(numbers) for numbers in going], received)
    return arrived.index_select(0, order.argsort().to(rows.device))
