"""Probe ranks with the engine patched: older behaviour re-created, or a live fault mended.

Started like `epctl.launch.probe_ranks`; each probe runs under the patch of its hazard. Where the
installed engine is sound the patch plants the fault of an older one; where the fault is live the
patch mends it, so that a probe that always says the same is found out in both directions.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from epctl.launch.probe import load_probes
from epctl.launch.probe_ranks import run_probe, write_finding
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.leave import leave

PATCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {}


def patch_of(hazard_id: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        PATCHES[hazard_id] = function
        return function

    return register


@patch_of("bf16_optimizer_last_micro_batch")
@contextlib.contextmanager
def late_accumulation() -> Any:
    """#7985: the boundary's gradient is added after the reduction."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    update, step = BF16_Optimizer.update_hp_grads, BF16_Optimizer.step
    calls = [0]

    def every_second_waits(self: Any, clear_lp_grads: bool = False) -> None:
        calls[0] += 1
        if calls[0] % 2:
            update(self, clear_lp_grads=clear_lp_grads)

    def step_after_update(self: Any, *arguments: Any, **options: Any) -> Any:
        update(self, clear_lp_grads=True)
        return step(self, *arguments, **options)

    with (
        patch.object(BF16_Optimizer, "update_hp_grads", every_second_waits),
        patch.object(BF16_Optimizer, "step", step_after_update),
    ):
        yield


@patch_of("offload_drops_micro_batches")
def forget_earlier_backwards() -> Any:
    """#7981: nothing is accumulated on the host."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return patch.object(
        DeepSpeedZeroOptimizer, "async_accumulate_grad_in_cpu_via_gpu", lambda self, param: None
    )


@patch_of("expert_norm_averaged_zero0")
def true_norm() -> Any:
    """#8476: the experts of every rank count, each once."""
    from deepspeed.runtime import engine

    def clip(parameters: Any, max_norm: float, mpu: Any) -> None:
        parameters = [p for p in parameters if p.grad is not None]
        squares = torch.zeros(2, dtype=torch.float64)
        for p in parameters:
            squares[int(getattr(p, "allreduce", True))] += p.grad.double().square().sum()
        dist.all_reduce(squares[:1])
        for p in parameters:
            p.grad.mul_(max_norm / float(squares.sum().sqrt()))

    return patch.object(engine, "clip_grad_norm_", clip)


@patch_of("expert_state_unlinked")
def link_again() -> Any:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    link = DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state

    def always(self: Any) -> None:
        self._hp_optimizer_states_linked = False
        link(self)

    return patch.object(DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state", always)


def pretend(name: str, value: bool) -> property:
    """An attribute that reads as `value` whatever is assigned."""
    return property(lambda self: value, lambda self, assigned: None)


@patch_of("reduce_scatter_off_with_experts")
def allowed_off() -> Any:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Optimizer

    return patch.object(Optimizer, "reduce_scatter", pretend("reduce_scatter", True), create=True)


@patch_of("muon_reduce_scatter_zero3")
def allowed_on() -> Any:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Optimizer

    return patch.object(Optimizer, "reduce_scatter", pretend("reduce_scatter", False), create=True)


@patch_of("zero0_bf16_step_in_constructor")
def no_step_in_constructor() -> Any:
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    return patch.object(FP16_UnfusedOptimizer, "initialize_optimizer_states", lambda self: None)


@patch_of("warmup_schedule_one_rate")
def own_rates() -> Any:
    from deepspeed.runtime.lr_schedules import WarmupLR

    original = WarmupLR.__init__

    def without_maximum(self: Any, optimizer: Any, warmup_max_lr: Any = None, **more: Any) -> None:
        original(self, optimizer, **more)

    return patch.object(WarmupLR, "__init__", without_maximum)


@patch_of("autosp_gather_cuts_gradient")
def gather_with_gradient() -> Any:
    from deepspeed.sequence import autosp_vit
    from torch.distributed.nn.functional import all_gather

    def gather(buffers: list[Any], tensor: Any, group: Any = None) -> None:
        buffers[:] = list(all_gather(tensor, group=group))

    return patch.object(autosp_vit.dist, "all_gather", gather)


@patch_of("library_versions_differ")
def another_torch_on_rank_1() -> Any:
    from epctl.runtime import versions

    mine = versions.installed_versions() | {"torch": f"2.{dist.get_rank()}"}
    return patch.object(versions, "installed_versions", lambda: mine)


@patch_of("default_clipping")
def no_default_clipping() -> Any:
    from deepspeed.runtime import config

    return patch.object(config, "GRADIENT_CLIPPING_DEFAULT", 0.0)


@patch_of("clipping_on_muon_update")
def clip_nothing_after_muon() -> Any:
    """The update is left alone; the raw gradient here is below the bound."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return patch.object(DeepSpeedZeroOptimizer, "unscale_and_clip_grads", lambda *a, **k: None)


@patch_of("muon_sgd_at_zero0")
def raw_gradient_as_update() -> Any:
    """#8441."""
    from deepspeed.runtime.zero.muon import muon_optimizer

    return patch.object(muon_optimizer, "muon_update", lambda grad, *a, **k: grad)


@patch_of("muon_adamw_under_zero_init")
def shape_as_partitioned() -> Any:
    """#8438: the shape that zero.Init leaves is taken for the layer's."""
    import deepspeed

    return patch.object(deepspeed, "_layer_shape", lambda parameter: parameter.shape)


@patch_of("muon_per_micro_batch_zero3")
@contextlib.contextmanager
def muon_at_every_backward() -> Any:
    """#8443."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Optimizer

    apply = Optimizer._apply_muon_to_accumulated_grads
    reduce = Optimizer.independent_gradient_partition_epilogue

    def reduce_and_apply(self: Any) -> None:
        reduce(self)
        apply(self)

    with (
        patch.object(Optimizer, "independent_gradient_partition_epilogue", reduce_and_apply),
        patch.object(Optimizer, "_apply_muon_to_accumulated_grads", lambda self: None),
    ):
        yield


@patch_of("muon_checkpoint_not_convertible")
@contextlib.contextmanager
def converter_that_takes_momentum() -> Any:
    """#8609: a state without Adam's moments is passed through."""
    load = torch.load

    def load_complete(*arguments: Any, **options: Any) -> Any:
        document = load(*arguments, **options)
        return fill_moments(document)

    def fill_moments(value: Any) -> Any:
        if isinstance(value, dict):
            filled = {key: fill_moments(item) for key, item in value.items()}
            if "momentum_buffer" in filled:
                for key in ("exp_avg", "exp_avg_sq"):
                    filled[key] = filled["momentum_buffer"]
            return filled if type(value) is dict else value
        return [fill_moments(item) for item in value] if type(value) is list else value

    with patch.object(torch, "load", load_complete):
        yield


@patch_of("correction_bias_lost")
def parameters_only() -> Any:
    """#8358: a bias that is a buffer is not copied."""
    from deepspeed.module_inject import auto_ep_layer

    return patch.object(auto_ep_layer, "_copy_e_score_correction_bias", lambda *a, **k: None)


@patch_of("route_scale_lost")
def scale_of_one() -> Any:
    from deepspeed.module_inject import auto_ep

    return patch.object(auto_ep, "_resolve_route_scale", lambda *a: 1.0)


class Float32Linear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), self.weight.float())


@patch_of("router_in_bfloat16")
def float32_projection() -> Any:
    from deepspeed.moe import ep_router

    return patch.object(ep_router.nn, "Linear", Float32Linear)


@patch_of("autoep_misspelt_key")
def strict_block() -> Any:
    from deepspeed.module_inject import auto_ep_config

    parse = auto_ep_config.parse_autoep_config

    def strict(document: dict[str, Any]) -> Any:
        known = set(vars(parse({"enabled": True})))
        if set(document) - known:
            raise ValueError("unknown key")
        return parse(document)

    return patch.object(auto_ep_config, "parse_autoep_config", strict)


@patch_of("autoep_unknown_model")
def refuse_nothing_found() -> Any:
    from deepspeed.module_inject.auto_ep import AutoEP

    parse = AutoEP.ep_parser

    def strict(self: Any) -> Any:
        found = parse(self)
        if not found:
            raise ValueError("no MoE layer found")
        return found

    return patch.object(AutoEP, "ep_parser", strict)


@patch_of("autoep_transformers_recorders")
def leave_recorders() -> Any:
    from deepspeed.module_inject.auto_ep_presets import base

    return patch.object(
        base, "_retarget_transformers_output_recorders_for_modules", lambda *a, **k: None
    )


@patch_of("autoep_resume_other_ep")
def refuse_load() -> Any:
    from deepspeed.runtime.engine import DeepSpeedEngine

    def refuse(self: Any, *arguments: Any, **options: Any) -> Any:
        raise ValueError("written at another autoep_size")

    return patch.object(DeepSpeedEngine, "_load_checkpoint", refuse)


@patch_of("latest_before_other_ranks")
def barrier_before_latest() -> Any:
    from deepspeed.runtime.engine import DeepSpeedEngine

    write = DeepSpeedEngine._save_zero_checkpoint

    def write_and_wait(self: Any, *arguments: Any) -> None:
        write(self, *arguments)
        dist.barrier()

    return patch.object(DeepSpeedEngine, "_save_zero_checkpoint", write_and_wait)


@patch_of("missing_latest_restarts")
def raise_on_nothing() -> Any:
    from deepspeed.runtime.engine import DeepSpeedEngine

    load = DeepSpeedEngine.load_checkpoint

    def strict(self: Any, *arguments: Any, **options: Any) -> Any:
        result = load(self, *arguments, **options)
        if result[0] is None:
            raise FileNotFoundError("no checkpoint")
        return result

    return patch.object(DeepSpeedEngine, "load_checkpoint", strict)


@patch_of("save_16bit_one_rank_of_experts")
def write_all_experts() -> Any:
    from deepspeed.runtime.engine import DeepSpeedEngine

    collect = DeepSpeedEngine.module_state_dict

    def whole(self: Any, *arguments: Any, **options: Any) -> Any:
        state = collect(self, *arguments, **options)
        for name in [name for name in state if ".experts.w" in name]:
            parts = [torch.empty_like(state[name]) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, state[name].contiguous())
            state[name] = torch.cat(parts)
        return state

    return patch.object(DeepSpeedEngine, "module_state_dict", whole)


@patch_of("capacity_by_logits")
def gates_are_logits() -> Any:
    """#7986."""
    from deepspeed.moe import sharded_moe

    return patch.object(sharded_moe.F, "softmax", lambda logits, dim: logits)


@patch_of("grouped_mm_row_stride")
def any_stride() -> Any:
    def loop(x: Any, weights: Any, offs: Any) -> Any:
        parts = torch.tensor_split(x, offs[:-1].long())
        return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])

    return patch.object(torch, "_grouped_mm", loop)


@patch_of("stale_build_lock")
def break_the_lock() -> Any:
    from torch.utils.file_baton import FileBaton

    return patch.object(FileBaton, "wait", lambda self: os.remove(self.lock_file_path))


@patch_of("arch_list_suffix")
def understand_suffixes() -> Any:
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    return patch.object(CUDAOpBuilder, "compute_capability_args", lambda self: [])


class FakeAdam:
    """The compiled op: plain Adam; with `drift` it counts calls instead of trusting `step`."""

    def __init__(self, drift: bool) -> None:
        self.drift, self.num_calls = drift, 0

    def create_adam(self, *arguments: Any) -> None:
        self.num_calls = 0

    def destroy_adam(self, *arguments: Any) -> None:
        pass

    def adam_update(
        self, identity: int, step: int, lr: float, beta1: float, beta2: float, *rest: Any
    ) -> None:
        eps, _, _, p, grad, exp_avg, exp_avg_sq = rest
        self.num_calls += 1
        count = self.num_calls if self.drift else step
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.lerp_(grad.square(), 1 - beta2)
        denominator = (exp_avg_sq / (1 - beta2**count)).sqrt() + eps
        p.sub_(lr * exp_avg / (1 - beta1**count) / denominator)


@contextlib.contextmanager
def adam_op(drift: bool) -> Any:
    from deepspeed.ops.adam import cpu_adam

    from epctl.launch import probe_local

    with (
        patch.object(cpu_adam.CPUAdamBuilder, "load", lambda self: FakeAdam(drift)),
        patch.object(probe_local, "cpu_adam_is_built", lambda: True),
    ):
        yield


@patch_of("cpu_adam_subgroup_drift")
def drifting_op() -> Any:
    """#7982."""
    return adam_op(drift=True)


@patch_of("small_shared_memory")
def sixty_four_mebibytes() -> Any:
    """Docker's default."""
    import shutil

    usage = shutil.disk_usage("/")
    return patch.object(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))


def main(folder: Path, hazard_ids: list[str]) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=20))
    probes = load_probes()
    for hazard_id in hazard_ids:
        write_finding(folder, {"begin": hazard_id})
        work = folder / hazard_id
        work.mkdir(exist_ok=True)
        with PATCHES[hazard_id]():
            finding = run_probe(probes[hazard_id], work)
        if hazard_id == "cpu_adam_subgroup_drift":
            with adam_op(drift=False):
                sound = run_probe(probes[hazard_id], work)
            finding["seen"] += f"; sound op: {sound['verdict']}"
        write_finding(folder, {"id": hazard_id, **finding})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
