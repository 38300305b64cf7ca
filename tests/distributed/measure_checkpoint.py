"""Measures saving and resuming beside the disk's own copy rate; writes JSON, judges nothing.

`python tests/distributed/measure_checkpoint.py FOLDER` starts two gloo ranks (ZeRO-3, EP=2, Muon,
float32) over a model of 106 M parameters. Memory is what the kernel says of rank 0 (VmHWM).
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import run_ranks
from parity_ranks import case_config, tiny_config
from train_model_ranks import _reset_peak, _status

from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime import default_model
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint_manifest import find_damage, read_manifest
from epctl.runtime.checkpoint_progress import Progress
from epctl.runtime.checkpoint_save import Checkpointer
from epctl.runtime.checkpoint_shares import unit_bytes, units_of
from epctl.runtime.engine import create_engine, train_step
from epctl.runtime.events import EventLog
from epctl.runtime.leave import leave
from epctl.runtime.resume import restore
from epctl.runtime.weights import RandomWeights

SIZES = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 64}
NUM_SAVES = 3
COPY_BYTES = 1024**3
PIECE_BYTES = 16 * 2**20


class Described:
    """What a checkpoint asks of a TrainingModel."""

    name = "measured"
    revision = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def write_extras(self, folder: Path, dtype: torch.dtype) -> None:
        self.config.save_pretrained(folder)
        default_model.byte_tokenizer().save_pretrained(folder)


def copy_rate(folder: Path) -> float:
    """Returns GB/s of writing a gigabyte from memory and syncing it, by one writer."""
    piece = os.urandom(PIECE_BYTES)
    path = folder / "copy"
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(COPY_BYTES // PIECE_BYTES):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return COPY_BYTES / seconds / 1e9


def measure(folder: Path) -> dict[str, Any]:
    config = case_config({"ep": 2, "zero": 3}, dist.get_world_size())
    mesh = seams.create_mesh(2)
    ds_config = deepspeed_config(config, bfloat16=False, on_cpu=True)
    model_config = tiny_config(**SIZES)
    model = build_model(
        model_config, mesh, RandomWeights(seed=1), dtype=torch.float32,
        device=torch.device("cpu"), zero3_config=ds_config,
    )  # fmt: skip
    engine, optimizer, scheduler = create_engine(model, config, ds_config)
    described: Any = Described(model_config)
    events = EventLog(folder, mesh.rank)
    saver = Checkpointer(folder, config, mesh, engine, optimizer, described, events)
    ids = torch.randint(0, 64, (1, 64), generator=torch.Generator().manual_seed(mesh.rank))
    steps = {"quiet": [], "while saving": []}  # type: dict[str, list[float]]

    def step(kind: str) -> None:
        before = time.perf_counter()
        train_step(engine, scheduler, [ids], config, mesh)
        steps[kind].append(time.perf_counter() - before)

    step("quiet")
    step("quiet")
    largest = max(unit_bytes(unit) for unit in units_of(engine.module))
    rises: dict[str, list[int]] = {"copying": [], "writing": []}
    for number in range(NUM_SAVES):
        before = _reset_peak()
        saver.save(Progress(step=number + 1, rows=0, global_steps=number + 1))
        rises["copying"].append(_status("VmHWM") - before)
        before = _reset_peak()
        saver.finish()
        rises["writing"].append(_status("VmHWM") - before)
    held = saver._host.num_bytes
    saver.save(Progress(step=9, rows=0, global_steps=9))
    step("while saving")
    saver.finish()
    checkpoint = folder / "checkpoints" / "step-0000009"
    dist.barrier()
    started = time.perf_counter()
    names = sorted(read_manifest(checkpoint).files)
    assert find_damage(checkpoint, read_manifest(checkpoint), names[mesh.rank :: 2]) is None
    dist.barrier()
    verified = time.perf_counter() - started
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 99})})
    peak = _reset_peak()
    started = time.perf_counter()
    _, num_bytes = restore(checkpoint, config, mesh, engine, optimizer, scheduler)
    dist.barrier()
    restored = time.perf_counter() - started
    copies = [copy_rate(folder) for _ in range(3)] if mesh.rank == 0 else []
    dist.barrier()
    manifest = read_manifest(checkpoint)
    return {
        "checkpoint_bytes": manifest.num_bytes,
        "host_copy_bytes": held,
        "largest_live_tensor_bytes": largest,
        "peak_rise_bytes": rises,
        "restore_rise_bytes": _status("VmHWM") - peak,
        "step_seconds": steps,
        "verify_gb_s": manifest.num_bytes / verified / 1e9,
        "restore_gb_s": 2 * num_bytes / restored / 1e9,
        "copy_gb_s": copies,
    }


def main(folder: Path) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=600))
    result = measure(folder)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(Path(sys.argv[1]))
        leave(0)
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    found = run_ranks("measure_checkpoint", 2, where, timeout=1200)[0]
    lines = map(json.loads, (where / "metrics.jsonl").read_text().splitlines())
    found["saves"] = [line for line in lines if line["event"] == "checkpoint"]
    found["load"] = os.getloadavg()
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
