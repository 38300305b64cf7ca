"""Ranks of the memory tests: what a tiny model's engine really allocates, case by case.

Called as `python -m memory_ranks FOLDER CASES_JSON`; rank K writes `rank-K.json` with the bytes of
every case. Counted are storages, each once, whatever the number of tensors that look at it.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_ranks import tiny_config

from epctl.config import RunConfig, resolve_config
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import build_model
from epctl.runtime.data_batch import Batch
from epctl.runtime.engine import count_state_bytes, create_engine
from epctl.runtime.leave import leave
from epctl.runtime.weights import RandomWeights

# A bucket is known by its size: no tensor of the tiny model has so many elements.
BUCKET_ELEMENTS = 50_021


def case_config(case: dict[str, Any]) -> RunConfig:
    flags = {
        "parallel.ep": case["ep"],
        "parallel.zero": case["zero"],
        "optim.name": case["optim"],
        "optim.offload": case["offload"],
        "train.parameters": case.get("train", "all"),
        "train.precision": case["precision"],
        "train.gradient_accumulation_steps": case.get("accumulation", 1),
    }
    return resolve_config(flags=flags).config


def engine_config(config: RunConfig, precision: str) -> dict[str, Any]:
    document = deepspeed_config(config, bfloat16=precision == "bfloat16", on_cpu=True)
    document["zero_optimization"]["reduce_bucket_size"] = BUCKET_ELEMENTS
    return document


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Returns the bytes of each storage behind the tensors, by its address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def live() -> dict[int, int]:
    """Returns every storage that Python can reach."""
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
    return storages(tensors + [t.grad for t in tensors if t.is_leaf and t.grad is not None])


def count(case: dict[str, Any]) -> dict[str, int]:
    config = case_config(case)
    mesh = seams.create_mesh(config.parallel.ep)
    document = engine_config(config, case["precision"])
    dtype = torch.bfloat16 if case["precision"] == "bfloat16" else torch.float32
    before = live()
    model = build_model(
        tiny_config(), mesh, RandomWeights(seed=1, std=0.08), dtype=dtype,
        device=torch.device("cpu"), zero3_config=document if config.parallel.zero == 3 else None,
        trainable=config.train.parameters,
    )  # fmt: skip
    buffers = storages(model.buffers())
    engine, optimizer, _ = create_engine(model, config, document)
    parameters = storages(getattr(p, "ds_tensor", p) for p in engine.module.parameters())
    flats = [partition.flat for partition in seams.flat_partitions(engine)]
    masters = {k: v for k, v in storages(flats).items() if k not in parameters}
    state = storages(
        v for flat in flats for v in optimizer.state[flat].values() if torch.is_tensor(v) and v.ndim
    )
    told = count_state_bytes(engine, optimizer)
    batch = Batch.of_ids(torch.randint(0, 64, (2, 24)))
    accumulation = config.train.gradient_accumulation_steps
    # The first step is not like the others: ZeRO-3 keeps small Parameters whole after it.
    for micro_step in range(2 * accumulation):
        result = engine(**batch.model_inputs(), num_items_in_batch=torch.tensor(46.0))
        engine.backward(result.loss)
        if micro_step < 2 * accumulation - 1:
            engine.step()
    del result
    gc.collect()
    known = (before, buffers, parameters, masters, state, storages([batch.ids_BS]))
    rest = {k: v for k, v in live().items() if not any(k in part for part in known)}
    bucket = {k: v for k, v in rest.items() if v in (2 * BUCKET_ELEMENTS, 4 * BUCKET_ELEMENTS)}
    engine.step()
    engine.destroy()
    return {
        "parameters": sum(parameters.values()),
        "masters": sum(masters.values()),
        "state": sum(state.values()),
        "gradients": sum(v for k, v in rest.items() if k not in bucket),
        "buckets": sum(bucket.values()),
        "told": told.total,
    }


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=60))
    results = {}
    for case in cases:
        results[case["name"]] = count(case)
        gc.collect()
    path = folder / f"rank-{os.environ['RANK']}.json"
    path.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    leave(0)
