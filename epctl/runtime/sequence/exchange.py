"""Rows to heads and back, and the variable-length gather; all differentiable.

Shape suffixes: B batch, H all query heads, J all key/value heads, P heads of this rank,
S all rows, R rows of this rank, D head size, T rows of any kind.

Both are one uneven all-to-all of flat elements: no padding, and q, k, v of different head sizes
(MLA) travel together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.heads import HeadPlacement


def gather_rows(rows_T: Tensor, sizes: Sequence[int], group: SequenceGroup) -> Tensor:
    """Returns the rows of every rank, [sum(sizes), ...], in rank order.

    Backward is the sum over ranks of what each did with this rank's rows (a reduce-scatter):
    every rank computes a share of one loss.

    Args:
        rows_T: this rank's `sizes[rank]` rows; the other dimensions agree.
    """
    assert len(rows_T) == sizes[group.rank], (rows_T.shape, sizes, group.rank)
    if group.size == 1:
        return rows_T
    copies = rows_T.repeat(group.size, *(1 for _ in rows_T.shape[1:]))
    return group.exchange(copies, [len(rows_T)] * group.size, list(sizes))


def start_rows_to_heads(
    q_BHRD: Tensor,
    k_BJRD: Tensor,
    v_BJRD: Tensor,
    sizes: Sequence[int],
    placement: HeadPlacement,
    group: SequenceGroup,
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Sends rows on their way; what it returns gives this rank's heads over all, [B, P, S, D]."""
    packed, sent = [], []
    for query, kv in zip(placement.query, placement.kv, strict=True):
        parts = [_heads(q_BHRD, query), _heads(k_BJRD, kv), _heads(v_BJRD, kv)]
        packed += [part.reshape(-1) for part in parts]
        sent.append(sum(part.numel() for part in parts))
    batch = q_BHRD.shape[0]
    num_query, num_kv = len(placement.query[group.rank]), len(placement.kv[group.rank])
    widths = [
        num_query * q_BHRD.shape[-1],
        num_kv * k_BJRD.shape[-1],
        num_kv * v_BJRD.shape[-1],
    ]
    received = [batch * size * sum(widths) for size in sizes]
    arrive = group.start(torch.cat(packed), sent, received)

    def finish() -> tuple[Tensor, Tensor, Tensor]:
        pieces: list[list[Tensor]] = [[], [], []]
        heads = (num_query, num_kv, num_kv)
        for size, chunk in zip(sizes, torch.split(arrive(), received), strict=True):
            parts_of_rank = torch.split(chunk, [batch * size * width for width in widths])
            for place, part in enumerate(parts_of_rank):
                head_size = widths[place] // max(1, heads[place])
                pieces[place].append(part.view(batch, heads[place], size, head_size))
        q, k, v = (torch.cat(piece, dim=2) for piece in pieces)
        return q, k, v

    return finish


def start_heads_to_rows(
    out_BPSD: Tensor, sizes: Sequence[int], placement: HeadPlacement, group: SequenceGroup
) -> Callable[[], list[Tensor]]:
    """Sends heads on the way back; what it returns gives this rank's rows, [B, P of r, R, D].

    A list of every rank r's heads, in the order of `placement`.
    """
    batch, _, _, head_size = out_BPSD.shape
    parts = [part.reshape(-1) for part in torch.split(out_BPSD, list(sizes), dim=2)]
    num_rows = sizes[group.rank]
    received = [batch * len(heads) * num_rows * head_size for heads in placement.query]
    arrive = group.start(torch.cat(parts), [part.numel() for part in parts], received)

    def finish() -> list[Tensor]:
        chunks = zip(placement.query, torch.split(arrive(), received), strict=True)
        return [chunk.view(batch, len(heads), num_rows, head_size) for heads, chunk in chunks]

    return finish


def gather_keys(
    k_BJRD: Tensor, v_BJRD: Tensor, sizes: Sequence[int], group: SequenceGroup
) -> tuple[Tensor, Tensor]:
    """Returns keys and values of all rows, all heads, [B, J, S, D]."""
    key_size, value_size = k_BJRD.shape[-1], v_BJRD.shape[-1]
    joined_RBJD = torch.cat((k_BJRD, v_BJRD), dim=-1).permute(2, 0, 1, 3)
    all_SBJD = gather_rows(joined_RBJD.contiguous(), sizes, group)
    key_SBJD, value_SBJD = torch.split(all_SBJD, [key_size, value_size], dim=-1)
    return key_SBJD.permute(1, 2, 0, 3), value_SBJD.permute(1, 2, 0, 3)


def _heads(x_BHRD: Tensor, heads: range) -> Tensor:
    return x_BHRD[:, heads.start : heads.stop]
