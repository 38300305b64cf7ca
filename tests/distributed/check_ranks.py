"""Ranks of the tests of `--check`: one reference, then the asked layout whole and with faults.

Faults are planted here by patching; production code has no hook for them.
`python -m check_ranks FOLDER CASES_JSON`.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from train_model_ranks import CPU, case_config, open_model, packed_data

from epctl.config import RunConfig
from epctl.runtime import check, engine, moe
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.events import EventLog
from epctl.runtime.leave import leave
from epctl.runtime.mesh import Mesh
from epctl.runtime.sequence import loss


@contextlib.contextmanager
def route_scale_dropped() -> Iterator[None]:
    """The rule is read without `routed_scaling_factor`: 1 instead of 2.446."""
    read = moe.RouterRule.from_layout

    def without_scale(*facts: Any) -> moe.RouterRule:
        rule = read(*facts)
        assert rule is not None
        return replace(rule, scale=1.0)

    with mock.patch.object(moe.RouterRule, "from_layout", without_scale):
        yield


@contextlib.contextmanager
def correction_bias_dropped() -> Iterator[None]:
    """The router chooses by scores alone."""
    route = moe.route

    def without_bias(logits: torch.Tensor, bias: torch.Tensor, **rule: Any) -> Any:
        return route(logits, torch.zeros_like(bias), **rule)

    with mock.patch.object(moe, "route", without_bias):
        yield


@contextlib.contextmanager
def router_gradient_lost() -> Iterator[None]:
    """Weights are cut from the scores: the loss is right, the router learns nothing."""
    route = moe.route

    def cut_off(logits: torch.Tensor, bias: torch.Tensor | None, **rule: Any) -> Any:
        weights, experts = route(logits, bias, **rule)
        return weights.detach() + 0 * logits.sum(), experts

    with mock.patch.object(moe, "route", cut_off):
        yield


@contextlib.contextmanager
def router_in_bfloat16() -> Iterator[None]:
    """The projection to scores is rounded as the model's other products would be."""

    def rounded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x.bfloat16() @ weight.bfloat16().t()).float()

    with mock.patch.object(moe, "router_logits", rounded):
        yield


def hook_on_experts(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Any:
    """Has experts get a changed gradient; `change` is also told the expert parallel size."""
    create = check.create_engine

    def with_hooks(model: Any, config: RunConfig, ds_config: Any) -> Any:
        for parameter in model.parameters():
            if seams.is_expert_parameter(parameter):
                parameter.register_hook(lambda gradient: change(gradient, config.parallel.ep))
        return create(model, config, ds_config)

    return mock.patch.object(check, "create_engine", with_hooks)


def expert_gradient_scaled_by_ep() -> Any:
    """Expert gradients are summed over the ep group instead of averaged."""
    return hook_on_experts(lambda gradient, ep: gradient * ep)


def expert_gradients_in_another_order() -> Any:
    """Each expert gets another's gradient, so every norm is as it was."""
    return hook_on_experts(lambda gradient, ep: gradient.flip(0))


def gradient_not_finite() -> Any:
    """ZeRO skips the step, so no optimizer sees a gradient."""
    return hook_on_experts(lambda gradient, ep: gradient * float("nan"))


@contextlib.contextmanager
def norm_counting_experts_twice() -> Iterator[None]:
    """The gradient norm adds each expert's square twice, and clips by that."""
    original = seams.clip_gradients_zero0

    def double_counting(engine: Any, mesh: Mesh, max_norm: float) -> float:
        experts = [p for p in engine.module.parameters() if seams.is_expert_parameter(p)]
        for parameter in experts:
            parameter.grad.mul_(2**0.5)
        try:
            return original(engine, mesh, max_norm)
        finally:
            for parameter in experts:
                parameter.grad.div_(2**0.5)

    with mock.patch.object(engine.seams, "clip_gradients_zero0", double_counting):
        yield


@contextlib.contextmanager
def clipping_by_own_experts() -> Iterator[None]:
    """Each rank clips by the norm of its own experts: replicas of what is dense drift apart."""
    original = seams.clip_gradients_zero0

    def alone(engine: Any, mesh: Mesh, max_norm: float) -> float:
        norm = original(engine, mesh, 0.0)  # what is told is right
        with mock.patch.object(dist, "all_reduce", return_value=None):
            original(engine, mesh, max_norm)
        return norm

    with mock.patch.object(engine.seams, "clip_gradients_zero0", alone):
        yield


@contextlib.contextmanager
def labels_cut_before_shifted() -> Iterator[None]:
    """The target of a rank's last token, which lies with the next rank, is lost."""

    def cut_first(labels_BS: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return loss.shifted_targets(labels_BS[:, start:stop]).contiguous()

    with mock.patch.object(loss, "local_targets", cut_first):
        yield


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "healthy": contextlib.nullcontext,
    "route_scale_dropped": route_scale_dropped,
    "correction_bias_dropped": correction_bias_dropped,
    "router_gradient_lost": router_gradient_lost,
    "router_in_bfloat16": router_in_bfloat16,
    "expert_gradient_scaled_by_ep": expert_gradient_scaled_by_ep,
    "expert_gradients_in_another_order": expert_gradients_in_another_order,
    "gradient_not_finite": gradient_not_finite,
    "norm_counting_experts_twice": norm_counting_experts_twice,
    "clipping_by_own_experts": clipping_by_own_experts,
    "labels_cut_before_shifted": labels_cut_before_shifted,
}


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=90))
    data = packed_data()
    first = case_config(cases[0])
    mesh = seams.create_mesh(first.parallel.ep)
    model = open_model(cases[0]["model"])
    reference = check.reference_on_rank_0(first, mesh, model, data, CPU, folder)
    results: dict[str, Any] = {}
    whole = copy.deepcopy(model.config)
    for case in cases:
        config = case_config(case)
        # Sequence parallelism notes its attention functions in the config it is built from.
        model.config = copy.deepcopy(whole)
        mesh = seams.create_mesh(config.parallel.ep, config.parallel.sp)
        with FAULTS[case["fault"]]():
            results[case["name"]] = check.compare_asked(
                config, mesh, model, data, CPU, EventLog(folder, mesh.rank), folder, reference
            )
        gc.collect()
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
