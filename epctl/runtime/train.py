"""The program every rank runs, started by `epctl.runtime.worker` under torchrun.

Linear, readable top to bottom: place, build, prove, train, evaluate, save.
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from epctl import __version__
from epctl.config import ResolvedConfig, RunConfig
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import checkpoint_bytes, save_model
from epctl.runtime.data import ByteData, standard_library_corpus
from epctl.runtime.data_batch import TrainingData
from epctl.runtime.data_prepare import load_data
from epctl.runtime.disk_space import bytes_to_write, require_disk_space, sum_over_ranks
from epctl.runtime.engine import count_state_bytes, create_engine
from epctl.runtime.events import EventLog
from epctl.runtime.load import CheckpointWeights
from epctl.runtime.mesh import Mesh
from epctl.runtime.profile import StepProfiler, require_steps_to_profile
from epctl.runtime.recompute import checkpoint_activations
from epctl.runtime.report import plan_of
from epctl.runtime.restart import first_checkpoint
from epctl.runtime.resume import Checkpointer
from epctl.runtime.run_settings import choose_device, num_steps
from epctl.runtime.train_loop import TrainLoop
from epctl.runtime.training_model import TrainingModel, check_bytes, open_training_model
from epctl.runtime.versions import require_equal_versions


def train(run_folder: Path) -> None:
    """Trains as `config.json` of the run folder says; every rank calls it."""
    started = time.time()
    config = ResolvedConfig.from_json((run_folder / "config.json").read_text("utf-8")).config
    device, mesh = start_rank(config)
    events = EventLog(run_folder, mesh.rank)
    events.write("start", epctl=__version__, torch=torch.__version__, ranks=mesh.num_ranks)

    asked = Path(config.run.resume) if config.run.resume is not None else None
    resume = first_checkpoint(run_folder, asked)
    model = open_training_model(config, run_folder, weights_from=resume)
    data = open_data(config, run_folder, mesh, model, events)
    steps = num_steps(config.train, mesh, data.num_train_rows)
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    module, ds_config = build(config, mesh, model, device, events)
    engine, optimizer, scheduler = create_engine(module, config, ds_config)
    state = count_state_bytes(engine, optimizer)
    state_bytes = sum_over_ranks(state.masters + state.optimizer_state, device)
    model_bytes = checkpoint_bytes(module, mesh)
    require_disk_space(run_folder, bytes_to_write(config.run, model_bytes, state_bytes))
    checkpointer = Checkpointer(run_folder, config, mesh, engine, optimizer, scheduler, model)
    first_step = checkpointer.restore(resume) if resume is not None else 0
    events.write("plan", **plan_of(config, mesh, engine, optimizer, model), first_step=first_step)

    def save_checkpoint(step: int) -> None:
        folder = checkpointer.save(step)
        events.write("checkpoint", step=step, folder=str(folder))

    loop = TrainLoop(
        engine, scheduler, config, mesh, data, events, model.tokenizer, save_checkpoint
    )
    if config.run.profile:
        loop.profiler = StepProfiler(run_folder / "profile", mesh.rank, device, first_step)
        require_steps_to_profile(config.train.steps, first_step)
    loop.evaluate("before", first_step)
    loop.sample("before")
    loop.run(first_step)
    loop.evaluate("after", config.train.steps)
    loop.sample("after")
    if config.run.save:
        _save(engine.module, mesh, run_folder / "model", model, events)
    events.write("done", seconds=round(time.time() - started, 2))
    finish_rank(events)


def start_rank(config: RunConfig) -> tuple[torch.device, Mesh]:
    """Seeds, starts torch.distributed and returns this rank's device and place."""
    device = choose_device(config)
    torch.manual_seed(config.train.seed)
    timeout = datetime.timedelta(minutes=config.parallel.timeout_minutes)
    seams.initialize_distributed(device.type, timeout)
    require_equal_versions()
    return device, seams.create_mesh(config.parallel.ep)


def finish_rank(events: EventLog) -> None:
    """Waits for the other ranks and leaves."""
    dist.barrier()
    events.close()
    dist.destroy_process_group()


def open_data(
    config: RunConfig, run_folder: Path, mesh: Mesh, model: TrainingModel, events: EventLog
) -> TrainingData:
    """Returns the run's data: what `[data]` names, or bytes for the embedded model."""
    if config.model.reference is None and not config.data.train:
        corpus = standard_library_corpus()
        return ByteData(corpus, config.train.sequence_length, config.train.seed)
    vocab_size = model.config.vocab_size
    data, facts = load_data(config, run_folder / "data", mesh, model.tokenizer, vocab_size)
    events.write("data", **vars(facts))
    return data


def build(
    config: RunConfig, mesh: Mesh, model: TrainingModel, device: torch.device, events: EventLog
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns (the module with this rank's share of the weights, the DeepSpeed config)."""
    bfloat16 = config.train.uses_bfloat16(device.type)
    ds_config = deepspeed_config(config, bfloat16=bfloat16, on_cpu=device.type == "cpu")
    swap = config.moe.implementation == "epctl"
    started = time.perf_counter()
    if isinstance(model.weights, CheckpointWeights):
        model.weights.restart()
    module = build_model(
        model.config,
        mesh,
        model.weights,
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
        device=device,
        zero3_config=ds_config if config.parallel.zero == 3 and swap else None,
        swap=swap,
        trainable=config.train.parameters,
    )
    if isinstance(model.weights, CheckpointWeights):
        model.weights.close()
        check_bytes(module, model.weights)
        seconds = round(time.perf_counter() - started, 2)
        counts = vars(model.weights.counts)
        events.write("loaded", **counts, seconds=seconds, notes=model.notes)
    checkpoint_activations(module, config.train.activation_checkpointing)
    return module, ds_config


def _save(
    module: nn.Module, mesh: Mesh, folder: Path, model: TrainingModel, events: EventLog
) -> None:
    dtype = next(module.parameters()).dtype
    started = time.perf_counter()
    num_bytes = save_model(module, mesh, folder, lambda path: model.write_extras(path, dtype))
    seconds = time.perf_counter() - started
    events.write("saved", folder=str(folder), bytes=num_bytes, seconds=round(seconds, 2))
