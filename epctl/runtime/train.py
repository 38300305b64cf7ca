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
from epctl.errors import GateError
from epctl.launch.ds_config import deepspeed_config
from epctl.launch.plan_train import compared, read_prediction
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import checkpoint_bytes, save_model
from epctl.runtime.checkpoint_save import Checkpointer
from epctl.runtime.data import ByteData, standard_library_corpus
from epctl.runtime.data_batch import TrainingData
from epctl.runtime.data_prepare import load_data
from epctl.runtime.disk_space import bytes_to_write, require_disk_space, sum_over_ranks
from epctl.runtime.engine import count_state_bytes, create_engine
from epctl.runtime.events import EventLog
from epctl.runtime.guards import StepGuard
from epctl.runtime.load import CheckpointWeights
from epctl.runtime.mesh import Mesh
from epctl.runtime.profile import StepProfiler, require_steps_to_profile
from epctl.runtime.ranges import watch_with_nvtx
from epctl.runtime.recompute import set_up_recomputation
from epctl.runtime.report import max_over_ranks, peak_memory, plan_of
from epctl.runtime.restart import Beginning, find_beginning, put_rejected_aside
from epctl.runtime.resume import restore
from epctl.runtime.run_checkpoints import MODEL_FOLDER, committed_checkpoints
from epctl.runtime.run_settings import choose_device, num_steps
from epctl.runtime.stop_request import StopRequest
from epctl.runtime.train_loop import RunStopped, TrainLoop
from epctl.runtime.training_model import TrainingModel, check_bytes, open_training_model
from epctl.runtime.versions import require_equal_versions
from epctl.runtime.watchdog import Watchdog


def train(run_folder: Path) -> None:
    """Trains as `config.json` of the run folder says; every rank calls it."""
    started = time.time()
    config = ResolvedConfig.from_json((run_folder / "config.json").read_text("utf-8")).config
    device, mesh = start_rank(config)
    events = EventLog(run_folder, mesh.rank)
    events.write("start", epctl=__version__, torch=torch.__version__, ranks=mesh.num_ranks)

    stop = StopRequest()
    beginning = begin(config, run_folder, events)
    model_folder = beginning.checkpoint / MODEL_FOLDER if beginning.checkpoint else None
    model = open_training_model(config, run_folder, weights_from=model_folder)
    data = open_data(config, run_folder, mesh, model, events)
    steps = num_steps(config.train, mesh, data.num_train_rows)
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    module, ds_config = build(config, mesh, model, device, events)
    engine, optimizer, scheduler = create_engine(module, config, ds_config)
    state = count_state_bytes(engine, optimizer)
    state_bytes = sum_over_ranks(state.masters + state.optimizer_state, device)
    model_bytes = checkpoint_bytes(module, mesh)
    require_disk_space(run_folder, bytes_to_write(config, model_bytes, state_bytes))
    checkpointer = Checkpointer(run_folder, config, mesh, engine, optimizer, model, events)
    limit = 60 * config.guards.stall_minutes
    watchdog = Watchdog(run_folder, mesh.rank, mesh.num_ranks, limit)
    loop = TrainLoop(
        engine, scheduler, config, mesh, data, events, model.tokenizer,
        checkpointer=checkpointer, stop=stop, watchdog=watchdog,
    )  # fmt: skip
    losses = go_on(loop, beginning, optimizer, events)
    if config.run.profile:
        require_steps_to_profile(config.train.steps, loop.first_step)
        loop.profiler = StepProfiler(run_folder / "profile", mesh.rank, device, loop.first_step)
    loop.guard = StepGuard(engine, config.guards, losses, events.write)
    facts = plan_of(config, mesh, engine, optimizer, model)
    events.write("plan", **facts, first_step=loop.first_step)
    stop.install()
    watchdog.start()
    try:
        train_and_evaluate(loop)
    except RunStopped:
        end_early(loop, events)
    else:
        checkpointer.finish()
        watchdog.stop()
        if config.run.save:
            _save(engine.module, mesh, run_folder / "model", model, events)
        compare_memory(run_folder, device, events)
        if loop.routing.choices:
            events.write("experts", step=loop.step, choices=loop.routing.choices)
        events.write("done", seconds=round(time.time() - started, 2))
    finish_rank(events)


def compare_memory(run_folder: Path, device: torch.device, events: EventLog) -> None:
    """Writes the predicted peak beside the highest that a rank measured."""
    measured = max_over_ranks(peak_memory(device), device)
    foreseen = read_prediction(run_folder)
    if foreseen is not None:
        events.write("memory", **compared(foreseen, measured))


def begin(config: RunConfig, run_folder: Path, events: EventLog) -> Beginning:
    """Returns where the run begins; says what was found wrong with its checkpoints."""
    beginning = find_beginning(run_folder, required=config.run.resume is not None)
    for note in beginning.notes:
        events.write("warning", text=note)
    return beginning


def go_on(
    loop: TrainLoop, beginning: Beginning, optimizer: torch.optim.Optimizer, events: EventLog
) -> list[float]:
    """Puts the run where its checkpoint stands; returns the losses the spike guard remembers."""
    if beginning.checkpoint is None:
        return []
    before = time.perf_counter()
    progress, num_bytes = restore(
        beginning.checkpoint, loop.config, loop.mesh, loop.engine, optimizer, loop.scheduler
    )
    loop.begin_at(progress)
    put_rejected_aside(beginning)
    total = sum_over_ranks(num_bytes, loop.engine.device)
    events.write(
        "resumed",
        step=progress.step,
        checkpoint=str(beginning.checkpoint),
        rejected=beginning.rejected,
        bytes=total,
        seconds=round(time.perf_counter() - before, 4),
    )
    return progress.losses


def train_and_evaluate(loop: TrainLoop) -> None:
    """Runs the whole loop; saves that are on their way end even where a guard stops the run."""
    try:
        loop.evaluate("before", loop.first_step)
        loop.sample("before")
        loop.run()
        loop.evaluate("after", loop.config.train.steps)
        loop.sample("after")
    except GateError:
        if loop.checkpointer is not None:
            loop.checkpointer.finish()
        raise


def end_early(loop: TrainLoop, events: EventLog) -> None:
    """Saves one checkpoint of the last finished step, if there is none, and says how it ended."""
    saved: str | None = None
    has_state = loop.config.optim.name != "deepspeed-muon"
    if loop.config.checkpoint.grace_seconds and loop.checkpointer is not None and has_state:
        loop.save_checkpoint()
        loop.checkpointer.finish()
        newest = committed_checkpoints(loop.checkpointer.run_folder)
        saved = str(newest[-1]) if newest else None
    if loop.watchdog is not None:
        loop.watchdog.stop()
    events.write("stopped", step=loop.step, checkpoint=saved)


def start_rank(config: RunConfig) -> tuple[torch.device, Mesh]:
    """Seeds, starts torch.distributed and returns this rank's device and place."""
    device = choose_device(config)
    torch.manual_seed(config.train.seed)
    timeout = datetime.timedelta(minutes=config.parallel.timeout_minutes)
    seams.initialize_distributed(device.type, timeout)
    require_equal_versions()
    watch_with_nvtx()
    return device, seams.create_mesh(config.parallel.ep, config.parallel.sp)


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
    data, facts = load_data(
        config, run_folder / "data", mesh, model.tokenizer, model.vocab_size, model.visual
    )
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
    set_up_recomputation(module, config)
    return module, ds_config


def _save(
    module: nn.Module, mesh: Mesh, folder: Path, model: TrainingModel, events: EventLog
) -> None:
    dtype = next(module.parameters()).dtype
    started = time.perf_counter()
    num_bytes = save_model(module, mesh, folder, lambda path: model.write_extras(path, dtype))
    seconds = time.perf_counter() - started
    events.write("saved", folder=str(folder), bytes=num_bytes, seconds=round(seconds, 2))
