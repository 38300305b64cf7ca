"""Ranks of the tests of `epctl train MODEL`: load, resume, partial training and check, by name.

`python -m train_model_ranks FOLDER PROGRAM CASES_JSON`: PROGRAM is a function below that turns a
case into a result; rank K writes `rank-K.json`.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epctl.config import RunConfig, resolve_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.checkpoint_save import Checkpointer
from epctl.runtime.data_batch import PackedData
from epctl.runtime.data_packing import PackedRows, stream_spans
from epctl.runtime.engine import create_engine, train_step
from epctl.runtime.events import EventLog
from epctl.runtime.leave import leave
from epctl.runtime.names import hub_tensors
from epctl.runtime.resume import restore
from epctl.runtime.train import build
from epctl.runtime.train_loop import TrainLoop
from epctl.runtime.training_model import TrainingModel, load_tokenizer, open_checkpoint

CPU = torch.device("cpu")
LENGTH = 24


def case_config(case: dict[str, Any]) -> RunConfig:
    flags = {
        "parallel.ep": case["ep"],
        "parallel.zero": case["zero"],
        "optim.name": case.get("optim", "muon"),
        "optim.lr": 2e-3,
        "optim.warmup_steps": 1,
        "optim.gradient_clipping": 0.5,
        "train.steps": case.get("steps", 4),
        "train.sequence_length": LENGTH,
        "train.micro_batch_size": 2,
        "train.report_every": 1,
        "train.eval_batches": 1,
        **case.get("flags", {}),
    }
    return resolve_config(flags=flags).config


def open_model(folder: str | Path) -> TrainingModel:
    tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    return open_checkpoint("tiny", Path(folder), tokenizer)


class RandomDocuments:
    """Documents of uneven length with ids that depend on their number alone."""

    def __init__(self, count: int = 40) -> None:
        import numpy as np

        generator = np.random.default_rng(5)
        self.lengths = generator.integers(3, 50, count)
        self._ids = [generator.integers(0, 256, size) for size in self.lengths]

    def tokens(self, document: int, start: int, stop: int) -> Any:
        import numpy as np

        ids = self._ids[document][start:stop]
        return ids, np.ones(len(ids), dtype=bool)


def packed_data(seed: int = 3) -> PackedData:
    documents = RandomDocuments()
    rows = PackedRows(documents, stream_spans(documents.lengths, LENGTH), LENGTH, pad_id=0)
    train, held_out = rows.split_tail(0.2)
    return PackedData(train, held_out, seed, shuffle=True)


def digest_of(module: torch.nn.Module) -> dict[str, str]:
    """Digests of every checkpoint tensor of this rank, gathered one by one at ZeRO-3."""
    result = {}
    for tensor in hub_tensors(module):
        parameters = [tensor.tensor] if isinstance(tensor.tensor, torch.nn.Parameter) else []
        with seams.full_parameters(parameters):
            local = tensor.local().detach().contiguous().view(-1).view(torch.uint8)
            result[tensor.name] = hashlib.sha256(local.numpy().tobytes()).hexdigest()
    return result


def state_digest(engine: Any, optimizer: Any) -> str:
    hasher = hashlib.sha256()
    for partition in seams.flat_partitions(engine):
        hasher.update(partition.flat.detach().view(-1).view(torch.uint8).numpy().tobytes())
        for _, value in sorted(optimizer.state[partition.flat].items()):
            if isinstance(value, torch.Tensor):
                raw = value.detach().reshape(-1).contiguous().view(torch.uint8)
                hasher.update(raw.numpy().tobytes())
    return hasher.hexdigest()


# --- programs ---------------------------------------------------------------------------------


def first_loss(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Loads the checkpoint and takes one step on a global batch that the test knows."""
    config = case_config(case)
    mesh = seams.create_mesh(config.parallel.ep)
    model = open_model(case["model"])
    events = EventLog(folder, mesh.rank)
    module, ds_config = build(config, mesh, model, CPU, events)
    engine, optimizer, scheduler = create_engine(module, config, ds_config)
    rates = [group["lr"] for group in optimizer.param_groups]
    ids = torch.randint(0, 256, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    batches = list(ids.chunk(mesh.num_ranks)[mesh.rank].split(2))
    loss, norm = train_step(engine, scheduler, batches, config, mesh)
    rates += [group["lr"] for group in optimizer.param_groups]
    counts = vars(model.weights.counts)  # type: ignore[attr-defined]
    read = sorted(model.weights.read)  # type: ignore[attr-defined]
    engine.destroy()
    return {
        "loss": loss,
        "norm": norm,
        "read": read,
        "notes": model.notes,
        "rates": rates,
        **counts,
    }


def peak_memory(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measures how far resident memory rises above what it was before the model is opened."""
    config = case_config(case)
    mesh = seams.create_mesh(config.parallel.ep)
    model = open_model(case["model"])
    gc.collect()
    before = _reset_peak()
    module, _ = build(config, mesh, model, CPU, EventLog(folder, mesh.rank))
    peak = _status("VmHWM")
    held = sum(
        (p.ds_tensor if hasattr(p, "ds_tensor") else p).numel() * p.element_size()
        for p in module.parameters()
    )
    return {"rise": peak - before, "share": held}


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def resume(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """2k steps unbroken, and k steps, a checkpoint, everything anew, k steps."""
    config = case_config(case)
    half = config.train.steps // 2
    unbroken = _Run(case, config, folder / "unbroken")
    unbroken.loop.run()
    random_state = _random_state()
    first = _Run(case, config, folder / "broken")
    first.loop.config = _with_steps(config, half)
    first.loop.run()
    saved = first.checkpointer.save(first.loop.progress())
    first.checkpointer.finish()
    first.engine.destroy()
    torch.manual_seed(99)
    second = _Run(case, config, folder / "broken", weights_from=saved / "model")
    second.go_on_from(saved)
    assert second.loop.first_step == half
    second.loop.run()
    result = {
        "weights": [digest_of(r.engine.module) for r in (unbroken, second)],
        "state": [state_digest(r.engine, r.optimizer) for r in (unbroken, second)],
        "random": [random_state, _random_state()],
        "rows": [unbroken.data.drawn, first.data.drawn + second.data.drawn],
        "metrics": [_losses(folder / name) for name in ("unbroken", "broken")],
    }
    for run in (unbroken, second):
        run.engine.destroy()
    return result


class _RecordingData(PackedData):
    """Remembers which rows were drawn."""

    drawn: list[int]

    def train_batch(self, first: int, count: int) -> Any:
        self.drawn += [self.order.row_at(first + n) for n in range(count)]
        torch.rand(1)  # something in a run may draw random numbers; its state must come back
        return super().train_batch(first, count)


class _Run:
    def __init__(
        self,
        case: dict[str, Any],
        config: RunConfig,
        run_folder: Path,
        weights_from: Path | None = None,
    ) -> None:
        run_folder.mkdir(exist_ok=True, parents=True)
        torch.manual_seed(config.train.seed)
        mesh = seams.create_mesh(config.parallel.ep)
        model = open_model(weights_from or case["model"])
        events = EventLog(run_folder, mesh.rank)
        module, ds_config = build(config, mesh, model, CPU, events)
        self.engine, self.optimizer, scheduler = create_engine(module, config, ds_config)
        source = packed_data()
        self.data = _RecordingData(source.train, source.held_out, 3, shuffle=True)
        self.data.drawn = []
        self.checkpointer = Checkpointer(
            run_folder, config, mesh, self.engine, self.optimizer, model, events
        )
        self.loop = TrainLoop(
            self.engine, scheduler, config, mesh, self.data, events, model.tokenizer
        )

    def go_on_from(self, saved: Path) -> None:
        loop = self.loop
        progress, _ = restore(
            saved, loop.config, loop.mesh, self.engine, self.optimizer, loop.scheduler
        )
        loop.begin_at(progress)


def _random_state() -> str:
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def _losses(folder: Path) -> list[tuple[int, float, float, float]]:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(e["step"], e["loss"], e["grad_norm"], e["lr"]) for e in events if e["event"] == "step"]


def partial(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains what `train.parameters` names; says what changed and what has optimizer state."""
    config = case_config(case)
    mesh = seams.create_mesh(config.parallel.ep)
    model = open_model(case["model"])
    module, ds_config = build(config, mesh, model, CPU, EventLog(folder, mesh.rank))
    engine, _, scheduler = create_engine(module, config, ds_config)
    before = digest_of(engine.module)
    data = packed_data()
    loop = TrainLoop(
        engine, scheduler, config, mesh, data, EventLog(folder, mesh.rank), model.tokenizer
    )
    for step in range(2):
        train_step(engine, scheduler, list(loop.batches(step)), config, mesh)
    after = digest_of(engine.module)
    with_state = {
        id(fragment.parameter)
        for partition in seams.flat_partitions(engine)
        for fragments in partition.fragments_by_rank
        for fragment in fragments
    }
    names = {t.name for t in hub_tensors(engine.module) if id(t.tensor) in with_state}
    engine.destroy()
    return {
        "changed": sorted(name for name in before if before[name] != after[name]),
        "with_state": sorted(names),
    }


PROGRAMS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "first_loss": first_loss,
    "peak_memory": peak_memory,
    "resume": resume,
    "partial": partial,
}


def main(folder: Path, program: str, cases: list[dict[str, Any]]) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=90))
    results = {}
    for case in cases:
        case_folder = folder / case["name"]
        case_folder.mkdir(exist_ok=True)
        results[case["name"]] = PROGRAMS[program](case, case_folder)
        gc.collect()
    rank = dist.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    leave(0)
