"""The ranks of `epctl bench multimodal-sp`: gate, then measure, workload by workload.

Started as `python -m epctl.bench.multimodal_sp_ranks FOLDER SETTINGS_JSON`; rank 0 appends events
to `events.jsonl` (`note`, `row`, `absent`, `red`), which the command follows.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.bench.measure import Run, sample_interleaved, spread, wall_clock
from epctl.bench.multimodal_sp_gate import Errors, Gate
from epctl.bench.multimodal_sp_modes import Mode, SavedBytes, sharded, vision_cost
from epctl.bench.multimodal_sp_rates import (
    exchange_rate,
    geometry_of,
    largest_exchange,
    tower_share,
)
from epctl.bench.multimodal_sp_scaling import Rates, scaling
from epctl.bench.multimodal_sp_workloads import CPU, GPU, WORKLOADS, Workload, build_model
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.leave import leave
from epctl.runtime.sequence.group import SequenceGroup

MEBIBYTE = 2**20
STEPS_BEFORE = 1
TIMES = ("ms", "tokens_per_second", "processor_ms", "speedup")
FACTS = ("encoder_mib", "total_mib", "moved_mib", "tower_moved_mib", "vision_cost")

Facts = dict[str, float]
Key = tuple[int, str]  # number of ranks, mode
ALONE: Key = (1, "whole")

# What a row has where one rank alone ran out of memory.
NOTHING: dict[str, Any] = dict.fromkeys((*TIMES, *FACTS)) | {"out_of_memory": True}


@dataclass(frozen=True)
class Sample:
    """A workload on this rank's device."""

    workload: Workload
    model: nn.Module
    inputs: dict[str, Tensor]
    patches: int

    @property
    def num_tokens(self) -> int:
        return self.inputs["input_ids"].numel()


class Bench:
    """One process: its device, its groups and where events go."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        on_gpu = settings["device"] == "cuda"
        self.device = torch.device("cuda", self.rank) if on_gpu else torch.device("cpu")
        self.groups = {size: self._group(size) for size in settings["sizes"]}
        self.gate = Gate(self.device, self.rank, self.groups, self.write)
        self._measured = ""
        self._processor: dict[str, list[float]] = {}

    def _group(self, size: int) -> SequenceGroup:
        group = dist.new_group(range(size))
        return SequenceGroup(self.rank, size, group) if self.rank < size else SequenceGroup()

    def write(self, **event: Any) -> None:
        if self.rank == 0:
            with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    def run(self) -> None:
        for workload in WORKLOADS:
            if workload.name in self.settings["workloads"]:
                self.measure(workload)
                gc.collect()

    def measure(self, workload: Workload) -> None:
        title, rounds = f"{workload.name} ({workload.family})", self.settings["rounds"]
        self.write(note=f"{title}: gate")
        errors = self.gate.check(workload)
        sample = self._sample(workload)
        self._processor = {}
        self.write(note=f"{title}: {rounds} rounds")
        runs = self._runs(sample)
        facts = {key: self._facts(sample, *key) for key in runs}
        samples = sample_interleaved(
            {_named(key): run for key, run in runs.items() if facts[key] is not None},
            rounds=rounds,
            warm_up=STEPS_BEFORE,
            lead_in=False,
            clock=self._clock,
            before=self._begin,
        )
        # A CPU may be shared with others: there the work is compared, not the waiting.
        compared = samples if self.device.type == "cuda" else self._processor
        seconds = {name: spread(values).median for name, values in compared.items()}
        for key, found in facts.items():
            known = NOTHING
            if found is not None:
                known = self._times(sample, key, samples, seconds) | found
            self.write(row=_identity(sample, key, errors) | known)
        self._scaling(sample, seconds)

    def _sample(self, workload: Workload) -> Sample:
        on_gpu = self.device.type == "cuda"
        config, inputs, patches = workload.build(GPU if on_gpu else CPU)
        model = build_model(config, self.device, torch.bfloat16 if on_gpu else torch.float32)
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        return Sample(workload, model, inputs, patches)

    def _times(
        self,
        sample: Sample,
        key: Key,
        samples: dict[str, list[float]],
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """Returns what was timed; no speed-up where one rank alone was not."""
        name, alone = _named(key), seconds.get(_named(ALONE))
        taken = spread(samples[name])
        return {
            "ms": {bound: 1e3 * value for bound, value in taken._asdict().items()},
            "tokens_per_second": sample.num_tokens / taken.median / key[0],
            "processor_ms": 1e3 * spread(self._processor[name]).median,
            "speedup": None if alone is None else alone / seconds[name],
        }

    def _scaling(self, sample: Sample, seconds: dict[str, float]) -> None:
        """Writes what more ranks would do, by the rates of the most ranks that were measured.

        Nothing where one rank alone ran out of memory: its time is what all others are made from.
        """
        if _named(ALONE) not in seconds:
            return
        model, inputs = sample.model, sample.inputs
        size, geometry = max(self.groups), geometry_of(model, inputs)
        if self.rank < size:
            rate = exchange_rate(self.groups[size], self.device, largest_exchange(geometry))
        if self.rank > 0:
            return
        share = tower_share(model, inputs, self.device)
        times = {1: seconds[_named(ALONE)]}
        times |= {n: seconds[_named((n, "aligned"))] for n in self.groups}
        rates = Rates(times[1], times[size], size, share, rate)
        table = scaling(geometry, rates, {n: 1e3 * value for n, value in times.items()})
        self.write(scaling={"workload": sample.workload.name, "mode": "aligned", **table})

    def _runs(self, sample: Sample) -> dict[Key, Run]:
        """Returns a step of one rank alone, and of every mode on its ranks."""
        # One rank by the same attention functions: the kernels of all rows are alike.
        runs: dict[Key, Run] = {ALONE: partial(self._sharded, sample, 1, "aligned")}
        for size in self.groups:
            for mode in sample.workload.modes:
                runs[size, mode] = partial(self._sharded, sample, size, mode)
        return runs

    def _sharded(self, sample: Sample, size: int, mode: Mode) -> None:
        if self.rank < size:
            with sharded(sample.model, self.groups.get(size, SequenceGroup()), mode):
                sample.model(**sample.inputs).loss.backward()
            sample.model.zero_grad(set_to_none=True)

    def _begin(self, name: str) -> None:
        self._measured = name

    def _clock(self, run: Run) -> float:
        """Seconds until the slowest rank is done; the most processor time of a rank is kept."""

        def together() -> None:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()

        dist.barrier()
        before = time.process_time()
        seconds = wall_clock(together)
        used = torch.tensor(time.process_time() - before, device=self.device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        self._processor.setdefault(self._measured, []).append(float(used))
        return seconds

    def _facts(self, sample: Sample, size: int, mode: Any) -> Facts | None:
        """Returns memory, traffic and balance of one step: the most over the ranks.

        None, on every rank, if one rank alone ran out of memory.
        """
        found: Facts | None = dict.fromkeys(FACTS, 0.0)
        if self.rank < size:
            found = self._alone(sample) if size == 1 else self._together(sample, size, mode)
            sample.model.zero_grad(set_to_none=True)
        if found is None:
            # Only here the step's frames are gone, and with them the tensors that they held.
            gc.collect()
            torch.cuda.empty_cache()
        told = [float(found is None), *(found or dict.fromkeys(FACTS, 0.0)).values()]
        values = torch.tensor(told, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        out_of_memory, *most = values.tolist()
        return None if out_of_memory else dict(zip(FACTS, most, strict=True))

    def _alone(self, sample: Sample) -> Facts | None:
        """Returns the facts of one rank alone; nobody waits for it if it runs out of memory."""
        try:
            with sharded(sample.model, SequenceGroup(), "aligned"):
                memory = self._memory(sample)
        except torch.OutOfMemoryError:
            return None
        return dict(zip(FACTS, (*memory, 0.0, 0.0, 1.0), strict=True))

    def _together(self, sample: Sample, size: int, mode: Mode) -> Facts:
        group = self.groups[size]
        group.traffic.reset()
        with sharded(sample.model, group, mode) as parallel:
            memory = self._memory(sample)
        sent = group.traffic.by_part
        moved = group.traffic.num_bytes / MEBIBYTE
        tower = (sent.get("tower", 0) + sent.get("features", 0)) / MEBIBYTE
        facts = (*memory, moved, tower, vision_cost(parallel, mode))
        return dict(zip(FACTS, facts, strict=True))

    def _memory(self, sample: Sample) -> tuple[float, float]:
        """Returns MiB of the tower and of the whole step, weights apart.

        On a GPU the peak of what is allocated; on a CPU what autograd keeps for backward.
        """
        model: Any = sample.model
        if self.device.type == "cpu":
            saved = SavedBytes(model)
            _backward(saved.measure(lambda: _loss(model(**sample.inputs))))
            return saved.at_decoder / MEBIBYTE, saved.total / MEBIBYTE
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, at_decoder = torch.cuda.memory_allocated(), []
        hook = model.get_decoder().register_forward_pre_hook(
            lambda *_: at_decoder.append(torch.cuda.max_memory_allocated()), prepend=True
        )
        try:
            _backward(_loss(model(**sample.inputs)))
        finally:
            hook.remove()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return (at_decoder[0] - before) / MEBIBYTE, (peak - before) / MEBIBYTE


def _named(key: Key) -> str:
    return f"{key[0]} {key[1]}"


def _identity(sample: Sample, key: Key, errors: dict[Key, Errors]) -> dict[str, Any]:
    """Returns what was run, and the gate of it."""
    return {
        "workload": sample.workload.name,
        "model": sample.workload.family,
        "mode": key[1],
        "ranks": key[0],
        "patches": sample.patches,
        "tokens": sample.num_tokens,
        "gate": errors.get(key, {"loss": 0.0, "gradient": 0.0}),
    }


def _loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def main(folder: Path, settings: dict[str, Any]) -> None:
    """Runs every workload; exits with 7 on all ranks when a gate is red."""
    warnings.simplefilter("ignore")
    if settings["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Float32 gates compare with exact products.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    seams.initialize_distributed(settings["device"], datetime.timedelta(minutes=5))
    Bench(folder, settings).run()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except SystemExit as ended:
        leave(int(ended.code or 0))
    leave(0)
