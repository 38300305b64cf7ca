"""Ranks of the Muon tests: many cases in one process group, weights before and after kept.

Called as `python -m muon_ranks FOLDER CASES_JSON`. Rank K writes `rank-K.json` with losses, norms
and exchange figures of every case; weights of case C stand in `FOLDER/C`.
"""

from __future__ import annotations

import dataclasses
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
from torch import nn

from epctl.config import RunConfig
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime import muon_exchange, muon_step
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import save_model
from epctl.runtime.engine import create_engine, train_step
from epctl.runtime.leave import leave
from epctl.runtime.moe import Router
from epctl.runtime.muon_rule import MuonRule
from epctl.runtime.optimizer import MatrixOptimizer
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
        self.poisoned = False
        if "overflow_step" in case and dist.get_rank() == 0:
            self.engine.module.lm_head.register_forward_hook(self._poison)

    def _poison(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        if self.poisoned and output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    def step(self, step: int) -> tuple[float, float]:
        self.poisoned = step == self.case.get("overflow_step")
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


class Counted:
    """Counts what the optimizer really did, beside what it says: patches stay for the process."""

    def __init__(self) -> None:
        self.num_orthogonalized = 0
        self.num_sent_bytes = 0
        self.events: list[tuple[str, int]] = []
        orthogonalize_, start = MuonRule.orthogonalize_, muon_exchange.Exchange.__init__

        def counted_update(rule: MuonRule, *batches: torch.Tensor) -> None:
            count = sum(len(batch) for batch in batches)
            self.num_orthogonalized += count
            self.events.append(("orthogonalize", count))
            orthogonalize_(rule, *batches)

        def counted_start(
            exchange: Any, sent: list[list[torch.Tensor]], *rest: Any, **named: Any
        ) -> None:
            self.num_sent_bytes += sum(part.nbytes for parts in sent for part in parts)
            exchange.epctl_number = sum(kind == "start" for kind, _ in self.events)
            self.events.append(("start", exchange.epctl_number))
            start(exchange, sent, *rest, **named)

        wait = muon_exchange.Exchange.wait

        def counted_wait(exchange: Any) -> torch.Tensor:
            self.events.append(("wait", exchange.epctl_number))
            return wait(exchange)

        MuonRule.orthogonalize_ = counted_update  # type: ignore[method-assign]
        muon_exchange.Exchange.__init__ = counted_start  # type: ignore[method-assign]
        muon_exchange.Exchange.wait = counted_wait  # type: ignore[method-assign]


COUNTED = Counted()


def train_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    run = Run(case)
    result: dict[str, Any] = {"drift": constructor_drift(run), "rates": []}
    if case.get("keep_initial"):
        run.save(folder / INITIAL)
    COUNTED.num_orthogonalized = COUNTED.num_sent_bytes = 0
    losses, norms = [], []
    for step in range(case.get("steps", NUM_STEPS)):
        if step == case.get("overflow_step"):
            run.save(folder / f"{case['name']}-before")
        result["rates"].append([(g.get("kind"), g["lr"]) for g in run.optimizer.param_groups])
        loss, norm = run.step(step)
        losses.append(loss)
        norms.append(norm)
        if step == case.get("overflow_step"):
            run.save(folder / f"{case['name']}-after")
    run.save(folder / case["name"])
    result |= {"losses": losses, "norms": norms} | figures(run)
    run.close()
    return result


def figures(run: Run) -> dict[str, Any]:
    names = ("num_owned_matrices", "num_matrices", "num_sent_bytes")
    return {name: getattr(run.optimizer, name, None) for name in names} | {
        "class": type(run.engine.optimizer).__name__,
        "really_orthogonalized": COUNTED.num_orthogonalized,
        "really_sent_bytes": COUNTED.num_sent_bytes,
        "finite_momentum": all(
            bool(state["momentum_buffer"].isfinite().all())
            for state in run.optimizer.state.values()
            if "momentum_buffer" in state
        ),
    }


def constructor_drift(run: Run) -> dict[str, float]:
    """What the engine's constructor did to masters and AdamW's step count: nothing, it must be."""
    drift = 0.0
    if run.config.parallel.zero == 0 and run.case.get("bfloat16"):
        for partition in seams.flat_partitions(run.engine):
            parameter = partition.fragments_by_rank[0][0].parameter
            difference = (partition.flat - parameter.float()).abs().max()
            drift = max(drift, float(difference))
    steps = [float(s["step"]) for s in run.optimizer.state.values() if "step" in s]
    return {"weights": drift, "adamw_steps": max(steps, default=0.0)}


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


OWNER_SHAPES = ((24, 16), (16, 40), (20, 20), (3, 24, 32), (7, 5))


def owners_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Feeds the optimizer slices of known gradients by hand: no engine, no reduction, no model."""
    generator = torch.Generator().manual_seed(11)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in OWNER_SHAPES]
    layout = _by_hand(parameters, case["layout"])
    group = {"params": parameters, "name": "m", "kind": "muon", "lr": 0.02, "weight_decay": 0.1}
    # One matrix a batch: the library's kernels, and so the last bits, depend on the batch size.
    optimizer = MatrixOptimizer([group], chunk_elements=1)
    flat = torch.zeros(layout.flat.numel())
    mine = layout.fragments_by_rank[layout.group_rank]
    for f in mine:
        source = f.parameter.detach().view(-1)[f.start : f.start + f.num_elements]
        flat[f.offset : f.offset + f.num_elements] = source
    layout = dataclasses.replace(layout, flat=flat)
    copy = torch.full(flat.shape, torch.nan, dtype=torch.bfloat16)
    optimizer.wire([layout], copies={id(flat): copy})
    usual, muon_step.LARGE = muon_step.LARGE, case.get("large", muon_step.LARGE)
    optimizer.param_groups[0]["params"] = [flat]
    COUNTED.events.clear()
    for _ in range(3):
        gradients = {id(p): torch.randn(p.shape, generator=generator).view(-1) for p in parameters}
        flat.grad = torch.zeros_like(flat)
        for f in mine:
            source = gradients[id(f.parameter)][f.start : f.start + f.num_elements]
            flat.grad[f.offset : f.offset + f.num_elements] = source
        optimizer.step()
    muon_step.LARGE = usual
    held = [range(f.offset, f.offset + f.num_elements) for f in mine]
    copied = all(
        torch.equal(copy[r.start : r.stop], flat[r.start : r.stop].bfloat16()) for r in held
    )
    for parameter in parameters:
        whole = torch.zeros(parameter.numel())
        for f in mine:
            if f.parameter is parameter:
                whole[f.start : f.start + f.num_elements] = flat[
                    f.offset : f.offset + f.num_elements
                ]
        dist.all_reduce(whole)
        parameter.data = whole.view_as(parameter)
    if dist.get_rank() == 0:
        torch.save([p.data for p in parameters], folder / f"{case['name']}.pt")
    return {
        "copied": copied,
        "num_owned": optimizer.num_owned_matrices,
        "num_sent_bytes": optimizer.num_sent_bytes,
        "num_travelling": sum(
            chunk.slices_travel for unit in optimizer._units for chunk in unit.chunks
        ),
        "events": COUNTED.events.copy(),
    }


def _by_hand(parameters: list[nn.Parameter], layout: str) -> seams.FlatPartition:
    """Cuts the concatenation ("cut", ZeRO 1/2) or every Parameter ("spread", ZeRO-3)."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    by_rank: list[list[seams.Fragment]] = [[] for _ in range(num_ranks)]
    if layout == "cut":
        length = -(-sum(p.numel() for p in parameters) // num_ranks)
        position = 0
        for p in parameters:
            for r in range(num_ranks):
                low, high = max(position, r * length), min(position + p.numel(), (r + 1) * length)
                if low < high:
                    fragment = seams.Fragment(p, low - position, high - low, low - r * length)
                    by_rank[r].append(fragment)
            position += p.numel()
    else:
        length = 0
        for p in parameters:
            share = -(-p.numel() // num_ranks)
            for r in range(num_ranks):
                start = min(r * share, p.numel())
                fragment = seams.Fragment(p, start, min(share, p.numel() - start), length)
                by_rank[r].append(fragment)
            length += share
    fragments = tuple(tuple(held) for held in by_rank)
    return seams.FlatPartition(torch.empty(length), dist.group.WORLD, rank, fragments)


KINDS = {"train": train_case, "resume": resume_case, "owners": owners_case}


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
    leave(0)
