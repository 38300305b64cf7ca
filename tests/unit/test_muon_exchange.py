"""Owners and exchange plans: pure arithmetic, checked for every rank of a group at once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epctl.runtime.muon_exchange import (
    Chunk,
    MatrixSlices,
    Piece,
    assign_owners,
    plan_exchange,
)
from epctl.runtime.muon_plan import matrix_ranges


def cut_matrices(shapes: list[tuple[int, int]], num_ranks: int) -> list[MatrixSlices]:
    """Matrices laid end to end and cut into equal partitions, as at ZeRO 1/2."""
    total = sum(rows * columns for rows, columns in shapes)
    length = -(-total // num_ranks)
    matrices, begin = [], 0
    for rows, columns in shapes:
        end, pieces = begin + rows * columns, []
        for rank in range(num_ranks):
            low, high = max(begin, rank * length), min(end, (rank + 1) * length)
            if low < high:
                pieces.append(Piece(rank, low - begin, high - low, low - rank * length))
        matrices.append(MatrixSlices(rows, columns, tuple(pieces)))
        begin = end
    return matrices


def spread_matrices(shapes: list[tuple[int, int]], num_ranks: int) -> list[MatrixSlices]:
    """Every matrix over all ranks, as at ZeRO-3."""
    matrices, offset = [], 0
    for rows, columns in shapes:
        share = -(-rows * columns // num_ranks)
        pieces = []
        for rank in range(num_ranks):
            size = min(share, rows * columns - rank * share)
            if size > 0:
                pieces.append(Piece(rank, rank * share, size, offset))
        matrices.append(MatrixSlices(rows, columns, tuple(pieces)))
        offset += share
    return matrices


def plans(matrices: list[MatrixSlices], num_ranks: int, chunk_elements: int) -> list[list[Chunk]]:
    return [
        plan_exchange(matrices, rank, num_ranks, chunk_elements=chunk_elements)
        for rank in range(num_ranks)
    ]


def num_sent(chunk: Chunk) -> int:
    return chunk.num_sent_slice_elements + chunk.num_sent_update_elements


MOONLIGHT_LAYER = [(2816, 2048)] * 2 + [(2048, 2816), (3072, 2048), (576, 2048), (4096, 512)]

shapes_strategy = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(shapes_strategy, st.integers(1, 5), st.integers(1, 80), st.booleans())
def test_both_ends_of_every_exchange_agree(
    shapes: list[tuple[int, int]], num_ranks: int, chunk_elements: int, spread: bool
) -> None:
    build = spread_matrices if spread else cut_matrices
    by_rank = plans(build(shapes, num_ranks), num_ranks, chunk_elements)
    assert len({len(chunks) for chunks in by_rank}) == 1
    for chunks in zip(*by_rank, strict=True):
        assert len({chunk.slices_travel for chunk in chunks}) == 1
        for source in range(num_ranks):
            for target in range(num_ranks):
                sent = chunks[source].slices_to[target]
                assert sent == [entry.piece for entry in chunks[target].slices_from[source]]
                sent_back = [(e.shape, e.piece) for e in chunks[target].updates_to[source]]
                assert sent_back == chunks[source].updates_from[target]


@settings(deadline=None, max_examples=60)
@given(shapes_strategy, st.integers(1, 5), st.integers(1, 80))
def test_every_matrix_has_one_owner_and_chunks_stay_bounded(
    shapes: list[tuple[int, int]], num_ranks: int, chunk_elements: int
) -> None:
    owned: Counter[tuple[int, int]] = Counter()
    for chunks in plans(spread_matrices(shapes, num_ranks), num_ranks, chunk_elements):
        for chunk in chunks:
            owned.update(chunk.num_owned)
            size = sum(rows * columns * n for (rows, columns), n in chunk.num_owned.items())
            alone = sum(chunk.num_owned.values()) == 1
            assert size <= chunk_elements or alone
    assert owned == Counter(shapes)


@settings(deadline=None, max_examples=60)
@given(shapes_strategy, st.integers(1, 5), st.integers(1, 80), st.booleans())
def test_every_element_is_updated_once_and_from_one_place(
    shapes: list[tuple[int, int]], num_ranks: int, chunk_elements: int, spread: bool
) -> None:
    """What a rank holds is in a run, in a piece at home, or comes back: no decay twice or never."""
    matrices = (spread_matrices if spread else cut_matrices)(shapes, num_ranks)
    for rank, chunks in enumerate(plans(matrices, num_ranks, chunk_elements)):
        updated: Counter[int] = Counter()
        for chunk in chunks:
            for run in chunk.runs:
                updated.update(range(run.offset, run.offset + run.num_elements))
            pieces = [entry.piece for entry in chunk.at_home]
            pieces += [entry.piece for entries in chunk.updates_from for entry in entries]
            for piece in pieces:
                updated.update(range(piece.offset, piece.offset + piece.num_elements))
            owned = sum(run.count for run in chunk.runs) + sum(map(len, chunk.assembled.values()))
            assert owned == sum(chunk.num_owned.values())
        held = [p for matrix in matrices for p in matrix.pieces if p.rank == rank]
        wanted = {at for p in held for at in range(p.offset, p.offset + p.num_elements)}
        assert updated == Counter(wanted)


def test_neighbours_of_one_shape_are_one_run() -> None:
    """An expert-parallel rank's stack of experts enters the iteration without a copy."""
    experts = [MatrixSlices(4, 6, (Piece(0, 0, 24, 24 * i),)) for i in range(5)]
    tall = [MatrixSlices(6, 4, (Piece(0, 0, 24, 120 + 24 * i),)) for i in range(3)]
    apart = [MatrixSlices(4, 6, (Piece(0, 0, 24, 300),))]
    (chunk,) = plan_exchange([*experts, *tall, *apart], 0, 1)
    assert [(run.shape, run.count, run.offset) for run in chunk.runs] == [
        ((4, 6), 5, 0),
        ((4, 6), 1, 300),
        ((6, 4), 3, 120),
    ]
    assert not chunk.assembled
    assert not chunk.at_home


def test_only_matrices_cut_by_a_partition_boundary_travel() -> None:
    shapes = [(4, 4)] * 7
    matrices = cut_matrices(shapes, 2)  # boundary inside the fourth
    cut = [i for i, matrix in enumerate(matrices) if len(matrix.holders) == 2]
    assert cut == [3]
    sent = [sum(num_sent(c) for c in chunks) for chunks in plans(matrices, 2, 10**6)]
    assert sum(sent) == 2 * 8  # the half that is away from the owner, there and back


def test_whole_matrices_need_no_exchange() -> None:
    """Expert parallelism over all ranks leaves each expert whole on its rank."""
    matrices = [MatrixSlices(4, 6, (Piece(0, 0, 24, 24 * i),)) for i in range(5)]
    (chunk,) = plan_exchange(matrices, 0, 1)
    assert not chunk.slices_travel
    assert not chunk.updates_travel


def test_replicated_matrices_send_updates_only() -> None:
    """ZeRO-0: every rank has the gradient, so only the update goes from the owner to the others."""
    matrices = [
        MatrixSlices(4, 6, tuple(Piece(rank, 0, 24, 0, i) for rank in range(3)), replicated=True)
        for i in range(6)
    ]
    by_rank = plans(matrices, 3, 10**6)
    assert [sum(c.num_owned.values()) for (c,) in by_rank] == [2, 2, 2]
    assert not any(chunk.slices_travel for (chunk,) in by_rank)
    assert [num_sent(chunk) for (chunk,) in by_rank] == [2 * 24 * 2] * 3


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_owners_are_balanced_by_cost(num_ranks: int) -> None:
    matrices = spread_matrices(MOONLIGHT_LAYER * 27, num_ranks)
    load = [0] * num_ranks
    assign_owners(matrices, num_ranks, load)
    assert sum(load) == sum(matrix.cost for matrix in matrices)
    assert max(load) - min(load) <= max(matrix.cost for matrix in matrices)
    assert max(load) < 1.02 * sum(load) / num_ranks


def test_load_is_carried_from_unit_to_unit() -> None:
    """Many small ZeRO-3 sub-groups of one matrix each must not all land on rank 0."""
    load, owners = [0, 0, 0], []
    for _ in range(9):
        owners += assign_owners(spread_matrices([(6, 6)], 3), 3, load)
    assert Counter(owners) == {0: 3, 1: 3, 2: 3}


def test_experts_are_split_between_replicas() -> None:
    """ZeRO-3 over two expert-data-parallel ranks: each owns half the experts, none travels."""
    pieces = [(Piece(i // 4, 0, 24, 24 * (i % 4)),) for i in range(8)]
    matrices = [MatrixSlices(4, 6, piece) for piece in pieces]
    by_rank = plans(matrices, 2, 10**6)
    assert [sum(c.num_owned.values()) for (c,) in by_rank] == [4, 4]
    assert [num_sent(c) for (c,) in by_rank] == [0, 0]


def test_a_matrix_with_a_hole_is_refused() -> None:
    with pytest.raises(AssertionError, match="8 of 16 elements"):
        MatrixSlices(4, 4, (Piece(0, 0, 8, 0),))


def test_matrix_ranges_of_stacks_and_blocks() -> None:
    assert list(matrix_ranges((6, 4), None)) == [(0, 6, 4)]
    assert list(matrix_ranges((2, 6, 4), None)) == [(0, 6, 4), (24, 6, 4)]
    assert list(matrix_ranges((2, 6, 4), (2, 4))) == [
        (0, 2, 4),
        (8, 4, 4),
        (24, 2, 4),
        (32, 4, 4),
    ]
    with pytest.raises(AssertionError, match="4-D parameter"):
        list(matrix_ranges((8, 3, 4, 4), None))
