"""One term of a rank's memory: how many bytes, by which formula, and while what is going on."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal


class Phase(enum.Flag):
    """Moments at which a rank's memory may peak; backward is looked at from both of its ends."""

    LOSS = enum.auto()
    FIRST_BACKWARD = enum.auto()
    LAST_BACKWARD = enum.auto()
    STEP = enum.auto()
    BACKWARD = FIRST_BACKWARD | LAST_BACKWARD
    MICRO_STEP = LOSS | FIRST_BACKWARD | LAST_BACKWARD
    ALWAYS = LOSS | FIRST_BACKWARD | LAST_BACKWARD | STEP


PHASES: Mapping[Phase, str] = {
    Phase.LOSS: "loss",
    Phase.FIRST_BACKWARD: "backward, last layer",
    Phase.LAST_BACKWARD: "backward, first layer",
    Phase.STEP: "optimizer step",
}
Group = Literal[
    "parameters",
    "gradients",
    "masters",
    "optimizer state",
    "engine buffers",
    "activations",
    "loss",
    "dispatch",
    "optimizer work",
    "reserve",
]
Place = Literal["device", "host"]


@dataclass(frozen=True, slots=True)
class Term:
    """A number of bytes with its formula; `values` are the numbers that stand in the formula.

    `on_peak` is false for what the allocator does not count: context and fragmentation.
    """

    name: str
    group: Group
    num_bytes: float
    formula: str
    phases: Phase = Phase.ALWAYS
    place: Place = "device"
    values: Mapping[str, float] = field(default_factory=dict)
    on_peak: bool = True

    def explanation(self) -> str:
        """Returns the formula followed by the numbers in it."""
        numbers = ", ".join(f"{name} = {_shown(value)}" for name, value in self.values.items())
        return f"{self.formula}; {numbers}" if numbers else self.formula


def _shown(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"


def total(terms: Iterable[Term], phase: Phase, place: Place = "device") -> float:
    """Returns the bytes of the terms alive in one phase."""
    bits = phase._value_  # of the plain numbers: `Flag.__and__` was a fifth of a sweep's time
    return sum(t.num_bytes for t in terms if t.phases._value_ & bits and t.place == place)


def total_of(terms: Iterable[Term], group: Group) -> float:
    """Returns the bytes of a group, wherever they lie and whenever they live."""
    return sum(t.num_bytes for t in terms if t.group == group)
