"""Where epctl relies on an internal of DeepSpeed 0.19.8: from the step to the model's weights.

A part of deepspeed_seams.py, with its rules. A client optimizer that writes what the model
computes with in the pass that writes its float32 master spares ZeRO a pass over both; and weights
that other ranks hold are gathered while the next group steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from epctl.runtime.deepspeed_seams import is_expert_parameter


def weights_written_by_optimizer(engine: Any) -> dict[int, Tensor]:
    """Has ZeRO leave it to its client optimizer to write what the model computes with.

    Returns that by the id of its master, of as many elements; empty where ZeRO goes on doing so:
    at ZeRO-0, with masters in host memory, in float16.
    """
    zero = engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return _written_zero3(zero)
    if isinstance(zero, DeepSpeedZeroOptimizer):
        return _written_zero12(zero)
    return {}


def _written_zero3(zero: Any) -> dict[int, Tensor]:
    """`_reassign_or_swap_out_partitioned_parameters` of zero/stage3.py; loading goes there too."""
    if zero.offload_optimizer or zero.swap_optimizer or zero.torch_autocast_gradscaler:
        return {}
    if any(weights is None for weights in zero.fp16_partitioned_groups_flat):
        return {}
    step, reassign = zero._optimizer_step, zero._reassign_or_swap_out_partitioned_parameters
    stepped: set[int] = set()

    def optimizer_step(index: int) -> None:
        step(index)
        stepped.add(index)

    def reassign_unwritten(index: int) -> None:
        if index not in stepped:
            reassign(index)
            return
        stepped.remove(index)
        zero._unflatten_partitioned_parameters(index)

    zero._optimizer_step = optimizer_step
    zero._reassign_or_swap_out_partitioned_parameters = reassign_unwritten
    masters = zero.fp32_partitioned_groups_flat
    pairs = zip(masters, zero.fp16_partitioned_groups_flat, strict=True)
    return {id(master): weights for master, weights in pairs}


def _written_zero12(zero: Any) -> dict[int, Tensor]:
    """`step` of zero/stage_1_and_2.py, which still is what skips a step that is not finite."""
    if zero.cpu_offload or zero.zenflow or zero.torch_autocast_gradscaler:
        return {}
    if zero.dtype == torch.float16:
        return {}
    usual = zero.step

    def step(closure: Any = None) -> None:
        assert closure is None
        norm = zero.scaled_global_norm()
        is_checked = zero.dtype != torch.bfloat16 or zero.check_grad_overflow
        if is_checked and is_invalid_grad_norm(norm):
            usual()
            return
        zero.micro_step_id, zero.overflow = INITIAL_MICRO_STEP_ID, False
        scale = zero.loss_scale
        zero._update_scale(False)
        zero._global_grad_norm = norm / scale
        works = []
        for index in _order(zero):
            _step_group(zero, index, norm)
            works.append(_gather(zero, index))
        for work in filter(None, works):
            work.wait()
        for index in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(index)

    zero.step = step
    return {
        id(master): _own_weights(zero, index)
        for index, master in enumerate(zero.single_partition_of_fp32_groups)
    }


def _order(zero: Any) -> list[int]:
    """Returns the groups in the order they step in, the same on all ranks.

    What is gathered comes before what is not, so that it travels meanwhile; but Muon's dense
    matrices are many small ones, before which the device must have work in hand: experts.
    """
    gathered: list[int] = []
    alone: list[int] = []
    small: list[int] = []
    for index, group in enumerate(zero.optimizer.param_groups):
        travels = dist.get_world_size(zero.real_dp_process_group[index]) > 1
        is_expert = is_expert_parameter(zero.bit16_groups[index][0])
        if travels and group.get("kind") == "muon" and not is_expert:
            small.append(index)
        else:
            (gathered if travels else alone).append(index)
    return [*gathered, *alone[:-1], *small, *alone[-1:]]


def _step_group(zero: Any, index: int, norm: Tensor) -> None:
    """As upstream, but for the weights; gradients are let go as soon as they are used."""
    master = zero.single_partition_of_fp32_groups[index]
    zero.free_grad_in_param_list(zero.params_not_in_partition[index])
    gradient = zero._get_preflattened_grad_partition(index)
    if gradient is None:
        group = zero.real_dp_process_group[index]
        if dist.get_rank(group) == dist.get_world_size(group) - 1:
            gradient = zero.flatten_dense_tensors_aligned(
                zero.averaged_gradients[index], int(zero.partition_size[index])
            )
        else:
            gradient = zero.flatten(zero.averaged_gradients[index])
    assert gradient.numel() == zero.partition_size[index]
    if dist.get_world_size(zero.real_dp_process_group[index]) == 1:
        zero.optimizer.take_gradient(master, gradient)  # in its own dtype
    else:
        master.grad = gradient.to(master.dtype)
    del gradient
    zero.free_grad_in_param_list(zero.params_in_partition[index])
    zero._release_preflattened_grad_buffers(index)
    zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
    zero.unscale_and_clip_grads([master.grad], norm)  # tells the optimizer of the norm alone
    zero._optimizer_step(index)
    zero.optimizer.take_gradient(master, None)
    master.grad = None


def _own_weights(zero: Any, index: int) -> Tensor:
    rank = dist.get_rank(zero.real_dp_process_group[index])
    weights: Tensor = zero.parallel_partitioned_bit16_groups[index][rank]
    return weights


def _gather(zero: Any, index: int) -> dist.Work | None:
    """Starts to gather a group's weights from the ranks that stepped on them."""
    group = zero.real_dp_process_group[index]
    if dist.get_world_size(group) == 1:
        return None
    work: dist.Work | None = dist.all_gather_into_tensor(
        zero.bit16_groups_flat[index], _own_weights(zero, index), group=group, async_op=True
    )
    return work
