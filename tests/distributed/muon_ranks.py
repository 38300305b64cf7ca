"""Ranks of the Muon tests: many cases in one process group, weights before and after kept.

Called as `python -m muon_ranks FOLDER CASES_JSON`. Rank K writes `rank-K.json` with losses, norms
and exchange figures of every case; weights of case C stand in `FOLDER/C`.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import parity_ranks
import torch
import torch.distributed as dist

from epctl.config import RunConfig
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import save_model
from epctl.runtime.engine import create_engine, train_step
from epctl.runtime.moe import Router
from epctl.runtime.weights import RandomWeights

NUM_STEPS = 4
GLOBAL_BATCH = 16
STARVED_EXPERT = 3
STARVED_STEPS = 3
INITIAL = "initial"


def case_config(case: dict[str, Any]) -> RunConfig:
    accumulation = case.get("accumulation", 1)
    share = GLOBAL_BATCH // dist.get_world_size() // accumulation
    flags = {"train.micro_batch_size": share, **case.get("flags", {})}
    return parity_ranks.case_config({**case, "flags": flags}, dist.get_world_size())


def rank_batches(step: int, config: RunConfig) -> list[torch.Tensor]:
    """This rank's micro-batches; together all ranks and micro-steps see the same global batch."""
    generator = torch.Generator().manual_seed(100 + step)
    batch = torch.randint(0, 64, (GLOBAL_BATCH, 16), generator=generator)
    share = batch.chunk(dist.get_world_size())[dist.get_rank()]
    return list(share.chunk(config.train.gradient_accumulation_steps))


class Run:
    """A model, its engine and what a step needs, built for one case."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.config = config = case_config(case)
        self.mesh = seams.create_mesh(config.parallel.ep)
        bfloat16 = case.get("bfloat16", False)
        ds_config = deepspeed_config(config, bfloat16=bfloat16, on_cpu=True)
        ds_config["zero_optimization"] |= case.get("zero_options", {})
        swap = config.moe.implementation == "epctl"
        self.model = build_model(
            parity_ranks.tiny_config(**case.get("model", {})),
            self.mesh,
            RandomWeights(seed=1, std=0.08),
            dtype=torch.bfloat16 if bfloat16 else torch.float32,
            device=torch.device("cpu"),
            zero3_config=ds_config if config.parallel.zero == 3 and swap else None,
            swap=swap,
        )
        self.engine, self.optimizer, self.scheduler = create_engine(self.model, config, ds_config)

    def step(self, step: int) -> tuple[float, float]:
        if self.case.get("starved"):
            self._starve(step < STARVED_STEPS)
        batches = rank_batches(step, self.config)
        result = train_step(self.engine, self.scheduler, batches, self.config, self.mesh)
        if self.case.get("starved"):
            self._check_starved(step < STARVED_STEPS)
        return result

    def _routers(self) -> list[Router]:
        return [m for m in self.engine.module.modules() if isinstance(m, Router)]

    def _starve(self, starved: bool) -> None:
        for router in self._routers():
            router.e_score_correction_bias[STARVED_EXPERT] = -1e9 if starved else 0.0

    def _check_starved(self, starved: bool) -> None:
        if starved:
            assert all(int(r.tokens_per_expert[STARVED_EXPERT]) == 0 for r in self._routers())

    def save(self, folder: Path) -> None:
        save_model(self.engine.module, self.mesh, folder, lambda staging: None)

    def close(self) -> None:
        self.engine.destroy()
        gc.collect()


def train_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    run = Run(case)
    if case.get("keep_initial"):
        run.save(folder / INITIAL)
    losses, norms = zip(*(run.step(step) for step in range(NUM_STEPS)), strict=True)
    run.save(folder / case["name"])
    result = {"losses": losses, "norms": norms, "class": type(run.engine.optimizer).__name__}
    for name in ("num_owned_matrices", "num_matrices", "num_sent_bytes"):
        result[name] = getattr(run.optimizer, name, None)
    result["rates"] = [group["lr"] for group in run.optimizer.param_groups]
    run.close()
    return result


def resume_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Losses of steps 2 and 3, run on and run from a DeepSpeed checkpoint of step 2."""
    first = Run(case)
    for step in range(2):
        first.step(step)
    first.engine.save_checkpoint(str(folder / case["name"]), tag="step2")
    schedule = first.scheduler.state_dict()
    straight = [first.step(step)[0] for step in (2, 3)]
    first.close()
    second = Run(case)
    second.engine.load_checkpoint(str(folder / case["name"]), tag="step2")
    second.scheduler.load_state_dict(schedule)
    buffers = {
        str(state["momentum_buffer"].dtype)
        for state in second.optimizer.state.values()
        if "momentum_buffer" in state
    }
    resumed = [second.step(step)[0] for step in (2, 3)]
    second.close()
    return {"straight": straight, "resumed": resumed, "momentum_dtypes": sorted(buffers)}


KINDS = {"train": train_case, "resume": resume_case}


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=60))
    results = {}
    for case in cases:
        results[case["name"]] = KINDS[case.get("kind", "train")](case, folder)
    path = folder / f"rank-{os.environ['RANK']}.json"
    path.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
