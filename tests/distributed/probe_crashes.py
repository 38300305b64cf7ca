"""Probe ranks that die or hang at certain hazards, for the tests of `probe_run`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from epctl.launch.probe_ranks import write_finding


def main(folder: Path, hazard_ids: list[str]) -> None:
    if "early" in hazard_ids:
        sys.exit(3)
    for hazard_id in hazard_ids:
        write_finding(folder, {"begin": hazard_id})
        if hazard_id == "dies" and os.environ["RANK"] == "1":
            wait_for_rank_0(folder / "findings.jsonl")
            sys.exit("a rank said this last")
        if hazard_id in ("dies", "hangs"):
            time.sleep(60)
        finding = {"verdict": "gone", "seen": "", "seconds": 0.0}
        write_finding(folder, {"id": hazard_id, **finding})


def wait_for_rank_0(findings: Path) -> None:
    """Returns once rank 0 is in `dies`, too, where real ranks are kept together by collectives."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if findings.exists() and '{"begin": "dies"}' in findings.read_text():
            return
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
