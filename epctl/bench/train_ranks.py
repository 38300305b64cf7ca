"""The ranks of `epctl bench train`: the gates first, then one engine after another.

Started as `python -m epctl.bench.train_ranks FOLDER SETTINGS_JSON`; ranks append events to
`events.jsonl`: `begin`, `note`, `rates`, `gate`, `visit`, `red`, `absent`, `failed`. Each event but
`failed` is rank 0's.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epctl.bench.device import gpu_name, matmul_rate
from epctl.bench.measure import (
    Run,
    peak_resident_bytes,
    reset_peak_resident,
    sample_interleaved,
    wall_clock,
)
from epctl.bench.train_engines import OPENERS, AbsentError, Order, Trainee
from epctl.bench.train_gate import RandomTokens, run_gate
from epctl.bench.train_routing import RoutingControl
from epctl.config import RunConfig
from epctl.launch.agent import end_with_parent
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.data_batch import Batch
from epctl.runtime.leave import leave
from epctl.runtime.native_config import native_config
from epctl.runtime.profile import PROFILED_STEPS, WARM_UP_STEPS, StepProfiler
from epctl.runtime.ranges import watch_with_nvtx
from epctl.runtime.worker import OUT_OF_MEMORY

RED, FAILED = 7, 6
NUM_BATCHES = 4  # tokens drawn beforehand and used in turn
OPTIMIZER_STEPS = 3  # whose optimizer is timed by itself


class Ranks:
    """One process: its device, and where events go."""

    def __init__(self, folder: Path, settings: dict[str, Any], device: torch.device) -> None:
        self.folder, self.settings, self.device = folder, settings, device
        self.rank = dist.get_rank()
        self.cases = {case["key"]: case for case in settings["cases"]}
        self._at_rest: int | None = None

    def write(self, **event: Any) -> None:
        if self.rank == 0:
            append_event(self.folder, event)

    def run(self) -> None:
        """Measures the machine, then runs every gate and every visit."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        rate = matmul_rate(self.device, dtype)
        self.write(rates={"matmul_tflops": rate / 1e12, "gpu": gpu_name(self.device)})
        for key in self.settings["gates"]:
            self._gate(key)
        for key, implementation, number in self.settings["visits"]:
            if self._time_is_over():
                self.write(over=True)
                return
            self._visit(key, implementation, number)

    def _time_is_over(self) -> bool:
        """True on every rank once rank 0's clock says so. A collective."""
        deadline = self.settings["deadline"]
        is_over = torch.tensor(float(deadline is not None and time.time() > deadline))
        is_over = is_over.to(self.device)
        dist.broadcast(is_over, src=0)
        return bool(is_over)

    def _left_over(self) -> int:
        """Returns the bytes that are held now and were not before the first engine."""
        held = _let_go(self.device)
        if self._at_rest is None:
            # Of a process, most of it is libraries: what the first engine found is no left-over.
            self._at_rest = held if self.device.type == "cpu" else 0
        return max(0, held - self._at_rest)

    def _gate(self, key: str) -> None:
        self.write(begin=["gate", key])
        case = self.cases[key]
        config = RunConfig.model_validate(case["gate_config"])
        folder = self.folder / f"gate-{self.settings['gates'].index(key)}"
        folder.mkdir(exist_ok=True)
        values = self.settings["gate_values"]
        steps = self.settings["gate_steps"] if case["bfloat16"] else 0
        report = run_gate(values, config, self.device, folder, bfloat16_steps=steps)
        _let_go(self.device)
        if self.rank == 0:  # it holds a copy of the weights
            shutil.rmtree(folder)
        if not report["ok"]:
            self.write(note=f"{key}: {_told(report['bfloat16_losses'])}")
            self.write(red=f"{key}: {report['worst']}")
            dist.barrier()  # nobody ends before it is written
            raise SystemExit(RED)
        self.write(gate={"case": key, **report})

    def _visit(self, key: str, implementation: str, number: int) -> None:
        self.write(begin=["visit", key, implementation, number])
        left_over = self._left_over()
        started = time.perf_counter()
        order = Order(
            self.settings["values"],
            RunConfig.model_validate(self.cases[key]["config"]),
            self.device,
        )
        try:
            trainee = OPENERS[implementation](order)
        except AbsentError as error:
            self.write(absent=implementation, reason=str(error))
            return
        seconds = time.perf_counter() - started
        self.write(note=f"{key}: {implementation}, round {number + 1}, built in {seconds:.0f} s")
        visit = Visit(self, order, trainee, left_over)
        found = visit.measure(number)
        trainee.close()
        self.write(
            visit={
                "case": key,
                "implementation": implementation,
                "number": number,
                "note": trainee.note,
                "build_seconds": seconds,
                **found,
            }
        )


class Visit:
    """Steps of one engine, in every routing in turn, timed by the slowest rank."""

    def __init__(self, ranks: Ranks, order: Order, trainee: Trainee, left_over: int) -> None:
        self.ranks, self.device, self.trainee = ranks, ranks.device, trainee
        self.left_over = left_over
        experts = ranks.settings["num_experts"]
        self.routing = RoutingControl(trainee.engine.module, experts, self.device)
        self.batches = self._draw(order)
        self.losses: dict[str, list[float]] = {}
        self.norms: list[float] = []
        self.peaks: dict[str, int] = {}
        self.processor: dict[str, list[float]] = {}
        self._taken, self._measured = 0, ""

    def _draw(self, order: Order) -> list[list[Batch]]:
        """Returns this rank's micro-batches of a few steps, already on the device."""
        train = order.config.train
        vocab_size = native_config(order.values).vocab_size
        data = RandomTokens(vocab_size, train.sequence_length, train.seed)
        rows, count = train.micro_batch_size, train.gradient_accumulation_steps
        first = dist.get_rank() * NUM_BATCHES * count
        drawn = [
            data.train_batch((first + number) * rows, rows).to(self.device)
            for number in range(NUM_BATCHES * count)
        ]
        return [drawn[number * count : (number + 1) * count] for number in range(NUM_BATCHES)]

    def measure(self, number: int) -> dict[str, Any]:
        settings = self.ranks.settings
        names: Sequence[str] = settings["routings"]
        imbalance = {name: self._first_step(name) for name in names}
        samples = sample_interleaved(
            {name: self._run(name) for name in names},
            warm_up=settings["warm_up"],
            rounds=settings["steps"],
            lead_in=False,
            clock=self._clock,
            before=self._begin,
            after=self._note_peak,
        )
        optimizer_seconds = self._optimizer_seconds(names[0])
        breakdown = self._profile(names[0]) if number == 0 and settings["profile"] else None
        return {
            "seconds": samples,
            "optimizer_seconds": optimizer_seconds,
            "processor_seconds": self.processor,
            "losses": self.losses,
            "first_norm": self.norms[0],
            "peaks": self.peaks,
            "imbalance": imbalance,
            "breakdown": breakdown,
            "left_over": self.left_over,
        }

    def _first_step(self, name: str) -> float:
        """Takes a step and returns how unevenly it used the experts."""
        self.routing.counting = True
        self._run(name)()
        self.routing.counting = False
        return self.routing.imbalance()

    def _run(self, name: str) -> Run:
        def run() -> None:
            self.routing.balanced = name == "balanced"
            batches = self.batches[self._taken % NUM_BATCHES]
            self._taken += 1
            loss, norm = self.trainee.step(batches)
            self.losses.setdefault(name, []).append(loss)
            self.norms.append(norm)

        return run

    def _begin(self, name: str) -> None:
        self._measured = name
        _reset_peak(self.device)

    def _clock(self, run: Run) -> float:
        seconds, used = self._timed(run)
        self.processor.setdefault(self._measured, []).append(used)
        return seconds

    def _timed(self, run: Run) -> tuple[float, float]:
        """Returns wall and processor seconds of the slowest rank, all of them starting together."""

        def to_the_end() -> None:
            run()
            _synchronize(self.device)

        _synchronize(self.device)
        dist.barrier()
        before = time.process_time()
        seconds = wall_clock(to_the_end)
        used = self._highest(time.process_time() - before)
        return self._highest(seconds), used

    def _optimizer_seconds(self, name: str) -> list[float]:
        """Returns seconds of `engine.step` a step, begun when every rank's backward is done.

        Exchanges of gradients that ran under the backward pass are not in it.
        """
        engine, found = self.trainee.engine, list[float]()
        step = engine.step

        def timed() -> None:  # once a micro-step, of which the last steps
            found[-1] += self._timed(step)[0]

        engine.step = timed
        for _ in range(OPTIMIZER_STEPS):
            found.append(0.0)
            self._run(name)()
        del engine.step
        return found

    def _note_peak(self, name: str, number: int, seconds: float) -> None:
        held = int(self._highest(_peak(self.device) - self.left_over))
        self.peaks[name] = max(self.peaks.get(name, 0), held)

    def _highest(self, value: float) -> float:
        highest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return float(highest)

    def _profile(self, name: str) -> dict[str, float] | None:
        """Returns milliseconds a step by part, from rank 0's trace; None on the others."""
        folder = self.ranks.folder / "profile"
        profiler = StepProfiler(folder, self.ranks.rank, self.device, -WARM_UP_STEPS)
        run, found = self._run(name), None
        for step in range(PROFILED_STEPS):
            profiler.before(step)
            run()
            found = profiler.after(step)
        if found is None:
            return None
        return {part: ms / PROFILED_STEPS for part, ms, _ in found.rows()}


def _told(losses: dict[str, Any]) -> str:
    """Returns the losses of a gate that is red: nothing else keeps them."""
    sides = (f"{name} {' '.join(f'{x:.4f}' for x in losses[name])}" for name in ("whole", "epctl"))
    return "losses of steps in bfloat16: " + ("; ".join(sides) if losses["whole"] else "none taken")


def append_event(folder: Path, event: dict[str, Any]) -> None:
    """Appends one line; short enough for the system to write it in one piece."""
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _let_go(device: torch.device) -> int:
    """Frees what engines before left; returns the bytes that are held all the same.

    Allocated ones on a GPU; on a CPU the process's resident ones, which are more than tensors.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    _trim_heap()
    reset_peak_resident()
    return peak_resident_bytes()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _let_go(device)


def _trim_heap() -> None:
    """Gives back what the heap keeps of engines before: resident memory is then this one's."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def reason_of(error: Exception) -> str:
    """Returns why a visit failed, in a line."""
    first = (str(error).strip().splitlines() or ["no message"])[0][:300]
    if type(error).__name__ in OUT_OF_MEMORY:
        return f"out of memory: {first}"
    return f"{type(error).__name__}: {first}"


def main(folder: Path, settings: dict[str, Any]) -> int:
    """Runs everything; returns 7 when a gate is red, 6 when an engine failed."""
    warnings.simplefilter("ignore")
    end_with_parent(signal.SIGKILL)  # no orphan keeps the GPUs
    on_gpu = settings["device"] == "cuda"
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    seams.initialize_distributed(settings["device"], datetime.timedelta(minutes=10))
    watch_with_nvtx()
    try:
        Ranks(folder, settings, device).run()
    except SystemExit as ended:
        return int(ended.code or 0)
    except Exception as error:
        traceback.print_exc()
        append_event(
            folder,
            {"failed": reason_of(error), "rank": rank, "peak": _peak(device), "time": time.time()},
        )
        return FAILED
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
