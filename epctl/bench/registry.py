"""What `epctl bench` can measure: one entry a case, its module imported only when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Result = dict[str, Any]


class CaseModule(Protocol):
    """What a case's module defines; command.py does everything else."""

    def measure(self, **settings: Any) -> Result:
        """Gates, measures and returns the case's part of the document.

        `machine` (machine.py), `rows`, and what identifies the measurement: shape, sizes, rounds.
        A row has texts and whole numbers (its identity, for compare), floats and `Spread`s as
        dicts (its metrics), and `gate`, what its correctness gate measured. `absent`, where there
        is one, maps what could not take part to the reason.

        Raises GateError before any number exists if the gate of epctl's own code is red.
        """
        ...

    def table(self, result: Result) -> RenderableType:
        """Returns the rows for a terminal."""
        ...

    def draw(self, result: Result, figure: Figure) -> None:
        """Draws the rows."""
        ...


class Case(NamedTuple):
    """One benchmark: what it measures, in a line, and the module that does."""

    summary: str
    module: str

    def load(self) -> CaseModule:
        """Imports the case's module."""
        return cast("CaseModule", importlib.import_module(self.module))


CASES: Mapping[str, Case] = {
    "moe": Case(
        "one MoE block, its peers and the matmul floor; every gradient is checked first",
        "epctl.bench.moe_case",
    ),
    "muon": Case(
        "orthogonalisation of matrix batches or of a whole model's, its peers and the floor",
        "epctl.bench.muon",
    ),
    "train": Case(
        "whole training steps beside AutoEP and transformers; losses and weights checked first",
        "epctl.bench.train",
    ),
    "multimodal-sp": Case(
        "one vision-language sample over several ranks, five ways; every gradient is checked first",
        "epctl.bench.multimodal_sp",
    ),
    "convert": Case(
        "shard, merge and re-shard beside the disk's own copy rate, with peak memory",
        "epctl.bench.convert",
    ),
}
