"""Checkpoints written at one layout and gone on from at another, all in one process tree.

`python -m topology_ranks FOLDER PHASES_JSON`: a phase is a number of ranks and its cases, forked
after the heavy imports. A case trains two steps from the model and saves (`save`), or goes on from
another case's checkpoint and saves that at once (`load`); both then take three steps. Rank 0 writes
`CASE.json` with the losses.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import train_model_ranks

from epctl.launch.ports import free_port
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.evaluate import held_out_loss
from epctl.runtime.leave import leave

GLOBAL_BATCH = 4
NUM_HELD_OUT = GLOBAL_BATCH
FIRST_STEPS = 2
NEXT_STEPS = 3


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    size = case.get("batch", GLOBAL_BATCH) // dist.get_world_size()
    flags = {"train.micro_batch_size": size}
    config = train_model_ranks.case_config(
        {**case, "steps": FIRST_STEPS + NEXT_STEPS, "flags": flags}
    )
    source = folder / case["from"] / "checkpoints" / "step-0000002" if "from" in case else None
    weights = source / "model" if source is not None else None
    run = train_model_ranks._Run(case, config, folder / case["name"], weights_from=weights)
    first_losses = []
    if source is not None:
        run.go_on_from(source)
    else:
        first_losses = [run.loop._train_step(step)[0] for step in range(FIRST_STEPS)]
        run.loop.step = FIRST_STEPS
    run.checkpointer.save(run.loop.progress())
    run.checkpointer.finish()
    held_out = held_out_loss(run.engine, [run.data.held_out_batch(dist.get_rank() * size, size)])
    steps = range(FIRST_STEPS, FIRST_STEPS + NEXT_STEPS)
    losses = [run.loop._train_step(step)[0] for step in steps]
    run.engine.destroy()
    gc.collect()
    return {"first": first_losses, "held_out": held_out, "losses": losses}


def be_a_rank(phase: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(phase["num_ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=200))
    for case in phase["cases"]:
        result = run_case(case, folder)
        if rank == 0:
            (folder / f"{case['name']}.json").write_text(json.dumps(result))
    dist.barrier()
    leave(0)


def run_phase(phase: dict[str, Any], folder: Path) -> None:
    port = free_port()
    children = []
    for rank in range(phase["num_ranks"]):
        pid = os.fork()
        if pid == 0:
            try:
                be_a_rank(phase, rank, port, folder)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert not any(codes), f"{phase['num_ranks']} ranks ended with {codes}"


if __name__ == "__main__":
    for wanted in json.loads(sys.argv[2]):
        run_phase(wanted, Path(sys.argv[1]))
