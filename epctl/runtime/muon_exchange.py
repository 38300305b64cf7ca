"""Who orthogonalises which matrix, and how its slices get there and back.

ZeRO cuts Parameters into flat partitions. Each matrix (each expert's slice of a stacked Parameter)
gets one owner; slices travel to it by one all-to-all, updates travel back by another. The plan is
pure arithmetic over a layout that every rank of the group knows, so all ranks agree on it without
talking. Matrices go in chunks of bounded size: the workspace does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.kernels.newton_schulz_cost import choose_method, iteration_flops

# Elements a rank orthogonalises at once unless one matrix is larger: 128 MiB in float32, and a
# small multiple of that in the iteration.
DEFAULT_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Piece:
    """Elements `[start, start + num_elements)` of a matrix, at `offset` of a rank's flat tensor.

    `tensor` says which, where the rank's part of the unit is more than one flat tensor.
    """

    rank: int
    start: int
    num_elements: int
    offset: int
    tensor: int = 0


@dataclass(frozen=True)
class MatrixSlices:
    """One matrix and the pieces of it that the ranks of a group hold.

    A replicated matrix has one whole piece a rank: nothing travels to the owner, its update
    travels to every other rank.
    """

    num_rows: int
    num_columns: int
    pieces: tuple[Piece, ...]
    replicated: bool = False

    def __post_init__(self) -> None:
        held = sum(piece.num_elements for piece in self.pieces)
        wanted = self.num_elements * (len(self.pieces) if self.replicated else 1)
        assert held == wanted, f"{held} of {wanted} elements of a matrix are on some rank"

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.num_columns

    @property
    def cost(self) -> int:
        """FLOPs of orthogonalising it by the cheaper iteration."""
        shape = self.num_rows, self.num_columns
        flops: int = iteration_flops(choose_method(*shape).method, *shape)
        return flops

    @property
    def holders(self) -> set[int]:
        return {piece.rank for piece in self.pieces}


def assign_owners(
    matrices: Sequence[MatrixSlices], num_ranks: int, load: list[int] | None = None
) -> list[int]:
    """Returns one owner a matrix: its holder if it has just one, else the least loaded rank.

    Matrices of several holders go largest first, ties to the rank that holds most of it, then the
    lower rank. `load` is the cost each rank already has, and is brought up to date.
    """
    load = [0] * num_ranks if load is None else load
    owners = [-1] * len(matrices)
    for index, matrix in enumerate(matrices):
        if len(matrix.holders) == 1:
            owners[index] = next(iter(matrix.holders))
            load[owners[index]] += matrix.cost
    shared = [index for index, owner in enumerate(owners) if owner < 0]
    for index in sorted(shared, key=lambda i: (-matrices[i].cost, i)):
        held = [0] * num_ranks
        for piece in matrices[index].pieces:
            held[piece.rank] += piece.num_elements
        owners[index] = min(range(num_ranks), key=lambda rank: (load[rank], -held[rank], rank))
        load[owners[index]] += matrices[index].cost
    return owners


@dataclass(frozen=True)
class OwnedPiece:
    """A piece of a matrix owned here: row `index` of the batch of its shape."""

    shape: tuple[int, int]
    index: int
    piece: Piece


@dataclass
class Chunk:
    """What one rank does in one exchange; lists are in the same order on both ends."""

    num_ranks: int
    num_owned: dict[tuple[int, int], int] = field(default_factory=dict)
    at_home: list[OwnedPiece] = field(default_factory=list)
    slices_to: list[list[Piece]] = field(init=False)
    slices_from: list[list[OwnedPiece]] = field(init=False)
    updates_to: list[list[OwnedPiece]] = field(init=False)
    updates_from: list[list[Piece]] = field(init=False)
    slices_travel: bool = False
    updates_travel: bool = False

    def __post_init__(self) -> None:
        self.slices_to = [[] for _ in range(self.num_ranks)]
        self.slices_from = [[] for _ in range(self.num_ranks)]
        self.updates_to = [[] for _ in range(self.num_ranks)]
        self.updates_from = [[] for _ in range(self.num_ranks)]

    def add(self, matrix: MatrixSlices, owner: int, rank: int) -> None:
        """Adds a matrix: rank `rank` owns it, holds pieces of it, or only knows of it."""
        shape = (matrix.num_rows, matrix.num_columns)
        index = self.num_owned.get(shape, 0)
        if owner == rank:
            self.num_owned[shape] = index + 1
        for piece in matrix.pieces:
            self._place(OwnedPiece(shape, index, piece), owner, rank, matrix.replicated)
        elsewhere = matrix.holders != {owner}
        self.updates_travel |= elsewhere
        self.slices_travel |= elsewhere and not matrix.replicated

    def _place(self, owned: OwnedPiece, owner: int, rank: int, replicated: bool) -> None:
        piece = owned.piece
        if piece.rank == owner == rank:
            self.at_home.append(owned)
        elif piece.rank == rank:
            self.updates_from[owner].append(piece)
            if not replicated:
                self.slices_to[owner].append(piece)
        elif owner == rank:
            self.updates_to[piece.rank].append(owned)
            if not replicated:
                self.slices_from[piece.rank].append(owned)

    @property
    def num_sent_elements(self) -> int:
        """Elements this rank sends in both directions."""
        slices = sum(piece.num_elements for pieces in self.slices_to for piece in pieces)
        return slices + sum(o.piece.num_elements for owned in self.updates_to for o in owned)


def plan_exchange(
    matrices: Sequence[MatrixSlices],
    rank: int,
    num_ranks: int,
    *,
    load: list[int] | None = None,
    chunk_elements: int = DEFAULT_CHUNK_ELEMENTS,
) -> list[Chunk]:
    """Returns this rank's exchanges, in the order every rank of the group enters them.

    Equal shapes stand together so that they orthogonalise in one batch; a chunk ends before any
    rank would own more than `chunk_elements` in it.
    """
    owners = assign_owners(matrices, num_ranks, load)
    order = sorted(
        range(len(matrices)),
        key=lambda i: (-matrices[i].cost, matrices[i].num_rows, matrices[i].num_columns, i),
    )
    chunks: list[Chunk] = []
    held = [0] * num_ranks
    for i in order:
        owner = owners[i]
        if not chunks or (held[owner] and held[owner] + matrices[i].num_elements > chunk_elements):
            chunks.append(Chunk(num_ranks))
            held = [0] * num_ranks
        chunks[-1].add(matrices[i], owner, rank)
        held[owner] += matrices[i].num_elements
    return chunks


Batches = dict[tuple[int, int], Tensor]


def gather_to_owners(
    flats: Sequence[Tensor],
    chunk: Chunk,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Batches:
    """Returns the matrices this rank owns, one batch [B, M, N] a shape, on `device`.

    A collective where slices travel. Flat tensors may be elsewhere (optimizer state offloaded).
    """
    owned = {
        shape: torch.empty(count, *shape, dtype=torch.float32, device=device)
        for shape, count in chunk.num_owned.items()
    }
    for entry in chunk.at_home:
        _owned_view(owned, entry).copy_(_flat_view(flats, entry.piece))
    if chunk.slices_travel:
        sent = [[_flat_view(flats, piece) for piece in pieces] for pieces in chunk.slices_to]
        received = _exchange(sent, [_size(entries) for entries in chunk.slices_from], group, device)
        entries = [entry for entries in chunk.slices_from for entry in entries]
        parts = _parts(received, [entry.piece for entry in entries])
        for entry, part in zip(entries, parts, strict=True):
            _owned_view(owned, entry).copy_(part)
    return owned


def scatter_from_owners(
    owned: Batches,
    flats: Sequence[Tensor],
    chunk: Chunk,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Writes each matrix into the flat tensors its pieces came from, in place.

    A collective where updates travel.
    """
    for entry in chunk.at_home:
        _flat_view(flats, entry.piece).copy_(_owned_view(owned, entry))
    if chunk.updates_travel:
        sent = [[_owned_view(owned, entry) for entry in entries] for entries in chunk.updates_to]
        sizes = [sum(piece.num_elements for piece in pieces) for pieces in chunk.updates_from]
        received = _exchange(sent, sizes, group, device)
        pieces = [piece for pieces in chunk.updates_from for piece in pieces]
        for piece, part in zip(pieces, _parts(received, pieces), strict=True):
            _flat_view(flats, piece).copy_(part)


def _flat_view(flats: Sequence[Tensor], piece: Piece) -> Tensor:
    return flats[piece.tensor].narrow(0, piece.offset, piece.num_elements)


def _owned_view(owned: Batches, entry: OwnedPiece) -> Tensor:
    matrix = owned[entry.shape][entry.index].view(-1)
    return matrix.narrow(0, entry.piece.start, entry.piece.num_elements)


def _size(entries: Sequence[OwnedPiece]) -> int:
    return sum(entry.piece.num_elements for entry in entries)


def _parts(received: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, ...]:
    return torch.split(received, [piece.num_elements for piece in pieces])


def _exchange(
    sent: list[list[Tensor]],
    received_sizes: list[int],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    parts = [part.to(device) for to_rank in sent for part in to_rank]
    outgoing = torch.cat(parts) if parts else torch.empty(0, device=device)
    received = torch.empty(sum(received_sizes), dtype=torch.float32, device=device)
    sent_sizes = [sum(part.numel() for part in to_rank) for to_rank in sent]
    dist.all_to_all_single(received, outgoing, received_sizes, sent_sizes, group=group)
    return received
