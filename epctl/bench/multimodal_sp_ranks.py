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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.bench.measure import Run, sample_interleaved, spread, wall_clock
from epctl.bench.multimodal_sp_modes import (
    MODES,
    Mode,
    SavedBytes,
    sharded,
    vision_cost,
    wrap_with_deepspeed,
)
from epctl.bench.multimodal_sp_rates import (
    exchange_rate,
    geometry_of,
    largest_exchange,
    tower_share,
)
from epctl.bench.multimodal_sp_scaling import Rates, scaling
from epctl.bench.multimodal_sp_workloads import CPU, GPU, GPU_GATE, WORKLOADS, Workload, build_model
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.leave import leave
from epctl.runtime.sequence.group import SequenceGroup

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
COSINE_NEEDED = 0.999  # of bfloat16 gradients
# Below this share of the largest a gradient is zero but for rounding: a bias on keys.
ZERO = 1e-6
MEBIBYTE = 2**20
STEPS_BEFORE = 1

Gradients = list[tuple[str, Tensor]]


class Bench:
    """One process: its device, its groups and where events go."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        on_gpu = settings["device"] == "cuda"
        self.device = torch.device("cuda", self.rank) if on_gpu else torch.device("cpu")
        self.groups = {size: self._group(size) for size in settings["sizes"]}
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

    # Gate

    def gate(self, workload: Workload) -> dict[tuple[int, str], dict[str, float]]:
        """Returns the errors of every mode, all within the tolerances; else the run is over."""
        on_gpu = self.device.type == "cuda"
        model, inputs = self._made(workload, GPU_GATE if on_gpu else CPU, torch.float32)
        loss, expected = self._step(model, inputs)
        errors: dict[tuple[int, str], dict[str, float]] = {}
        for size, group in self.groups.items():
            for mode in MODES:
                found = self._errors(model, inputs, group, size, mode, loss, expected)
                if on_gpu:
                    found |= self._cosine(workload, group, size, mode, expected)
                errors[size, mode] = found
                if not _is_green(found):
                    where = f"{workload.name}, {mode}, {size} ranks"
                    self.write(red=f"{where}: {_told(found)}")
                    dist.barrier()  # nobody ends before it is written
                    raise SystemExit(7)
        self._peer(model, inputs, workload, loss, expected)
        return errors

    def _errors(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        group: SequenceGroup,
        size: int,
        mode: Mode,
        loss: float,
        expected: Gradients,
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.rank < size:
            with sharded(model, group, mode):
                own_loss, gradients = self._step(model, inputs)
            mean = torch.tensor(own_loss, dtype=torch.float64, device=self.device)
            dist.all_reduce(mean, group=group.group)
            _average(gradients, group, size)
            error = worst_error(gradients, expected)
            found = {"loss": abs(float(mean) / size - loss), "gradient": error}
        return self._from_rank_0(found)

    def _cosine(
        self,
        workload: Workload,
        group: SequenceGroup,
        size: int,
        mode: Mode,
        expected: Gradients,
    ) -> dict[str, float]:
        """Returns the cosine of the whole bfloat16 gradient with the unsharded float32 one."""
        found: dict[str, float] = {}
        if self.rank < size:
            model, inputs = self._made(workload, GPU_GATE, torch.bfloat16)
            with sharded(model, group, mode):
                _, gradients = self._step(model, inputs)
            _average(gradients, group, size)
            found = {"bfloat16_cosine": cosine(gradients, expected)}
        return self._from_rank_0(found)

    def _from_rank_0(self, found: dict[str, float]) -> dict[str, float]:
        box = [found]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def _peer(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        workload: Workload,
        loss: float,
        expected: Gradients,
    ) -> None:
        """Runs DeepSpeed's own wrapper where it knows the model, and tells how far off it is."""
        size = max(self.groups)
        group, before = self.groups[size], list(model.named_parameters())
        if self.rank >= size:
            return
        name = f"DeepSpeed's auto_wrap_model_for_sp on {workload.family}"
        try:
            num_wrapped = wrap_with_deepspeed(model, group)
        except ValueError as error:
            self.write(absent=name, reason=str(error).split(".")[0][:120])
            return
        if not num_wrapped:
            self.write(absent=name, reason="it wraps no layer: every rank computes everything")
            return
        result = model(**inputs, use_cache=False)
        result.loss.backward()
        gradients = [(n, _or_zero(p)) for n, p in before]
        _average(gradients, group, size)
        off = abs(float(result.loss.detach()) - loss)
        pairs = zip(gradients, expected, strict=True)
        each = [worst_error([own], [wanted], expected) for own, wanted in pairs]
        wrong = sum(error > GRADIENT_TOLERANCE for error in each)
        reason = (
            f"gate red: {wrong} of {len(each)} gradients are off, the worst by {max(each):.0%}, "
            f"the loss by {off:.1e}"
        )
        self.write(absent=name, reason=reason)

    # Measure

    def measure(self, workload: Workload) -> None:
        self.write(note=f"{workload.name} ({workload.family}): gate")
        errors = self.gate(workload)
        on_gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        config, inputs, patches = workload.build(GPU if on_gpu else CPU)
        model = build_model(config, self.device, dtype)
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        rounds = self.settings["rounds"]
        self._processor = {}
        self.write(note=f"{workload.name} ({workload.family}): {rounds} rounds")
        runs = self._runs(model, inputs)
        facts = {key: self._facts(model, inputs, *key) for key in runs}
        samples = sample_interleaved(
            {f"{size} {mode}": run for (size, mode), run in runs.items()},
            rounds=rounds,
            warm_up=STEPS_BEFORE,
            lead_in=False,
            clock=self._clock,
            before=self._begin,
        )
        # A CPU may be shared with others: there the work is compared, not the waiting.
        compared = samples if on_gpu else self._processor
        whole = spread(compared["1 whole"]).median
        num_tokens = inputs["input_ids"].numel()
        for size, mode in runs:
            seconds = spread(samples[f"{size} {mode}"])
            row = {
                "workload": workload.name,
                "model": workload.family,
                "mode": mode,
                "ranks": size,
                "patches": patches,
                "tokens": num_tokens,
                "ms": {key: 1e3 * value for key, value in seconds._asdict().items()},
                "tokens_per_second": num_tokens / seconds.median / size,
                "processor_ms": 1e3 * spread(self._processor[f"{size} {mode}"]).median,
                "speedup": whole / spread(compared[f"{size} {mode}"]).median,
                **facts[size, mode],
                "gate": errors.get((size, mode), {"loss": 0.0, "gradient": 0.0}),
            }
            self.write(row=row)
        self._scaling(
            model, inputs, workload, {key: spread(v).median for key, v in compared.items()}
        )

    def _scaling(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        workload: Workload,
        seconds: dict[str, float],
    ) -> None:
        """Writes what more ranks would do, by the rates of the most ranks that were measured."""
        size, geometry = max(self.groups), geometry_of(model, inputs)
        if self.rank < size:
            rate = exchange_rate(self.groups[size], self.device, largest_exchange(geometry))
        if self.rank > 0:
            return
        share = tower_share(model, inputs, self.device)
        times = {1: seconds["1 whole"]} | {n: seconds[f"{n} aligned"] for n in self.groups}
        rates = Rates(times[1], times[size], size, share, rate)
        table = scaling(geometry, rates, {n: 1e3 * value for n, value in times.items()})
        self.write(scaling={"workload": workload.name, "mode": "aligned", **table})

    def _runs(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[tuple[int, str], Run]:
        """Returns a step of one rank alone, and of every mode on its ranks."""
        runs: dict[tuple[int, str], Run] = {(1, "whole"): partial(self._whole, model, inputs)}
        for size in self.groups:
            for mode in MODES:
                runs[size, mode] = partial(self._sharded, model, inputs, size, mode)
        return runs

    def _whole(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """One rank alone, by the same attention functions: the kernels of all rows are alike."""
        if self.rank == 0:
            with sharded(model, SequenceGroup(), "aligned"):
                model(**inputs).loss.backward()
            model.zero_grad(set_to_none=True)

    def _sharded(self, model: nn.Module, inputs: dict[str, Tensor], size: int, mode: Mode) -> None:
        if self.rank < size:
            with sharded(model, self.groups[size], mode):
                model(**inputs).loss.backward()
            model.zero_grad(set_to_none=True)

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

    def _facts(
        self, model: nn.Module, inputs: dict[str, Tensor], size: int, mode: Any
    ) -> dict[str, float]:
        """Returns memory, traffic and balance of one step: the most over the ranks."""
        facts = {"encoder_mib": 0.0, "total_mib": 0.0, "moved_mib": 0.0, "tower_moved_mib": 0.0}
        facts["vision_cost"] = 1.0
        if self.rank < size:
            if size == 1:
                with sharded(model, SequenceGroup(), "aligned"):
                    facts |= self._memory(model, lambda: _loss(model(**inputs)))
            else:
                group = self.groups[size]
                group.traffic.reset()
                with sharded(model, group, mode) as parallel:
                    facts |= self._memory(model, lambda: _loss(model(**inputs)))
                facts["moved_mib"] = group.traffic.num_bytes / MEBIBYTE
                sent = group.traffic.by_part
                tower = sent.get("tower", 0) + sent.get("features", 0)
                facts["tower_moved_mib"] = tower / MEBIBYTE
                facts["vision_cost"] = vision_cost(parallel, mode)
            model.zero_grad(set_to_none=True)
        values = torch.tensor(list(facts.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return dict(zip(facts, values.tolist(), strict=True))

    def _memory(self, model: Any, forward: Callable[[], Tensor]) -> dict[str, float]:
        """Returns MiB of the tower and of the whole step, weights apart.

        On a GPU the peak of what is allocated; on a CPU what autograd keeps for backward.
        """
        if self.device.type == "cpu":
            saved = SavedBytes(model)
            _backward(saved.measure(forward))
            return {
                "encoder_mib": saved.at_decoder / MEBIBYTE,
                "total_mib": saved.total / MEBIBYTE,
            }
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, at_decoder = torch.cuda.memory_allocated(), []
        hook = model.get_decoder().register_forward_pre_hook(
            lambda *_: at_decoder.append(torch.cuda.max_memory_allocated()), prepend=True
        )
        _backward(forward())
        hook.remove()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return {
            "encoder_mib": (at_decoder[0] - before) / MEBIBYTE,
            "total_mib": (peak - before) / MEBIBYTE,
        }

    def _made(
        self, workload: Workload, size: Any, dtype: torch.dtype
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        config, inputs, _ = workload.build(size)
        model = build_model(config, self.device, torch.float32).to(dtype)
        return model, {key: value.to(self.device) for key, value in inputs.items()}

    def _step(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, Gradients]:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        gradients = [(name, _or_zero(p).clone()) for name, p in model.named_parameters()]
        model.zero_grad(set_to_none=True)
        return float(loss.detach()), gradients


def _loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _or_zero(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def _average(gradients: Gradients, group: SequenceGroup, size: int) -> None:
    for _, gradient in gradients:
        dist.all_reduce(gradient, group=group.group)
        gradient /= size


def worst_error(
    found: Gradients, expected: Gradients, everything: Gradients | None = None
) -> float:
    """Returns the largest relative error of any parameter's gradient.

    Args:
        everything: the whole gradient, if `expected` is a part of it: it says what is zero.
    """
    zero = ZERO * max(float(gradient.norm()) for _, gradient in everything or expected)
    worst = 0.0
    for (_, own), (_, reference) in zip(found, expected, strict=True):
        distance, norm = float((own - reference).norm()), float(reference.norm())
        if distance != distance:
            return float("inf")
        if norm > zero or distance > zero:
            worst = max(worst, distance / max(norm, zero))
    return worst


def cosine(found: Gradients, expected: Gradients) -> float:
    """Returns the cosine between two whole gradients, in float64."""
    dot = left = right = 0.0
    for (_, own), (_, reference) in zip(found, expected, strict=True):
        a, b = own.double().flatten(), reference.double().flatten()
        dot += float(a @ b)
        left += float(a @ a)
        right += float(b @ b)
    return float(dot / (left * right) ** 0.5)


def _is_green(errors: dict[str, float]) -> bool:
    exact = errors["loss"] <= LOSS_TOLERANCE and errors["gradient"] <= GRADIENT_TOLERANCE
    return exact and errors.get("bfloat16_cosine", 1.0) > COSINE_NEEDED


def _told(errors: dict[str, float]) -> str:
    needed = (
        f"{LOSS_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e} are allowed, "
        f"a cosine above {COSINE_NEEDED}"
    )
    return ", ".join(f"{key} {value:.2e}" for key, value in errors.items()) + f"; {needed}"


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
