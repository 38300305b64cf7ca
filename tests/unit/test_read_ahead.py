"""What is read ahead is what would have been read, in time, and an error comes at its own step."""

from __future__ import annotations

import threading

import pytest

from epctl.runtime.read_ahead import ReadAhead


def test_the_next_step_is_read_while_this_one_computes() -> None:
    begun = {step: threading.Event() for step in range(4)}
    readers = {}

    def draw(step: int) -> int:
        readers[step] = threading.current_thread().name
        begun[step].set()
        return step * 10

    ahead = ReadAhead(draw, last_step=2)
    for step in range(3):
        assert ahead.take(step) == step * 10
        # Nobody asked for it yet: the thread reads it by itself. After the last there is none.
        assert begun[step + 1].wait(60) if step < 2 else not begun[3].is_set()
    ahead.close()
    assert readers[0] == threading.current_thread().name
    assert all(readers[step].startswith("read-ahead") for step in (1, 2))


def test_another_step_than_the_next_is_read_anew() -> None:
    ahead = ReadAhead(lambda step: step, last_step=9)
    assert [ahead.take(step) for step in (4, 5, 2, 3, 9)] == [4, 5, 2, 3, 9]
    ahead.close()


def test_a_failure_to_read_is_raised_where_its_step_begins() -> None:
    def draw(step: int) -> int:
        if step == 1:
            raise ValueError("image of step 1")
        return step

    ahead = ReadAhead(draw, last_step=5)
    assert ahead.take(0) == 0
    with pytest.raises(ValueError, match="image of step 1"):
        ahead.take(1)
    ahead.close()
