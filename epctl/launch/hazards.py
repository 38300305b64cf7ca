"""Known ways in which the engine trains wrong or fails, as data: `hazards.json`.

Each has a probe of the same id (`probe_*.py`), what epctl does about it, and the plans for which
epctl can do nothing. Pure: no torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["live", "gone", "not probed here", "failed"]


class Hazard(BaseModel):
    """One hazard: what happens, what epctl does, where upstream speaks of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    title: str
    consequence: str
    handling: Literal["avoided", "worked around", "refused", "unavoidable"]
    action: str
    upstream: tuple[str, ...]
    fixed_in: str | None
    # Plans that epctl cannot protect while the hazard is live: any of these, all keys of it.
    blocks: tuple[dict[str, tuple[Any, ...]], ...]

    def endangers(self, plan: Mapping[str, Any]) -> bool:
        """True if epctl cannot protect this plan while the hazard is live.

        Args:
            plan: settings by dotted key, and `plan.*` and `environment.*` facts.
        """
        return any(
            all(plan.get(key) in values for key, values in condition.items())
            for condition in self.blocks
        )


@functools.cache
def load_hazards() -> dict[str, Hazard]:
    """Returns every hazard by its id, in the order of the file."""
    text = resources.files("epctl.launch").joinpath("hazards.json").read_text("utf-8")
    hazards = [Hazard.model_validate(entry) for entry in json.loads(text)]
    return {hazard.id: hazard for hazard in hazards}


def advice(hazard: Hazard, verdict: str) -> str:
    """Returns what the verdict means for a run."""
    if verdict == "gone":
        retire = "; the workaround may be retired" if hazard.handling == "worked around" else ""
        return f"nothing to do with the installed versions{retire}"
    return f"{hazard.handling}: {hazard.action}"


def hazards_page() -> str:
    """Returns `docs/hazards.md`."""
    lines = [
        "# Hazards of the engine",
        "",
        "Generated from `epctl/launch/hazards.json` by `python -m epctl.launch.hazards`; do not",
        "edit. `epctl doctor` probes each one against the installed versions by running it, not by",
        "reading a version string. Numbers are issues or pull requests of DeepSpeed unless named.",
        "",
        "| hazard | what happens | what epctl does | upstream | fixed in DeepSpeed |",
        "|---|---|---|---|---|",
    ]
    for hazard in load_hazards().values():
        cells = (
            f"`{hazard.id}`: {hazard.title}",
            hazard.consequence,
            f"{hazard.handling}: {hazard.action}",
            ", ".join(hazard.upstream),
            hazard.fixed_in or "not in 0.19.8",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from pathlib import Path

    Path("docs/hazards.md").write_text(hazards_page(), encoding="utf-8")
