"""What a probe is: a function of the installed engine's behaviour, not of its version string.

Probes run on two gloo ranks (`probe_ranks.py`), one after another in one process group. Each is
called on both ranks; the hazard is live if either says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NUM_RANKS = 2


@dataclass(frozen=True)
class Finding:
    """Whether the fault shows, and the numbers it was judged by."""

    live: bool
    seen: str


class NotProbed(Exception):
    """The probe cannot run here; the message says what it needs."""


# A probe gets a folder of its own, shared by the ranks.
Probe = Callable[[Path], Finding]
PROBES: dict[str, Probe] = {}


def probe_of(hazard_id: str) -> Callable[[Probe], Probe]:
    """Registers a function as the probe of the hazard `hazard_id`."""

    def register(function: Probe) -> Probe:
        assert hazard_id not in PROBES, f"two probes of {hazard_id}"
        PROBES[hazard_id] = function
        return function

    return register


def load_probes() -> dict[str, Probe]:
    """Imports every probe module (torch and DeepSpeed with them) and returns the registry."""
    from epctl.launch import (  # noqa: F401
        probe_autoep,
        probe_checkpoint,
        probe_local,
        probe_muon,
        probe_reduction,
    )

    return PROBES
