"""Probes of DeepSpeed's checkpoints: what it writes, when it says so, what it accepts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epctl.launch.probe import Finding, probe_of
from epctl.launch.probe_engine import (
    NUM_EXPERTS,
    Dial,
    autoep_config,
    engine_config,
    engine_of,
    sgd,
    step_with,
    tiny_moe,
    train_moe_step,
)

LATE_SECONDS = 2.0


@probe_of("autoep_resume_other_ep")
def resume_other_ep(work: Path) -> Finding:
    """A ZeRO-1 checkpoint of EP 2 loaded into an engine of EP 1 on the same ranks."""
    with engine_of(tiny_moe(), autoep_config(1, 2)) as engine:
        train_moe_step(engine)
        engine.save_checkpoint(str(work))
    with engine_of(tiny_moe(), autoep_config(1, 1)) as engine:
        try:
            loaded, _ = engine.load_checkpoint(str(work))
        except Exception as error:
            return Finding(False, f"refused: {type(error).__name__}")
    return Finding(loaded is not None, "the checkpoint of EP 2 loads at EP 1 without a word")


@probe_of("latest_before_other_ranks")
def latest(work: Path) -> Finding:
    """Whether `latest` names a checkpoint of which rank 1 has not written its part."""
    with engine_of(Dial(), engine_config(1), sgd) as engine:
        step_with(engine, [torch.ones(8, 8)])
        named_early = False
        write = engine._save_zero_checkpoint

        def write_late(*arguments: Any) -> Any:
            nonlocal named_early
            deadline = time.monotonic() + LATE_SECONDS
            while time.monotonic() < deadline and not named_early:
                named_early = (work / "latest").exists()
                time.sleep(0.05)
            return write(*arguments)

        if dist.get_rank() == 1:
            engine._save_zero_checkpoint = write_late
        engine.save_checkpoint(str(work))
    seen = "before rank 1 wrote" if named_early else "after every rank wrote"
    return Finding(named_early, f"`latest` is written {seen}" if dist.get_rank() == 1 else "")


@probe_of("missing_latest_restarts")
def missing_latest(work: Path) -> Finding:
    """Loading from a folder without `latest`."""
    with engine_of(Dial(), engine_config(1), sgd) as engine:
        try:
            loaded, _ = engine.load_checkpoint(str(work / "nothing-here"))
        except Exception as error:
            return Finding(False, f"refused: {type(error).__name__}")
    return Finding(loaded is None, "load_checkpoint returns None and training starts from zero")


@probe_of("save_16bit_one_rank_of_experts")
def save_16bit(work: Path) -> Finding:
    """How many experts `save_16bit_model` writes at EP 2."""
    with engine_of(tiny_moe(), autoep_config(1, 2)) as engine:
        try:
            claimed = engine.save_16bit_model(str(work), "model.bin")
        except Exception as error:
            return Finding(False, f"refused: {type(error).__name__}")
    dist.barrier()
    weights = torch.load(work / "model.bin", weights_only=True)
    written = min(len(tensor) for name, tensor in weights.items() if ".experts.w" in name)
    seen = f"{written} of {NUM_EXPERTS} experts written, result {claimed}"
    return Finding(written < NUM_EXPERTS, seen)
