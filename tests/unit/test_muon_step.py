"""Stretches of matrices that are normalised together."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from epctl.runtime.muon_step import consecutive


@given(st.lists(st.integers(0, 6), max_size=8))
def test_stretches_hold_every_number_in_its_place(numbers: list[int]) -> None:
    stretches = list(consecutive(numbers))
    found = [(p + k, first + k) for p, first, count in stretches for k in range(count)]
    assert found == list(enumerate(numbers))
    for (_, first, count), (_, following, _) in itertools.pairwise(stretches):
        assert following != first + count  # none could be longer


def test_a_run_of_numbers_is_one_stretch() -> None:
    assert list(consecutive([4, 5, 6, 9])) == [(0, 4, 3), (3, 9, 1)]
    assert not list(consecutive([]))
