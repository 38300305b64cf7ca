"""Where a run stands besides its tensors: `state/run.json` of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from epctl.errors import InputError

PROGRESS_NAME = "run.json"


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done, sequences of the data drawn, and what the spike guard remembers.

    The schedule is a function of the step; DeepSpeed's counters follow from it.
    """

    step: int
    rows: int
    global_steps: int
    losses: list[float] = field(default_factory=list)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @classmethod
    def read(cls, state_folder: Path) -> Progress:
        """Reads `run.json`; raises InputError if it is missing or damaged."""
        path = state_folder / PROGRESS_NAME
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"`{path}` cannot be read: {error}") from None
