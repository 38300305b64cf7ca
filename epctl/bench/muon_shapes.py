"""The matrices that `epctl bench muon` orthogonalises: by hand, or what a rank of a model owns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epctl.errors import ConfigError

LARGEST_BATCH = 64  # matrices of one measured call; a rank's other ones take their share of it


@dataclass(frozen=True)
class MatrixBatch:
    """Matrices of one shape: how many are measured in a call, and how many a rank owns."""

    num_measured: int
    num_rows: int
    num_columns: int
    num_owned: float

    @property
    def label(self) -> str:
        return f"{self.num_measured}x{self.num_rows}x{self.num_columns}"

    def facts(self) -> dict[str, Any]:
        """Returns what identifies the batch in a result."""
        return {
            "batch": self.label,
            "num_measured": self.num_measured,
            "num_owned": round(self.num_owned, 3),
        }


def parse_shapes(texts: Sequence[str]) -> list[MatrixBatch]:
    """Reads `BATCHxROWSxCOLUMNS` texts. Raises ConfigError for another form or a zero."""
    batches = []
    for text in texts:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        numbers = [int(part) for part in match.groups()] if match else [0]
        if min(numbers) < 1:
            raise ConfigError(
                f"shape {text!r} is not BATCHxROWSxCOLUMNS with numbers from 1",
                hint="for example `--shape 64x1408x2048`",
            )
        batches.append(MatrixBatch(numbers[0], numbers[1], numbers[2], numbers[0]))
    return batches


def matrices_of_rank(reference: str, ep: int) -> list[MatrixBatch]:
    """Returns what one of `ep` ranks orthogonalises a step: its experts, its share of the rest.

    Raises ConfigError if `ep` does not divide the experts or the model has none.
    """
    from epctl.config import OptimSection
    from epctl.hub import resolve
    from epctl.launch.memory_shape import model_shape
    from epctl.layout.detect import detect

    source = resolve(reference)
    shape = model_shape(detect(source), source.config, OptimSection())
    if not shape.num_experts or shape.num_experts % ep:
        raise ConfigError(f"`{reference}` has {shape.num_experts} experts: ep {ep} cannot be")
    counts: dict[tuple[int, int], float] = {}
    for family in shape.families:
        if family.kind == "muon":
            rows, columns = family.shape[-2:]
            matrices = family.count * (family.shape[0] if len(family.shape) == 3 else 1)
            counts[rows, columns] = counts.get((rows, columns), 0) + matrices / ep
    return [
        MatrixBatch(min(LARGEST_BATCH, max(1, round(count))), rows, columns, count)
        for (rows, columns), count in sorted(counts.items(), key=lambda item: -item[1])
    ]
