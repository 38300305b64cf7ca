"""How often something happens: `500steps`, `30min`, or off."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")


@dataclass(frozen=True)
class Interval:
    """Every so many steps, or every so many seconds; exactly one of them is given."""

    steps: int | None = None
    seconds: float | None = None

    def is_due(self, step: int, seconds_since: float) -> bool:
        """True after step `step` (counted from 1), `seconds_since` the last time."""
        if self.steps is not None:
            return step % self.steps == 0
        assert self.seconds is not None
        return seconds_since >= self.seconds


def parse_interval(text: str) -> Interval | None:
    """Returns the interval, None for `off` and 0; a bare number counts steps.

    Raises ValueError with the forms that are understood.
    """
    if text.strip().lower() == "off":
        return None
    match = _FORM.fullmatch(text.lower())
    unit = match[2] if match else None
    if match and unit in ("", "step", "steps") and "." not in match[1]:
        return Interval(steps=int(match[1])) if int(match[1]) else None
    if match and unit in _SECONDS:
        seconds = float(match[1]) * _SECONDS[unit]
        return Interval(seconds=seconds) if seconds else None
    raise ValueError(f"`{text}` is no interval: write `500steps`, `30min`, `2h`, `90s` or `off`")


def interval_text(value: object) -> object:
    """Turns a bare number into its text; anything else is left to be checked."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return f"{value}steps" if is_number else value


def checked_interval(text: str) -> str:
    """Returns `text` if it is an interval; raises ValueError as `parse_interval` does."""
    parse_interval(text)
    return text
