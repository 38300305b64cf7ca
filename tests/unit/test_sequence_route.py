"""Where visual tokens and pixel rows go, counted and replayed without a process group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.route import fetch_rows, owners, placeholders, ranges, to_owners
from epctl.runtime.sequence.units import _as_samples, _divided, _overlaps


class Wire:
    """Plays an all-to-all of several ranks in one process: first all send, then all receive."""

    def __init__(self, size: int) -> None:
        self.sent: list[list[Tensor]] = [[] for _ in range(size)]
        self.size = size
        self.receiving = False

    def group(self, rank: int) -> Any:
        group = SequenceGroup(rank, self.size)

        def exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
            if not self.receiving:
                self.sent[rank] = list(torch.split(rows, sent))
                return rows.new_zeros(sum(received), *rows.shape[1:])
            arrived = [parts[rank] for parts in self.sent]
            assert [len(part) for part in arrived] == received
            return torch.cat(arrived)

        group.exchange = exchange  # type: ignore[method-assign]
        return group

    def play(self, run: Any) -> list[Tensor]:
        for rank in range(self.size):
            run(rank, self.group(rank))
        self.receiving = True
        return [run(rank, self.group(rank)) for rank in range(self.size)]


def test_each_feature_travels_once_to_the_rank_of_its_placeholder() -> None:
    """Windows have shuffled the features; sequences of two rows are cut in three."""
    ids_BS = torch.tensor([[9, 5, 5, 5, 1, 5], [5, 1, 1, 5, 5, 2]])
    placed = placeholders(SimpleNamespace(image_token_id=5), ids_BS, "image")
    owners_V = owners(placed, (0, 2, 4, 6))
    assert owners_V.tolist() == [0, 1, 1, 2, 0, 1, 2]
    shuffled = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    held = list(torch.split(shuffled, [3, 0, 4]))
    wire = Wire(3)
    found = wire.play(lambda rank, group: to_owners(held[rank][:, None], held, owners_V, group))
    assert [rows[:, 0].tolist() for rows in found] == [[0, 4], [1, 2, 5], [3, 6]]
    travelled = [len(part) for rank, parts in enumerate(wire.sent) for part in parts]
    assert sum(travelled) == 7  # every row once, not once a rank


def test_frames_are_found_under_the_token_of_images() -> None:
    config = SimpleNamespace(image_token_id=5, video_token_id=6)
    assert placeholders(config, torch.tensor([[5, 6, 5]]), "video").tolist() == [
        [False, True, False]
    ]
    assert placeholders(config, torch.tensor([[5, 1, 5]]), "video").tolist() == [
        [True, False, True]
    ]


def test_pixel_rows_come_from_the_place_that_holds_them_and_the_ranks_share_the_sending() -> None:
    """Two samples of two ranks each, 5 and 7 rows; shares of any size in any order."""
    rows = torch.arange(12)
    places = [rows[:5], rows[5:]]
    wanted = list(
        torch.split(rows[torch.tensor([4, 0, 11, 6, 5, 2, 1, 3, 10, 9, 8, 7])], [6, 0, 2, 4])
    )
    wire = Wire(4)
    found = wire.play(
        lambda rank, group: fetch_rows(places[rank // 2], wanted, (0, 5, 12), 2, group)
    )
    assert [f.tolist() for f in found] == [w.tolist() for w in wanted]
    from_others = {
        (source, target)
        for source, parts in enumerate(wire.sent)
        for target, part in enumerate(parts)
        if len(part) and source != target
    }
    assert from_others == {(2, 0), (0, 2)}  # rank 3 wants rows of its own place only


def test_an_undivided_image_is_never_alone_in_its_sample() -> None:
    """LLaVA-OneVision divides what is alone; the model would make tiles of a share's last image."""
    assert _divided([1, 3, 1], 5) == [True, False, False, False, True]
    assert _as_samples([True, False, False]) == ([0, 1, 2], [1, 2])
    assert _as_samples([False, True]) == ([1, 0, 0], [1, 2])
    assert _as_samples([True, True]) == ([0, 1], [1, 1])


@pytest.mark.parametrize(("own", "expected"), [((0, 4), [3, 1, 0]), ((4, 4), [0, 0, 0])])
def test_shares_of_tiles_overlap_the_units_of_others(
    own: tuple[int, int], expected: list[int]
) -> None:
    assert _overlaps(own, (0, 3, 5, 9)) == expected
    assert [len(part) for part in ranges([3, 2])] == [3, 2]
