"""What a run will have on disk at once."""

from __future__ import annotations

import pytest

from epctl.config import RunSection
from epctl.runtime.disk_space import bytes_to_write


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (RunSection(), 10),
        (RunSection(save=False), 0),
        (RunSection(checkpoint_every=5, keep_checkpoints=2), 10 + 3 * (10 + 30)),
        (RunSection(save=False, checkpoint_every=5, keep_checkpoints=1), 2 * (10 + 30)),
    ],
)
def test_final_model_and_one_checkpoint_more_than_is_kept(run: RunSection, expected: int) -> None:
    assert bytes_to_write(run, model_bytes=10, state_bytes=30) == expected
