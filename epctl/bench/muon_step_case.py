"""`epctl bench muon --step`: the whole optimizer step over what a rank owns, and its workspace.

Momentum, norm and cast in, iteration, update out, on float32 masters and gradients, as at ZeRO
with every expert whole on its rank. Nothing travels: one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from epctl.bench.device import MEBIBYTE, clock_of
from epctl.bench.measure import Run, sample_interleaved, spread
from epctl.bench.muon_shapes import MatrixBatch
from epctl.kernels.newton_schulz_cost import Products, choose_method, iteration_flops
from epctl.runtime.deepspeed_seams import FlatPartition, Fragment
from epctl.runtime.muon_rule import MuonRule
from epctl.runtime.optimizer import MatrixOptimizer

# Bytes of a parameter that a step moves at least: gradient in, momentum in and out, master in and
# out, in float32; direction out and in; the iteration's matrices out and in, twice, in half.
BYTES_OF_PASSES = 4 * 5 + 4 * 2 + 2 * 4


def step_rows(
    batches: Sequence[MatrixBatch],
    device: torch.device,
    ep: int | None,
    matmul_tflops: float,
    repeats: tuple[int, int],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns a row for torch's and for Triton's passes and products, and what cannot run.

    Args:
        ep: for the label; None without a model.
        matmul_tflops: the rate of the floor, which is the iteration alone, symmetric.
        repeats: warm-up calls and timed rounds.
    """
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    for kernels in ("torch", "triton"):
        name = f"epctl step, {kernels}"
        try:
            optimizer = _optimizer(batches, device, kernels)
            optimizer.step()  # compiles and captures; what these allocate stays
            runs[name] = optimizer.step
        except Exception as error:
            if kernels == "torch":
                raise
            absent[name] = f"{type(error).__name__}: {error}"[:200]
    samples = sample_interleaved(
        runs, warm_up=repeats[0], rounds=repeats[1], clock=clock_of(device)
    )
    label = "step over all of a rank" + (f", EP={ep}" if ep else "")
    num_parameters = sum(_count(b) * b.num_rows * b.num_columns for b in batches)
    floor_ms = _flops(batches, "symmetric") / matmul_tflops / 1e9
    rows = []
    for name, run in runs.items():
        milliseconds = spread([1e3 * seconds for seconds in samples[name]])
        row: dict[str, Any] = {
            "batch": label,
            "implementation": name,
            "num_parameters": num_parameters,
            "num_matrices": sum(_count(b) for b in batches),
            "pass_bytes": BYTES_OF_PASSES * num_parameters,
            "gate": {},  # the iteration's own gate was green at each of its shapes
            "ms": milliseconds._asdict(),
            "tflops": _flops(batches, "torch") / milliseconds.median / 1e9,
            "floor_ms": floor_ms,
            "of_floor": floor_ms / milliseconds.median,
        }
        if device.type == "cuda":
            row["peak_mib"] = _workspace(run)
        rows.append(row)
    return rows, absent


def _count(batch: MatrixBatch) -> int:
    return max(1, round(batch.num_owned))


def _flops(batches: Sequence[MatrixBatch], products: Products) -> float:
    total = 0
    for batch in batches:
        shape = (batch.num_rows, batch.num_columns)
        method = choose_method(*shape, products=products).method
        total += _count(batch) * iteration_flops(method, *shape, products=products)
    return float(total)


def _optimizer(
    batches: Sequence[MatrixBatch], device: torch.device, kernels: Any
) -> MatrixOptimizer:
    """Returns an optimizer over one stack a shape, random gradients in place."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for batch in batches:
        shape = (_count(batch), batch.num_rows, batch.num_columns)
        parameter = nn.Parameter(torch.zeros(shape, device=device))
        parameter.grad = torch.randn(shape, device=device, generator=generator)
        parameters.append(parameter)
    group = {"params": parameters, "name": "m", "kind": "muon", "lr": 1e-3, "weight_decay": 0.1}
    optimizer = MatrixOptimizer([group], rule=MuonRule(kernels=kernels))
    fragments = [((Fragment(p, 0, p.numel(), 0),),) for p in parameters]
    optimizer.wire(
        [FlatPartition(p, None, 0, f) for p, f in zip(parameters, fragments, strict=True)], device
    )
    return optimizer


def _workspace(run: Run) -> float:
    """Returns MiB that a step allocates beside masters, gradients and momentum, graphs included."""
    from epctl.kernels.newton_schulz_graph import shared_bytes

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before + shared_bytes()) / MEBIBYTE
