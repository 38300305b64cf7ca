"""Who orthogonalises which matrix, and how its slices get there and back.

ZeRO cuts Parameters into flat partitions. Each matrix (each expert's slice of a stacked Parameter)
gets one owner; slices travel to it by one all-to-all, updates travel back by another. The plan is
pure arithmetic over a layout that every rank of the group knows, so all ranks agree on it without
talking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements `[start, start + num_elements)` of a matrix, at `offset` of a rank's flat tensor."""

    rank: int
    start: int
    num_elements: int
    offset: int


@dataclass(frozen=True)
class MatrixSlices:
    """One matrix and the pieces of it that the ranks of a group hold."""

    num_rows: int
    num_columns: int
    pieces: tuple[Piece, ...]

    @property
    def cost(self) -> int:
        """Relative cost of orthogonalising: short * short * long side."""
        short, long = sorted((self.num_rows, self.num_columns))
        return short * short * long

    @property
    def holders(self) -> set[int]:
        return {piece.rank for piece in self.pieces}


def assign_owners(matrices: Sequence[MatrixSlices], num_ranks: int) -> list[int]:
    """Returns one owner a matrix: its holder if it has just one, else the least loaded rank.

    Cut matrices go largest first, ties to the rank that holds most of it, then the lower rank.
    """
    load = [0] * num_ranks
    owners = [-1] * len(matrices)
    for index, matrix in enumerate(matrices):
        if len(matrix.holders) == 1:
            owners[index] = next(iter(matrix.holders))
            load[owners[index]] += matrix.cost
    cut = [index for index, owner in enumerate(owners) if owner < 0]
    for index in sorted(cut, key=lambda i: (-matrices[i].cost, i)):
        held = [0] * num_ranks
        for piece in matrices[index].pieces:
            held[piece.rank] += piece.num_elements
        owners[index] = min(range(num_ranks), key=lambda rank: (load[rank], -held[rank], rank))
        load[owners[index]] += matrices[index].cost
    return owners


@dataclass
class ExchangePlan:
    """What rank `rank` sends, receives and owns; lists are in the same order on both ends."""

    rank: int
    num_ranks: int
    matrices: Sequence[MatrixSlices]
    owners: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.owners = assign_owners(self.matrices, self.num_ranks)
        self.owned = [index for index, owner in enumerate(self.owners) if owner == self.rank]
        self.outgoing: list[list[Piece]] = [[] for _ in range(self.num_ranks)]
        self.incoming: list[list[tuple[int, Piece]]] = [[] for _ in range(self.num_ranks)]
        self.at_home: list[tuple[int, Piece]] = []
        for index, (matrix, owner) in enumerate(zip(self.matrices, self.owners, strict=True)):
            for piece in matrix.pieces:
                self._place(index, owner, piece)

    def _place(self, index: int, owner: int, piece: Piece) -> None:
        if piece.rank == self.rank == owner:
            self.at_home.append((index, piece))
        elif piece.rank == self.rank:
            self.outgoing[owner].append(piece)
        elif owner == self.rank:
            self.incoming[piece.rank].append((index, piece))

    @property
    def travels(self) -> bool:
        """True if any rank sends anything, so that all of them enter the exchange."""
        pairs = zip(self.matrices, self.owners, strict=True)
        return any(matrix.holders != {owner} for matrix, owner in pairs)

    @property
    def num_sent_elements(self) -> int:
        """Elements this rank sends to owners in one step (as many come back)."""
        return sum(piece.num_elements for pieces in self.outgoing for piece in pieces)


def gather_to_owners(
    flat: Tensor, plan: ExchangePlan, group: dist.ProcessGroup | None
) -> dict[int, Tensor]:
    """Returns the matrices this rank owns, by index, whole; a collective if the plan travels."""
    owned = {
        index: flat.new_empty(plan.matrices[index].num_rows, plan.matrices[index].num_columns)
        for index in plan.owned
    }
    for index, piece in plan.at_home:
        _piece_of(owned[index], piece).copy_(flat[piece.offset : piece.offset + piece.num_elements])
    if plan.travels:
        sent = [flat[p.offset : p.offset + p.num_elements] for ps in plan.outgoing for p in ps]
        received = _exchange(sent, _sizes_out(plan), _sizes_in(plan), flat, group)
        position = 0
        for index, piece in (entry for entries in plan.incoming for entry in entries):
            chunk = received[position : position + piece.num_elements]
            _piece_of(owned[index], piece).copy_(chunk)
            position += piece.num_elements
    return owned


def scatter_from_owners(
    owned: dict[int, Tensor], flat: Tensor, plan: ExchangePlan, group: dist.ProcessGroup | None
) -> None:
    """Writes each owned matrix back into the flat tensors its pieces came from, in place."""
    for index, piece in plan.at_home:
        flat[piece.offset : piece.offset + piece.num_elements] = _piece_of(owned[index], piece)
    if not plan.travels:
        return
    sent = [_piece_of(owned[i], piece) for entries in plan.incoming for i, piece in entries]
    received = _exchange(sent, _sizes_in(plan), _sizes_out(plan), flat, group)
    position = 0
    for piece in (piece for pieces in plan.outgoing for piece in pieces):
        chunk = received[position : position + piece.num_elements]
        flat[piece.offset : piece.offset + piece.num_elements] = chunk
        position += piece.num_elements


def _piece_of(matrix: Tensor, piece: Piece) -> Tensor:
    return matrix.view(-1)[piece.start : piece.start + piece.num_elements]


def _sizes_out(plan: ExchangePlan) -> list[int]:
    return [sum(piece.num_elements for piece in pieces) for pieces in plan.outgoing]


def _sizes_in(plan: ExchangePlan) -> list[int]:
    return [sum(piece.num_elements for _, piece in entries) for entries in plan.incoming]


def _exchange(
    sent: list[Tensor],
    sent_sizes: list[int],
    received_sizes: list[int],
    like: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    received = like.new_empty(sum(received_sizes))
    outgoing = torch.cat(sent) if sent else like.new_empty(0)
    dist.all_to_all_single(received, outgoing, received_sizes, sent_sizes, group=group)
    return received
