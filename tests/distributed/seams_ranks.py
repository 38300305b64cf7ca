"""Ranks of the seam tests: what epctl assumes of DeepSpeed 0.19.8, asked of the live engine."""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from parity_ranks import case_config, rank_batches, tiny_config
from torch import nn
from torch.nn import functional

from epctl.errors import ConfigError, ResourceError
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_gradients
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime import engine as engine_module
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import save_model
from epctl.runtime.engine import create_engine, train_step
from epctl.runtime.leave import leave
from epctl.runtime.moe import ExpertParallelMoE
from epctl.runtime.names import hub_tensors
from epctl.runtime.weights import RandomWeights

CPU = torch.device("cpu")
# What ZeRO is told to do instead of its own, on its instance.
SHORTENED = {
    "zero12": (
        "process_gradients",
        "independent_gradient_partition_epilogue",
        "scaled_global_norm",
        "unscale_and_clip_grads",
        "step",
    ),
    "zero3": (
        "reduce_ready_partitions_and_remove_grads",
        "_pre_step",
        "zero_grad",
        "_get_norm_groups",
        "_prepare_fp32_grad_for_sub_group",
        "unscale_and_clip_grads",
        "_optimizer_step",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
}
# Experts shared by two ranks; each on one, in half precision and accumulated; those and no more.
WAYS: dict[str, dict[str, Any]] = {
    "shared": {"ep": 2},
    "alone": {"ep": 4, "bfloat16": True, "accumulation": 2},
    "alone at once": {"ep": 4, "bfloat16": True, "steps": 1},  # then roundings of weights part
    "nothing else": {"ep": 4, "bfloat16": True, "trainable": "experts"},
}
# What is fetched ahead ends with the first of a layer's experts; or is all of a model.
AHEAD = (4000, 1_000_000)
DENSE = {"first_k_dense_replace": 99}  # no experts: the engine then has no tables of them
ANOTHER_CLASS = [(1, "alone"), (1, "nothing else")]  # bf16_optimizer.py, left as it is
PARTS = ("experts", "attention", r"layers\.1\.")


def make(
    zero: int,
    ep: int,
    *,
    bfloat16: bool = False,
    trainable: str = "all",
    model: dict[str, Any] | None = None,
    zero_settings: dict[str, Any] | None = None,
    **case: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    config = case_config({"zero": zero, "ep": ep, **case}, dist.get_world_size())
    mesh = seams.create_mesh(ep)
    ds_config = deepspeed_config(config, bfloat16=bfloat16, on_cpu=True)
    ds_config["zero_optimization"] |= zero_settings or {}
    built = build_model(
        tiny_config(**(model or {})),
        mesh,
        RandomWeights(seed=1, std=0.08),
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
        device=CPU,
        zero3_config=ds_config if zero == 3 else None,
        trainable=trainable,
    )
    engine, optimizer, scheduler = create_engine(built, config, ds_config)
    return config, mesh, engine, optimizer, scheduler


def no_shared_memory_build() -> bool:
    """initialize_distributed must not have built the JIT op (a minute, and a compiler)."""
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return not folder.exists() or not any(folder.rglob("*shm*"))


def groups() -> dict[str, Any]:
    result = {}
    for ep in (1, 2, 4):
        mesh = seams.create_mesh(ep)
        result[str(ep)] = {
            "ep": dist.get_process_group_ranks(mesh.ep_group),
            "edp": dist.get_process_group_ranks(mesh.edp_group),
            "ep_rank": mesh.ep_rank,
            "edp_rank": mesh.edp_rank,
        }
    try:
        seams.create_mesh(3)
    except ConfigError as error:
        result["illegal"] = error.message
    return result


def engine_finds_layer(zero: int) -> dict[str, Any]:
    _, mesh, engine, _, _ = make(zero, 2)
    layers = [m for m in engine.module.modules() if isinstance(m, ExpertParallelMoE)]
    result = {
        "has_moe_layers": engine.has_moe_layers,
        "num_experts": list(engine.num_experts),
        "group_is_group": all(isinstance(m.ep_group, dist.ProcessGroup) for m in layers),
        "group_size": dist.get_world_size(layers[0].ep_group),
        "same_group": layers[0].ep_group is mesh.ep_group,
    }
    engine.destroy()
    return result


def partitions_cover_everything(zero: int) -> dict[str, Any]:
    """Each element of each Parameter is held once a group, and the flat tensor holds its value."""
    _, _, engine, _, _ = make(zero, 2)
    values = {}
    for parameter in engine.module.parameters():
        with seams.full_parameters([parameter]):
            values[id(parameter)] = parameter.detach().clone().flatten()
    held: dict[int, int] = {}
    mismatches = 0
    for partition in seams.flat_partitions(engine):
        for rank, fragments in enumerate(partition.fragments_by_rank):
            for fragment in fragments:
                key = id(fragment.parameter)
                held[key] = held.get(key, 0) + fragment.num_elements
                if rank != partition.group_rank:
                    continue
                seen = partition.flat.view(-1)[fragment.offset :][: fragment.num_elements]
                expected = values[key][fragment.start :][: fragment.num_elements]
                mismatches += int(not torch.equal(seen, expected))
    numel = {id(p): seams.full_shape(p).numel() for p in engine.module.parameters()}
    engine.destroy()
    return {"complete": held == numel, "mismatches": mismatches}


def rates_follow_schedule(zero: int) -> dict[str, Any]:
    """With a rate of zero nothing moves; with a positive one experts and dense weights do."""
    config, _, engine, optimizer, scheduler = make(zero, 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = snapshot(engine)
    train_step(engine, scheduler, rank_batches(0, config), config, seams.create_mesh(2))
    still = moved(before, snapshot(engine))
    before = snapshot(engine)
    train_step(engine, scheduler, rank_batches(1, config), config, seams.create_mesh(2))
    after = moved(before, snapshot(engine))
    rates = [group["lr"] / group["initial_lr"] for group in optimizer.param_groups]
    kinds = sorted({bool(group.get("moe")) for group in optimizer.param_groups})
    engine.destroy()
    return {"still": still, "moved": after, "rates": rates, "kinds": kinds}


def snapshot(engine: Any) -> dict[str, torch.Tensor]:
    result = {}
    for tensor in hub_tensors(engine.module):
        if isinstance(tensor.tensor, nn.Parameter):
            with seams.full_parameters([tensor.tensor]):
                result[tensor.name] = tensor.local().detach().clone()
    return result


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, int]:
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    experts = sum(".experts." in name and "shared" not in name for name in changed)
    return {"experts": experts, "dense": len(changed) - experts}


def state_exists_before_first_step(zero: int) -> bool:
    _, _, engine, optimizer, _ = make(zero, 2, optim="adamw")
    flats = [partition.flat for partition in seams.flat_partitions(engine)]
    complete = all({"exp_avg", "exp_avg_sq", "step"} <= optimizer.state[f].keys() for f in flats)
    engine.destroy()
    return complete


def deepspeed_save_and_load(zero: int, folder: Path) -> dict[str, float]:
    """DeepSpeed's own checkpoint keeps the next loss: our marks are what its save wants."""
    config, mesh, engine, _, scheduler = make(zero, 2)
    for step in range(2):
        train_step(engine, scheduler, rank_batches(step, config), config, mesh)
    engine.save_checkpoint(str(folder))
    unbroken, _ = train_step(engine, scheduler, rank_batches(2, config), config, mesh)
    unbroken, _ = train_step(engine, scheduler, rank_batches(3, config), config, mesh)
    engine.destroy()
    config, mesh, engine, _, scheduler = make(zero, 2)
    engine.load_checkpoint(str(folder))
    for _ in range(2):
        scheduler.step()
    train_step(engine, scheduler, rank_batches(2, config), config, mesh)
    resumed, _ = train_step(engine, scheduler, rank_batches(3, config), config, mesh)
    engine.destroy()
    return {"unbroken": unbroken, "resumed": resumed}


def failed_save(folder: Path) -> dict[str, Any]:
    """One rank cannot write (file size limit): all ranks raise, nothing is left behind."""
    _, mesh, engine, _, _ = make(3, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    message = ""
    try:
        save_model(engine.module, mesh, folder / "model", lambda staging: None)
    except ResourceError as error:
        message = error.message
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(path.name for path in folder.glob("model*"))
    engine.destroy()
    return {"message": message, "left": left}


def memory_of_an_engine_comes_back(zero: int) -> bool:
    """True if nothing holds the model or optimizer of an engine that trained and was let go.

    Three steps: ZeRO-3 caches what it knows of a whole step.
    """
    config, mesh, engine, optimizer, scheduler = make(zero, 2)
    for step in range(3):
        train_step(engine, scheduler, rank_batches(step, config), config, mesh)
    held = [weakref.ref(engine.module), weakref.ref(engine.optimizer), weakref.ref(optimizer)]
    seams.release_engine(engine)
    del engine, optimizer, scheduler
    gc.collect()
    return all(reference() is None for reference in held)


def nan_on_one_rank(zero: int) -> dict[str, Any]:
    """A step in bfloat16 whose gradient is NaN on rank 1 moves nothing, and the next one does."""
    config, mesh, engine, optimizer, scheduler = make(zero, 2, bfloat16=True)
    weight = engine.module.model.layers[0].self_attn.o_proj.weight
    hook = weight.register_hook(lambda g: g * float("nan") if mesh.rank == 1 else g)
    before = snapshot(engine)
    train_step(engine, scheduler, rank_batches(0, config), config, mesh)
    skipped = moved(before, snapshot(engine))
    state = [v for values in optimizer.state.values() for v in values.values()]
    finite = all(bool(torch.isfinite(v).all()) for v in state if torch.is_tensor(v))
    hook.remove()
    train_step(engine, scheduler, rank_batches(1, config), config, mesh)
    after = moved(before, snapshot(engine))
    looked = "check_overflow" not in vars(engine.optimizer)
    engine.destroy()
    return {"skipped": skipped, "finite": finite, "after": after["dense"], "looked": looked}


def lean_and_plain_steps(zero: int, steps: int = 2, **case: Any) -> dict[str, Any]:
    """Some clipped steps with gradients on epctl's short way, and two on ZeRO's own."""
    found: dict[str, Any] = {}
    # The Parameters of a small model have rows too.
    usual, deepspeed_gradients.NORM_ROW = deepspeed_gradients.NORM_ROW, 16
    stage = "zero3" if zero == 3 else "zero12"
    for way in ("lean", "plain"):
        config, mesh, engine, optimizer, scheduler = make(zero, clipping=0.05, **case)
        own = vars(engine.optimizer)
        if way == "plain":
            optimizer._copies.clear()
            for name in SHORTENED[stage]:
                own.pop(name, None)
        given: set[str] = set()
        take = optimizer.take_gradient
        optimizer.take_gradient = lambda flat, gradient, take=take, given=given: (
            given.add(str(getattr(gradient, "dtype", None))) or take(flat, gradient)
        )
        norms = [
            train_step(engine, scheduler, rank_batches(number, config), config, mesh)[1]
            for number in range(steps)
        ]
        found[way] = {
            "norms": norms,
            # Updates do not tell a gradient from half of it; what both optimizers remember does.
            "tensors": [*masters(engine), *moments(optimizer)],
            "divisor": optimizer.divisor,
            "given": sorted(given - {"None"}),
        }
        engine.destroy()
    deepspeed_gradients.NORM_ROW = usual
    lean, plain = (found[way].pop("tensors") for way in ("lean", "plain"))
    pairs = [(a, b) for a, b in zip(lean, plain, strict=True) if b.norm() > 0]
    return found | {"difference": max(float((a - b).norm() / b.norm()) for a, b in pairs)}


def weights_of_masters(zero: int, **case: Any) -> dict[str, int]:
    """Elements of the model, and those that are not their master rounded, after rows were scaled.

    The optimizer writes both; ZeRO gathers the weights but copies none.
    """
    config, mesh, engine, optimizer, scheduler = make(zero, bfloat16=True, **case)
    weight = engine.module.model.layers[0].self_attn.o_proj.weight
    rows = torch.full((seams.full_shape(weight)[0],), 0.25)
    optimizer.scale_rows_after_step({id(weight): rows})
    before = snapshot(engine)
    train_step(engine, scheduler, rank_batches(0, config), config, mesh)
    values = {}
    for parameter in engine.module.parameters():
        with seams.full_parameters([parameter]):
            values[id(parameter)] = parameter.detach().clone().flatten()
    found = {"elements": 0, "other": 0, "written": len(optimizer._copies)}
    for partition in seams.flat_partitions(engine):
        master = partition.flat.detach().view(-1).bfloat16()
        for f in partition.fragments_by_rank[partition.group_rank]:
            live = values[id(f.parameter)][f.start : f.start + f.num_elements]
            found["elements"] += f.num_elements
            found["other"] += int((live != master[f.offset : f.offset + f.num_elements]).sum())
    found["moved"] = sum(moved(before, snapshot(engine)).values())
    engine.destroy()
    return found


def moments_of_what_is_sometimes_used(zero: int, **case: Any) -> dict[str, list[float]]:
    """The lengths of two Parameters' first moments after each of four steps of two micro-steps.

    A norm's and, held by one rank, experts': the second step uses them in its last micro-step
    alone, the third in neither, the fourth in its first alone.
    """
    case = {"bfloat16": True, "accumulation": 2} | case
    config, mesh, engine, optimizer, scheduler = make(zero, 4, **case)
    model, micro_step = engine.module.model, itertools.count()
    norm, experts = model.norm, model.layers[1].mlp.experts
    watched = {"norm": norm.weight, "experts": experts.w3}
    forward = norm.forward

    def use(*_: Any) -> None:
        """One way of not being used each: trained, but not reached; and not trained."""
        number = next(micro_step)
        used = number in (0, 1, 3, 6)
        experts.w3.requires_grad_(used or number == 7)  # frozen at a step's end: nothing counts
        norm.forward = forward if used else detached

    def detached(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, norm.weight.shape, norm.weight.detach(), norm.rms_epsilon)

    model.register_forward_pre_hook(use)
    found: dict[str, list[float]] = {name: [] for name in watched}
    for step in range(4):
        train_step(engine, scheduler, rank_batches(step, config), config, mesh)
        for name, parameter in watched.items():
            found[name].append(moment_length(engine, optimizer, parameter))
    engine.destroy()
    return found


def moment_length(engine: Any, optimizer: Any, parameter: nn.Parameter) -> float:
    square = torch.zeros(())
    for partition in seams.flat_partitions(engine):
        state = optimizer.state[partition.flat]
        moment = state.get("exp_avg", state.get("momentum_buffer")).view(-1)
        for fragment in partition.fragments_by_rank[partition.group_rank]:
            if fragment.parameter is parameter:
                part = moment[fragment.offset :][: fragment.num_elements]
                square += part.float().square().sum()
    dist.all_reduce(square)
    return float(square.sqrt())


def masters(engine: Any) -> list[torch.Tensor]:
    return [partition.flat.detach().clone() for partition in seams.flat_partitions(engine)]


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    return [state[name] for state in optimizer.state.values() for name in names if name in state]


def steps_of_a_part(zero: int, trainable: str) -> list[tuple[float, float]]:
    """Losses and gradient norms where the first trained layer's input needs no gradient."""
    config, mesh, engine, _, scheduler = make(zero, 2, trainable=trainable, accumulation=2)
    steps = [rank_batches(number, config) for number in range(2)]
    found = [train_step(engine, scheduler, batches, config, mesh) for batches in steps]
    engine.destroy()
    return found


def hooks_by_layer() -> dict[str, Any]:
    """ZeRO-3 knows a layer, not what is in it, and still gathers all it needs."""
    _, _, engine, _, _ = make(3, 2)
    layers = engine.module.model.layers
    inner = [m for layer in layers for m in layer.modules() if m is not layer]
    result = {
        "layers": all(hasattr(layer, "ds_id") for layer in layers),
        "inner": sum(hasattr(module, "ds_id") for module in inner),
        "hooks": sum(len(module._forward_pre_hooks) for module in inner),
    }
    engine.destroy()
    return result


def whole_and_fetched(ahead: int) -> dict[str, Any]:
    """ZeRO-3 with every expert on one rank: left in place by epctl, fetched as by DeepSpeed alone.

    How often it fetched what is whole once it knows the order of layers, which share of the second
    layer's cut Parameters was on its way when that began, and what differs in results.

    Args:
        ahead: elements that DeepSpeed fetches ahead.
    """
    found: dict[str, Any] = {}
    show, results = engine_module.show_whole, []
    # Dense matrices are cut.
    small = {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": ahead}
    for way in ("shown", "fetched"):
        engine_module.show_whole = show if way == "shown" else lambda engine: None
        config, mesh, engine, optimizer, scheduler = make(3, 4, zero_settings=small, accumulation=2)
        steps, seen = [], Watch(engine.module.model.layers[1])
        for number in range(4):
            with seen if number == 3 else contextlib.nullcontext():
                batches = rank_batches(number, config)
                steps.append(train_step(engine, scheduler, batches, config, mesh))
        found[way] = {"steps": steps, "fetches": seen.fetches, "ahead": seen.ahead}
        results.append([*snapshot(engine).values(), *masters(engine), *moments(optimizer)])
        engine.destroy()
    engine_module.show_whole = show
    pairs = list(zip(*results, strict=True))
    return found | {"equal": all(torch.equal(a, b) for a, b in pairs), "compared": len(pairs)}


class Watch(contextlib.AbstractContextManager[None]):
    """Counts what is fetched although it is whole, and sees what of a layer is on its way before
    its last forward begins."""

    def __init__(self, layer: nn.Module) -> None:
        self.fetches, self.ahead = 0, 0.0
        cut = [p for p in layer.parameters() if dist.get_world_size(p.ds_process_group) > 1]
        self.cut = [p for p in cut if not p.ds_persist]
        layer.register_forward_pre_hook(self._look, prepend=True)
        self.handle = partition_parameters.NoGatherCoalescedHandle

    def _look(self, *_: Any) -> None:
        missing = sum(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in self.cut)
        self.ahead = 1 - missing / len(self.cut)

    def __enter__(self) -> None:
        def counted(params: list[Any]) -> Any:
            self.fetches += len(params)
            return self.handle(params)

        partition_parameters.NoGatherCoalescedHandle = counted

    def __exit__(self, *_: Any) -> None:
        partition_parameters.NoGatherCoalescedHandle = self.handle


def main(folder: Path) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=60))
    result: dict[str, Any] = {"no_build": no_shared_memory_build(), "groups": groups()}
    result["version"] = deepspeed.__version__
    for zero in (1, 2, 3):
        result[f"layer{zero}"] = engine_finds_layer(zero)
        result[f"rates{zero}"] = rates_follow_schedule(zero)
        result[f"state{zero}"] = state_exists_before_first_step(zero)
        result[f"save{zero}"] = deepspeed_save_and_load(zero, folder / f"deepspeed{zero}")
    for zero in (0, 1, 2, 3):
        result[f"partitions{zero}"] = partitions_cover_everything(zero)
        if zero:
            result[f"nan{zero}"] = nan_on_one_rank(zero)
            result[f"written{zero}"] = weights_of_masters(zero, ep=2)
            result[f"written{zero} dense"] = weights_of_masters(zero, ep=1, model=DENSE)
            for name, case in WAYS.items():
                if (zero, name) not in ANOTHER_CLASS:
                    result[f"lean{zero} {name}"] = lean_and_plain_steps(zero, **case)
    for trainable in PARTS:
        for zero in (1, 3):
            result[f"{trainable} {zero}"] = steps_of_a_part(zero, trainable)
    result["hooks"] = hooks_by_layer()
    for ahead in AHEAD:
        result[f"whole {ahead}"] = whole_and_fetched(ahead)
    for zero in (1, 2, 3):
        for offload in (False, True):
            # No weight moves by a rounding of bfloat16: ways differ by what they do to gradients.
            flags = {"optim.offload": offload, "optim.lr": 1e-12}
            moments_by_name = moments_of_what_is_sometimes_used(zero, flags=flags)
            result[f"sometimes{zero}{' offload' * offload}"] = moments_by_name
    for zero in (2, 3):
        result[f"released{zero}"] = memory_of_an_engine_comes_back(zero)
    result["failed_save"] = failed_save(folder)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    tempfile.tempdir = sys.argv[1]
    main(Path(sys.argv[1]))
    leave(0)
