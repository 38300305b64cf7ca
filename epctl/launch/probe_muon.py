"""Probes of DeepSpeed's own Muon, which epctl offers for comparison (`--optim deepspeed-muon`)."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon import original_muon

from epctl.launch.probe import Finding, probe_of
from epctl.launch.probe_engine import (
    Dial,
    engine_of,
    muon_config,
    spread_matrix,
    step_with,
    whole_weight,
)


def _update(config: dict[str, Any]) -> torch.Tensor:
    """Returns what one Muon step at rate 1 subtracts for a gradient of norm 0.018."""
    with engine_of(Dial(), config) as engine:
        step_with(engine, [spread_matrix()])
        return -whole_weight(engine)


@probe_of("clipping_on_muon_update")
def clipping(work: Path) -> Finding:
    """A gradient far below the bound of 1.0 must not be clipped."""
    free = float(_update(muon_config(1)).norm())
    bounded = float(_update(muon_config(1, gradient_clipping=1.0)).norm())
    seen = f"update norm {free:.2f} without clipping, {bounded:.2f} with a bound of 1.0"
    return Finding(bounded < 0.9 * free, f"{seen}; the gradient's norm is 0.018")


@probe_of("muon_sgd_at_zero0")
def zero0(work: Path) -> Finding:
    """Singular values of the update at ZeRO-0: near one another, or as spread as the gradient's."""
    values = torch.linalg.svdvals(_update(muon_config(0)))
    spread = float(values.max() / values.min())
    return Finding(spread > 5, f"singular values of the update differ {spread:.1f} times")


@probe_of("muon_adamw_under_zero_init")
def zero_init(work: Path) -> Finding:
    """Which optimizer a matrix is given when it was built under `zero.Init`."""
    config = muon_config(3, zero_optimization={"reduce_scatter": False})
    # zero.Init completes the config that it is given.
    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config)):
        model = Dial()
    deepspeed.set_optimizer_flags(deepspeed.DeepSpeedConfig(config), model)
    on_muon = bool(getattr(model.weight, "use_muon", False))
    return Finding(not on_muon, f"the matrix is on {'Muon' if on_muon else 'AdamW'}")


@probe_of("muon_per_micro_batch_zero3")
def per_micro_batch(work: Path) -> Finding:
    """Orthogonalisations of one matrix in a step of two micro-steps at ZeRO-3."""
    calls = torch.zeros(1)
    original = original_muon.muon_update

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.add_(1)
        return original(*arguments, **options)

    config = muon_config(
        3, gradient_accumulation_steps=2, zero_optimization={"reduce_scatter": False}
    )
    original_muon.muon_update = counted
    try:
        with engine_of(Dial(), config) as engine:
            step_with(engine, [spread_matrix(), spread_matrix()])
    finally:
        original_muon.muon_update = original
    dist.all_reduce(calls)
    count = int(calls)
    assert count > 0, "Muon did not run at all"
    return Finding(count > 1, f"{count} orthogonalisations of one matrix in one step")


@probe_of("muon_reduce_scatter_zero3")
def reduce_scatter(work: Path) -> Finding:
    """ZeRO-3 with the default `reduce_scatter`."""
    try:
        with engine_of(Dial(), muon_config(3)):
            return Finding(False, "the engine starts")
    except ValueError as error:
        return Finding(True, f"ValueError: {error}")


@probe_of("muon_checkpoint_not_convertible")
def universal(work: Path) -> Finding:
    """DeepSpeed's own converter on DeepSpeed's own Muon checkpoint."""
    with engine_of(Dial(), muon_config(1)) as engine:
        step_with(engine, [spread_matrix()])
        engine.save_checkpoint(str(work / "muon"), tag="step1")
    failure = ""
    if dist.get_rank() == 0:
        failure = _convert(work / "muon" / "step1", work / "universal")
    dist.barrier()
    return Finding(bool(failure), failure or "the checkpoint converts")


def _convert(source: Path, target: Path) -> str:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=False,
        inject_missing_state=True,
    )
    try:
        ds_to_universal.main(arguments)
    except Exception as error:
        return f"the converter fails: {type(error).__name__}: {str(error)[:80]}"
    return ""
