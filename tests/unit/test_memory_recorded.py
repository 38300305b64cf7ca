"""The memory model against every peak that a run of epctl recorded on a GPU."""

from __future__ import annotations

import pytest
from recorded_runs import Recorded, recorded_blocks, recorded_runs

RUNS, BLOCKS = list(recorded_runs()), list(recorded_blocks())


@pytest.mark.parametrize("found", [*RUNS, *BLOCKS], ids=lambda found: found.what)
def test_a_recorded_peak_is_predicted_within_a_tenth(found: Recorded) -> None:
    # State was counted, not sampled at a peak: there is nothing to be off by but rounding.
    allowed = 0.001 if found.what.startswith("state of") else 0.1
    assert abs(found.error) <= allowed, f"{found.predicted / 2**20:.0f} MiB predicted"


def test_all_gpu_notes_are_there() -> None:
    assert len(RUNS) == 14
    assert len(BLOCKS) >= 30
