"""Runs probes on gloo ranks: `python -m epctl.launch.probe_ranks FOLDER HAZARD...`.

Rank 0 appends one JSON line a probe to `findings.jsonl`: `begin` before it runs, then what came of
it. A probe that kills or hangs the ranks thus leaves its name; `probe_run.py` goes on without it.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from epctl.runtime.leave import leave

COLLECTIVE_SECONDS = 20


def main(folder: Path, hazard_ids: list[str]) -> None:
    """Runs the named probes, one after another."""
    import torch.distributed as dist

    from epctl.launch.probe import load_probes
    from epctl.runtime import deepspeed_seams as seams

    warnings.simplefilter("ignore")
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=COLLECTIVE_SECONDS))
    probes = load_probes()
    gc.freeze()  # the collection after each probe then looks at its engines, not at torch
    for hazard_id in hazard_ids:
        write_finding(folder, {"begin": hazard_id})
        work = folder / hazard_id
        work.mkdir(exist_ok=True)
        write_finding(folder, {"id": hazard_id, **run_probe(probes[hazard_id], work)})
    dist.barrier()
    dist.destroy_process_group()


def run_probe(probe: Any, work: Path) -> dict[str, Any]:
    """Returns the finding of all ranks together: live if any rank says so. A collective."""
    import torch.distributed as dist

    started = time.perf_counter()
    mine = _run_here(probe, work)
    gc.collect()
    all_of_them: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(all_of_them, mine)
    order = ("failed", "not probed here", "live", "gone")
    worst = min(all_of_them, key=lambda finding: order.index(finding["verdict"]))
    seen = worst["seen"] or next((f["seen"] for f in all_of_them if f["seen"]), "")
    return worst | {"seen": seen, "seconds": round(time.perf_counter() - started, 2)}


def _run_here(probe: Any, work: Path) -> dict[str, Any]:
    from epctl.launch.probe import NotProbed

    try:
        finding = probe(work)
    except NotProbed as error:
        return {"verdict": "not probed here", "seen": str(error)}
    except Exception as error:
        return {"verdict": "failed", "seen": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"verdict": "live" if finding.live else "gone", "seen": finding.seen}


def write_finding(folder: Path, line: dict[str, Any]) -> None:
    """Appends a line from rank 0; other ranks say nothing."""
    if os.environ["RANK"] == "0":
        with (folder / "findings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
