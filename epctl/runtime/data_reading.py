"""Who reads which records, and how far: shares of lanes, read in rounds. No torch.

A source has lanes. Where they are as many as the ranks, each rank reads lanes of its own;
otherwise ranks share a lane and take turns in it. Record `i` of lane `l` has the number
`i * num_lanes + l`, and the order of documents is the order of numbers, so neither the data nor
its order depends on the number of ranks.

What is not needed whole is read in rounds, some records of every lane at a time. Rounds that are
complete on all ranks are a prefix of the order: a run that is continued reads on from there, and
finds before it what one long run would have found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from epctl.runtime.data_files import NumberedRecord, RecordSource

ROUND_RECORDS = 64  # of every lane


class LaneShare(NamedTuple):
    """A rank's records of a lane: those whose number in it is `offset` modulo `step`."""

    lane: int
    offset: int
    step: int


def lane_shares(num_lanes: int, rank: int, num_ranks: int) -> list[LaneShare]:
    """Returns what a rank reads; over all ranks that is every record, once."""
    if num_lanes >= num_ranks:
        return [LaneShare(lane, 0, 1) for lane in range(rank, num_lanes, num_ranks)]
    lane = rank % num_lanes
    return [LaneShare(lane, rank // num_lanes, len(range(lane, num_ranks, num_lanes)))]


class ShareReader:
    """One rank's records in rounds.

    Args:
        first: records of each lane that were read before, by whatever ranks.
    """

    def __init__(self, source: RecordSource, rank: int, num_ranks: int, first: int = 0) -> None:
        self.num_lanes = source.num_lanes
        self._cursors = [
            (share.lane, _Cursor(_share_from(source, share, first)))
            for share in lane_shares(self.num_lanes, rank, num_ranks)
        ]

    @property
    def exhausted(self) -> bool:
        """True when nothing is left of this rank's share."""
        return all(cursor.exhausted for _, cursor in self._cursors)

    def read(self, stop: int | None = None) -> Iterator[NumberedRecord]:
        """Yields what stands before record `stop` of each lane (None: all), with its number."""
        for lane, cursor in self._cursors:
            for index, record in cursor.until(stop):
                yield index * self.num_lanes + lane, record


def _share_from(source: RecordSource, share: LaneShare, first: int) -> Iterator[NumberedRecord]:
    start = first + (share.offset - first) % share.step
    return source.records(share.lane, start, share.step)


class _Cursor:
    """An iterator that can stop in front of a record."""

    def __init__(self, records: Iterator[NumberedRecord]) -> None:
        self._records = records
        self._held: NumberedRecord | None = None
        self.exhausted = False

    def until(self, stop: int | None) -> Iterator[NumberedRecord]:
        while not self.exhausted:
            item = self._held or next(self._records, None)
            self._held = None
            if item is None:
                self.exhausted = True
            elif stop is not None and item[0] >= stop:
                self._held = item
                return
            else:
                yield item


class Progress(NamedTuple):
    """How far a source was read: records of each lane, tokens they gave, nothing left."""

    records: int = 0
    tokens: int = 0
    exhausted: bool = False


def read_rounds(
    reader: ShareReader,
    before: Progress,
    wanted: int | None,
    add: Callable[[int, NumberedRecord], int],
    total: Callable[[int, bool], tuple[int, bool]],
) -> Progress:
    """Reads whole rounds until `wanted` tokens are there (None: all there is).

    Args:
        add: takes the number in the order and the record; returns the tokens it is good for.
        total: combines this rank's tokens and whether it is exhausted over all ranks.
    """
    records, tokens, exhausted = before
    while not exhausted and (wanted is None or tokens < wanted):
        stop = None if wanted is None else records + ROUND_RECORDS
        mine = sum(add(item[0], item) for item in reader.read(stop))
        gained, exhausted = total(mine, reader.exhausted)
        tokens += gained
        records += ROUND_RECORDS
    return Progress(records, tokens, exhausted)
