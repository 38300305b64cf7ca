"""What a run will have on disk at once."""

from __future__ import annotations

from typing import Any

import pytest

from epctl.config import RunConfig, resolve_config
from epctl.runtime.disk_space import bytes_to_write


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 10),
        ({"run.save": False}, 0),
        ({"checkpoint.every": "5steps", "checkpoint.keep": 2}, 10 + 3 * (10 + 30)),
        ({"run.save": False, "checkpoint.every": "30min", "checkpoint.keep": 3}, 4 * (10 + 30)),
    ],
)
def test_final_model_and_one_checkpoint_more_than_is_kept(
    settings: dict[str, Any], expected: int
) -> None:
    config: RunConfig = resolve_config(flags=settings).config
    assert bytes_to_write(config, model_bytes=10, state_bytes=30) == expected
