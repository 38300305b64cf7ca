"""The program every rank runs, started by `epctl.runtime.worker` under torchrun.

Linear, readable top to bottom: place, build, prove, train, evaluate, save.
"""

from __future__ import annotations

import datetime
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from epctl import __version__
from epctl.config import ResolvedConfig, RunConfig
from epctl.errors import ConfigError
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import data, default_model
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import check_disk_space, checkpoint_bytes, save_model
from epctl.runtime.engine import count_state_bytes, create_engine, train_step
from epctl.runtime.evaluate import held_out_loss, sample_continuation
from epctl.runtime.events import EventLog
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe import Router
from epctl.runtime.names import hub_tensors
from epctl.runtime.parameter_groups import count_split
from epctl.runtime.weights import RandomWeights

PROMPT_BYTES = 64


def train(run_folder: Path) -> None:
    """Trains as `config.json` of the run folder says; every rank calls it."""
    started = time.time()
    config = ResolvedConfig.from_json((run_folder / "config.json").read_text("utf-8")).config
    device = _device(config)
    torch.manual_seed(config.train.seed)
    timeout = datetime.timedelta(minutes=config.parallel.timeout_minutes)
    seams.initialize_distributed(device.type, timeout)
    mesh = seams.create_mesh(config.parallel.ep)
    events = EventLog(run_folder, mesh.rank)
    events.write("start", epctl=__version__, torch=torch.__version__, ranks=mesh.num_ranks)

    bfloat16 = _uses_bfloat16(config, device)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    ds_config = deepspeed_config(config, bfloat16=bfloat16, on_cpu=device.type == "cpu")
    model_config = default_model.default_config()
    swap = config.moe.implementation == "epctl"
    model = build_model(
        model_config,
        mesh,
        RandomWeights(config.train.seed),
        dtype=dtype,
        device=device,
        zero3_config=ds_config if config.parallel.zero == 3 and swap else None,
        swap=swap,
    )
    if config.run.save:
        check_disk_space(run_folder, checkpoint_bytes(model, mesh))
    engine, optimizer, scheduler = create_engine(model, config, ds_config)
    events.write("plan", **_plan(config, mesh, engine, optimizer, model_config, device, dtype))

    corpus = data.standard_library_corpus()
    _report_quality("before", engine, config, mesh, corpus, events)
    _train(engine, scheduler, config, mesh, corpus, events)
    _report_quality("after", engine, config, mesh, corpus, events)
    if config.run.save:
        _save(engine, mesh, run_folder, model_config, events)
    events.write("done", seconds=round(time.time() - started, 2))
    dist.barrier()
    events.close()
    dist.destroy_process_group()


def _train(
    engine: Any,
    scheduler: Any,
    config: RunConfig,
    mesh: Mesh,
    corpus: data.ByteCorpus,
    events: EventLog,
) -> None:
    settings = config.train
    tokens = (
        settings.micro_batch_size
        * settings.sequence_length
        * settings.gradient_accumulation_steps
        * mesh.num_ranks
    )
    last_report = time.perf_counter()
    since_report = 0
    for step in range(settings.steps):
        batches = list(_step_batches(config, mesh, corpus, step))
        loss, norm = train_step(engine, scheduler, batches, config, mesh)
        since_report += 1
        if (step + 1) % settings.report_every == 0 or step + 1 in (1, settings.steps):
            now = time.perf_counter()
            seconds = (now - last_report) / since_report
            events.write(
                "step",
                step=step + 1,
                loss=round(loss, 6),
                grad_norm=round(norm, 6),
                lr=scheduler.get_last_lr()[0],
                seconds_per_step=round(seconds, 4),
                tokens_per_second=round(tokens / seconds, 1),
                tokens=tokens * (step + 1),
                memory_bytes=_peak_memory(engine.device),
                expert_load=round(_expert_load(engine), 3),
            )
            last_report, since_report = now, 0


def _step_batches(
    config: RunConfig, mesh: Mesh, corpus: data.ByteCorpus, step: int
) -> Iterator[torch.Tensor]:
    """Yields this rank's micro-batches: the global batch depends on the step alone."""
    train = config.train
    for micro_step in range(train.gradient_accumulation_steps):
        block = step * train.gradient_accumulation_steps + micro_step
        first = (block * mesh.num_ranks + mesh.rank) * train.micro_batch_size
        yield data.sample_batch(
            corpus.train, first, train.micro_batch_size, train.sequence_length, train.seed
        )


def _held_out_batches(
    config: RunConfig, mesh: Mesh, corpus: data.ByteCorpus
) -> Iterator[torch.Tensor]:
    train = config.train
    for batch in range(train.eval_batches):
        first = (batch * mesh.num_ranks + mesh.rank) * train.micro_batch_size
        yield data.sample_batch(
            corpus.held_out, first, train.micro_batch_size, train.sequence_length, seed=0
        )


def _report_quality(
    when: str,
    engine: Any,
    config: RunConfig,
    mesh: Mesh,
    corpus: data.ByteCorpus,
    events: EventLog,
) -> None:
    """Writes held-out loss and a sampled continuation of a held-out prompt."""
    loss = held_out_loss(engine, _held_out_batches(config, mesh, corpus))
    events.write("eval", when=when, loss=round(loss, 6))
    if config.train.sample_tokens:
        prompt = corpus.held_out[:PROMPT_BYTES].tolist()
        ids = sample_continuation(
            engine, prompt, config.train.sample_tokens, seed=config.train.seed
        )
        events.write("sample", when=when, prompt=_text(prompt), text=_text(ids))


def _text(ids: list[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def _save(engine: Any, mesh: Mesh, run_folder: Path, model_config: Any, events: EventLog) -> None:
    folder = run_folder / "model"

    def write_extras(staging: Path) -> None:
        from transformers import GenerationConfig

        model_config.dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
        model_config.save_pretrained(staging)
        GenerationConfig.from_model_config(model_config).save_pretrained(staging)
        default_model.byte_tokenizer().save_pretrained(staging)

    started = time.perf_counter()
    num_bytes = save_model(engine.module, mesh, folder, write_extras)
    seconds = time.perf_counter() - started
    events.write("saved", folder=str(folder), bytes=num_bytes, seconds=round(seconds, 2))


def _plan(
    config: RunConfig,
    mesh: Mesh,
    engine: Any,
    optimizer: Any,
    model_config: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Returns what is about to run, counted from the live model."""
    split = count_split(engine.module, config.optim, mesh.ep_size)
    state = count_state_bytes(engine, optimizer)
    sizes = {"expert": 0, "dense": 0}
    for tensor in hub_tensors(engine.module):
        if isinstance(tensor.tensor, torch.nn.Parameter):  # the correction bias is a buffer
            sizes["expert" if tensor.is_expert else "dense"] += tensor.num_elements
    total = sizes["dense"] + sizes["expert"] * mesh.ep_size
    return {
        "model": default_model.NAME,
        "architecture": type(engine.module).__name__,
        "num_layers": model_config.num_hidden_layers,
        "num_experts": model_config.n_routed_experts,
        "top_k": model_config.num_experts_per_tok,
        "route_scale": model_config.routed_scaling_factor,
        "num_parameters": total,
        "num_parameters_rank": sizes["dense"] + sizes["expert"],
        "num_expert_parameters_rank": sizes["expert"],
        "num_local_experts": mesh.num_local_experts(model_config.n_routed_experts),
        "num_muon": split.num_muon,
        "num_muon_matrices": split.num_muon_matrices,
        "num_adamw": split.num_adamw,
        "num_ranks": mesh.num_ranks,
        "ep": mesh.ep_size,
        "edp": mesh.edp_size,
        "zero": config.parallel.zero,
        "device": device.type,
        "backend": dist.get_backend(),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_parameters": state.parameters,
        "bytes_masters": state.masters,
        "bytes_optimizer_state": state.optimizer_state,
        "steps": config.train.steps,
    }


def _expert_load(engine: Any) -> float:
    """Returns the largest ratio max/mean of routed tokens over layers since the last report."""
    routers = [m for m in engine.module.modules() if isinstance(m, Router)]
    if not routers:
        return float("nan")
    counts_LE = torch.stack([cast(torch.Tensor, m.tokens_per_expert) for m in routers])
    dist.all_reduce(counts_LE)
    for router in routers:
        cast(torch.Tensor, router.tokens_per_expert).zero_()
    means_L = counts_LE.double().mean(dim=1).clamp_min(1e-9)
    return float((counts_LE.amax(dim=1) / means_L).max())


def _peak_memory(device: torch.device) -> int:
    """Returns this rank's peak bytes: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device(config: RunConfig) -> torch.device:
    wanted = config.parallel.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU", hint="use `--device cpu`")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _uses_bfloat16(config: RunConfig, device: torch.device) -> bool:
    precision = config.train.precision
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
