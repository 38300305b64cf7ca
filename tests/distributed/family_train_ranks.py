"""Ranks of test_families_training.py: a few steps of families that differ in what they hold."""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_ranks import case_config, rank_batches

from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import save_model
from epctl.runtime.engine import create_engine, train_step
from epctl.runtime.leave import leave
from epctl.runtime.training_model import open_checkpoint

NUM_STEPS = 3


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = case_config(case, dist.get_world_size())
    mesh = seams.create_mesh(config.parallel.ep)
    ds_config = deepspeed_config(config, bfloat16=False, on_cpu=True)
    model = open_checkpoint(case["family"], folder.parent / "models" / case["family"], None)
    module = build_model(
        model.config,
        mesh,
        model.weights,
        dtype=torch.float32,
        device=torch.device("cpu"),
        zero3_config=ds_config if config.parallel.zero == 3 else None,
    )
    engine, _, scheduler = create_engine(module, config, ds_config)
    steps = [
        train_step(engine, scheduler, rank_batches(step, config), config, mesh)
        for step in range(NUM_STEPS)
    ]
    save_model(engine.module, mesh, folder / case["name"], lambda staging: None)
    engine.destroy()
    return {"losses": [loss for loss, _ in steps], "norms": [norm for _, norm in steps]}


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=60))
    results = {}
    for case in cases:
        results[case["name"]] = run_case(case, folder)
        gc.collect()
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
