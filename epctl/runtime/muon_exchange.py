"""Who orthogonalises which matrix, and how its slices get there and back.

ZeRO cuts Parameters into flat partitions. Each matrix (each expert's slice of a stacked Parameter)
gets one owner; slices travel to it by one all-to-all, updates travel back by another. The plan is
pure arithmetic over a layout that every rank of the group knows, so all ranks agree on it without
talking. Matrices go in chunks of bounded size: the workspace does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.kernels.newton_schulz_cost import choose_method, iteration_flops
from epctl.launch.memory_step import MUON_CHUNK_ELEMENTS


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

    def is_whole(self, piece: Piece) -> bool:
        return piece.num_elements == self.num_elements

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


class ReturnedPiece(NamedTuple):
    """A piece whose matrix, of `shape`, is owned elsewhere: its update comes back."""

    shape: tuple[int, int]
    piece: Piece


@dataclass
class Run:
    """Whole matrices of one shape that lie next to each other in a rank's own flat tensor."""

    shape: tuple[int, int]
    index: int
    count: int
    offset: int
    tensor: int

    @property
    def num_elements(self) -> int:
        return self.count * self.shape[0] * self.shape[1]

    def takes(self, index: int, piece: Piece) -> bool:
        """True if a whole matrix at `index` of the batch continues this run."""
        follows = index == self.index + self.count and piece.tensor == self.tensor
        return follows and piece.offset == self.offset + self.num_elements


@dataclass
class Chunk:
    """What one rank does in one exchange; lists are in the same order on both ends.

    An owned matrix is either whole at home, in a run, or assembled from slices, of which some may
    be at home as well.
    """

    num_ranks: int
    num_owned: dict[tuple[int, int], int] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    assembled: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    at_home: list[OwnedPiece] = field(default_factory=list)
    slices_to: list[list[Piece]] = field(init=False)
    slices_from: list[list[OwnedPiece]] = field(init=False)
    updates_to: list[list[OwnedPiece]] = field(init=False)
    updates_from: list[list[ReturnedPiece]] = field(init=False)
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
            whole = next((p for p in matrix.pieces if matrix.is_whole(p) and p.rank == rank), None)
            if whole:
                self._extend_runs(shape, index, whole)
            else:
                self.assembled.setdefault(shape, []).append(index)
        for piece in matrix.pieces:
            self._place(OwnedPiece(shape, index, piece), owner, rank, matrix)
        elsewhere = matrix.holders != {owner}
        self.updates_travel |= elsewhere
        self.slices_travel |= elsewhere and not matrix.replicated

    def _extend_runs(self, shape: tuple[int, int], index: int, piece: Piece) -> None:
        if self.runs and self.runs[-1].shape == shape and self.runs[-1].takes(index, piece):
            self.runs[-1].count += 1
        else:
            self.runs.append(Run(shape, index, 1, piece.offset, piece.tensor))

    def _place(self, owned: OwnedPiece, owner: int, rank: int, matrix: MatrixSlices) -> None:
        piece = owned.piece
        if piece.rank == owner == rank:
            if not matrix.is_whole(piece):
                self.at_home.append(owned)
        elif piece.rank == rank:
            self.updates_from[owner].append(ReturnedPiece(owned.shape, piece))
            if not matrix.replicated:
                self.slices_to[owner].append(piece)
        elif owner == rank:
            self.updates_to[piece.rank].append(owned)
            if not matrix.replicated:
                self.slices_from[piece.rank].append(owned)

    @property
    def num_sent_slice_elements(self) -> int:
        """Elements of slices this rank sends to owners."""
        return sum(piece.num_elements for pieces in self.slices_to for piece in pieces)

    @property
    def num_sent_update_elements(self) -> int:
        """Elements of updates this rank sends back as an owner."""
        return sum(o.piece.num_elements for owned in self.updates_to for o in owned)


def plan_exchange(
    matrices: Sequence[MatrixSlices],
    rank: int,
    num_ranks: int,
    *,
    load: list[int] | None = None,
    chunk_elements: int = MUON_CHUNK_ELEMENTS,
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


class Exchange:
    """One all-to-all under way: what is sent and received lives until it is waited for."""

    def __init__(
        self,
        sent: list[list[Tensor]],
        received_sizes: list[int],
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        parts = [part.to(device) for to_rank in sent for part in to_rank]
        self._outgoing = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        self._received = torch.empty(sum(received_sizes), dtype=dtype, device=device)
        self.num_sent_bytes = self._outgoing.nbytes
        sent_sizes = [sum(part.numel() for part in to_rank) for to_rank in sent]
        self._work = dist.all_to_all_single(
            self._received, self._outgoing, received_sizes, sent_sizes, group=group, async_op=True
        )

    def wait(self) -> Tensor:
        """Returns what came, in the order of ranks; on a GPU only the stream waits."""
        assert self._work is not None
        self._work.wait()
        del self._outgoing
        return self._received


class SlicesToOwners:
    """Slices of a chunk's matrices on their way to their owners.

    A collective where slices travel, issued here and waited for in `assemble`.

    Args:
        flats: this rank's directions, float32; may be on a CPU when `device` is not (offload).
        device: where matrices are orthogonalised.
    """

    def __init__(
        self,
        flats: Sequence[Tensor],
        chunk: Chunk,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._flats, self._chunk, self._device = flats, chunk, device
        self._exchange: Exchange | None = None
        if chunk.slices_travel:
            sent = [[piece_of(flats, piece) for piece in pieces] for pieces in chunk.slices_to]
            sizes = [_size(entries) for entries in chunk.slices_from]
            self._exchange = Exchange(sent, sizes, torch.float32, group, device)

    def assemble(self) -> Batches:
        """Returns the matrices that came in slices, float32 [B, M, N] a shape.

        Matrix b of a batch is number `chunk.assembled[shape][b]` of those owned.
        """
        chunk = self._chunk
        batches = {
            shape: torch.empty(len(indices), *shape, dtype=torch.float32, device=self._device)
            for shape, indices in chunk.assembled.items()
        }
        places = {
            (shape, index): place
            for shape, indices in chunk.assembled.items()
            for place, index in enumerate(indices)
        }

        def view(entry: OwnedPiece) -> Tensor:
            matrix = batches[entry.shape][places[entry.shape, entry.index]].view(-1)
            return matrix.narrow(0, entry.piece.start, entry.piece.num_elements)

        for entry in chunk.at_home:
            view(entry).copy_(piece_of(self._flats, entry.piece))
        if self._exchange is not None:
            entries = [entry for entries in chunk.slices_from for entry in entries]
            received = self._exchange.wait()
            for entry, part in zip(entries, _parts(received, entries), strict=True):
                view(entry).copy_(part)
        return batches


class UpdatesFromOwners:
    """Updates of a chunk's matrices on their way back, in the dtype they were computed in.

    A collective where updates travel, issued here and waited for in `received`.
    """

    def __init__(
        self,
        owned: Batches,
        chunk: Chunk,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._entries = [entry for entries in chunk.updates_from for entry in entries]
        self._exchange: Exchange | None = None
        if chunk.updates_travel:
            sent = [[part_of(owned, entry) for entry in entries] for entries in chunk.updates_to]
            sizes = [_size(entries) for entries in chunk.updates_from]
            self._exchange = Exchange(sent, sizes, dtype, group, device)

    def received(self) -> list[tuple[ReturnedPiece, Tensor]]:
        """Returns each piece of this rank whose matrix is owned elsewhere, with its update."""
        if self._exchange is None:
            return []
        parts = _parts(self._exchange.wait(), self._entries)
        return list(zip(self._entries, parts, strict=True))


def piece_of(flats: Sequence[Tensor], piece: Piece) -> Tensor:
    """Returns the elements of a piece in this rank's flat tensors."""
    return flats[piece.tensor].view(-1).narrow(0, piece.offset, piece.num_elements)


def run_of(flats: Sequence[Tensor], run: Run) -> Tensor:
    """Returns the elements of a run in this rank's flat tensors."""
    return flats[run.tensor].view(-1).narrow(0, run.offset, run.num_elements)


def part_of(owned: Batches, entry: OwnedPiece) -> Tensor:
    """Returns a piece of an owned matrix."""
    matrix = owned[entry.shape][entry.index].view(-1)
    return matrix.narrow(0, entry.piece.start, entry.piece.num_elements)


Entries = Sequence[OwnedPiece] | Sequence[ReturnedPiece]


def _size(entries: Entries) -> int:
    return sum(entry.piece.num_elements for entry in entries)


def _parts(received: Tensor, entries: Entries) -> tuple[Tensor, ...]:
    return torch.split(received, [entry.piece.num_elements for entry in entries])
