"""Where epctl relies on an internal of DeepSpeed 0.19.8: gradients from backward to the step.

A part of deepspeed_seams.py, with its rules: each function names the upstream file it
leans on, and `tests/distributed/test_seams.py` holds each against ZeRO's own way.

What ZeRO does there is right for any optimizer and any group of ranks, and takes passes over every
gradient that change nothing where one rank alone holds a Parameter, as experts often are. Each
function here takes such passes away and leaves the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import (
    DeepSpeedZeroOptimizer,
    GradPartitionBufferGroup,
)
from torch import Tensor, nn

from epctl.kernels.gradient_share import add_share_

NORM_ROW = 4096  # elements whose squares are added up in float32


def shorten_gradients(
    engine: Any,
    divide_gradients_by: Callable[[Tensor | None], None],
    *,
    takes_any_dtype: bool = False,
) -> None:
    """Takes out of a ZeRO engine every pass over gradients that its optimizer can do without.

    Args:
        divide_gradients_by: what the optimizer is told by, for clipping and unscaling.
        takes_any_dtype: the step hands it gradients as they are; where there is but one
            micro-step nothing is added up, and they stay in the model's dtype.
    """
    zero = engine.optimizer
    is_sum = engine.gradient_accumulation_steps() > 1 or not takes_any_dtype
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        _accumulate_whole_zero3(zero)
        _end_backward_on_device_zero3(zero)
        _norm_at_once_zero3(zero)
        _step_in_place_zero3(zero)
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        _check_finite_by_norm(zero)
        _accumulate_whole_zero2(zero, is_sum)
        _end_backward_on_device_zero12(zero)
        _norm_at_once_zero12(zero)
    else:
        return
    _clip_in_optimizer(zero, divide_gradients_by)


# --- gradients that no other rank adds to -----------------------------------------------------


def _accumulate_whole_zero3(zero: Any) -> None:
    """Has ZeRO-3 add the gradient of a Parameter that one rank holds to where it belongs, at once.

    Its own way leads through a bucket, a division by one, an exchange with nobody, another
    multiplication and a float32 copy (`reduce_ready_partitions_and_remove_grads` of
    zero/stage3.py). Parameters without a gradient in a step get zeros: upstream leaves what the
    step before left there, which `_step_in_place_zero3` may have written over.
    """
    usual, begin_step = zero.reduce_ready_partitions_and_remove_grads, zero._pre_step
    forget = zero.zero_grad
    reduced: set[int] = set()

    def partition_of(parameter: nn.Parameter) -> Tensor:
        partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        partition: Tensor = partitions[getattr(parameter, "ds_id")]  # noqa: B009
        return partition

    def reduce(parameter: Any) -> None:
        if zero._coalesce_grad_reduction or not getattr(parameter, "ds_grad_is_ready", True):
            usual(parameter)
            return
        if zero.micro_step_id > 0 and parameter.ds_id not in reduced:
            partition_of(parameter).zero_()
        reduced.add(parameter.ds_id)
        if not _alone_zero3(zero, parameter):
            usual(parameter)
            return
        target = partition_of(parameter).narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
        share = 1.0 / zero._gradient_averaging_world_size([parameter], 1)
        _accumulate(
            target, parameter, share, zero.micro_step_id == 0, zero.reduce_and_partition_stream
        )

    def pre_step() -> None:
        begin_step()
        for parameter in (p for group in zero.fp16_groups for p in group):
            if parameter.ds_id not in reduced:
                partition_of(parameter).zero_()
        reduced.clear()

    def zero_grad(set_to_none: bool = True) -> None:
        forget(set_to_none)
        reduced.clear()

    zero.reduce_ready_partitions_and_remove_grads = reduce
    zero._pre_step, zero.zero_grad = pre_step, zero_grad


def _alone_zero3(zero: Any, parameter: nn.Parameter) -> bool:
    """True if this rank alone makes a Parameter's gradient and keeps it on the device."""
    if zero.offload_optimizer or zero.zenflow or parameter.grad is None:
        return False
    if zero.postscale_gradients and zero.gradient_predivide_factor != 1.0:
        return False
    return bool(dist.get_world_size(zero._get_param_partition_group(parameter)) == 1)


def _accumulate_whole_zero2(zero: Any, is_sum: bool) -> None:
    """Has ZeRO-2 add the gradient of a Parameter that one rank holds to where it belongs, at once.

    See `_accumulate_whole_zero3`; `process_gradients` of zero/stage_1_and_2.py. What a first
    gradient is written to is not filled with zeros before it, and is in its own dtype if no other
    is added to it: a share that is a power of two is exact there.
    """
    share = float(zero.sequence_parallel_size) / dist.get_world_size(zero.dp_process_group)
    keeps_dtype = not is_sum and math.frexp(share)[0] == 0.5
    usual, end_backward = zero.process_gradients, zero.independent_gradient_partition_epilogue
    unwritten: dict[int, dict[int, Tensor]] = {}

    def process(parameter: nn.Parameter, group: int) -> None:
        if not _alone_zero2(zero, parameter, group):
            usual(parameter, group)
            return
        zero.setup_buckets()  # the end of backward empties buckets, also of nothing
        number = zero.get_param_id(parameter)
        assert not zero.params_already_reduced[number]
        zero.params_already_reduced[number] = True
        if zero.averaged_gradients.get(group) is None:
            dtype = parameter.dtype if keeps_dtype else zero.gradient_accumulation_dtype
            zero.averaged_gradients[group], unwritten[group] = _whole_group(zero, group, dtype)
        target = zero._get_compact_grad_partition_slice(group, 0, number, parameter.numel())
        first = unwritten.get(group, {}).pop(number, None) is not None
        stream = zero.reduction_stream if zero.overlap_comm else get_accelerator().current_stream()
        _accumulate(target.view(parameter.shape), parameter, share, first, stream)

    def epilogue() -> None:
        end_backward()
        for views in unwritten.values():
            for view in views.values():
                view.zero_()
        unwritten.clear()

    if zero.partition_gradients and not zero.cpu_offload and zero.gradient_average:
        zero.process_gradients = process
        zero.independent_gradient_partition_epilogue = epilogue


def _end_backward_on_device_zero12(zero: Any) -> None:
    """Has the device, not the host, wait for reductions at the end of backward.

    Upstream stops the host until the device has nothing left to do, and the device then idles
    until the host has started the step (`independent_gradient_partition_epilogue` of
    zero/stage_1_and_2.py, where `overlap_comm` decides that and nothing else).
    """
    usual, accelerator = zero.independent_gradient_partition_epilogue, get_accelerator()
    if not zero.overlap_comm or accelerator.resolves_data_dependency():
        return

    def epilogue() -> None:
        zero.reduce_ipg_grads()
        accelerator.current_stream().wait_stream(zero.reduction_stream)
        zero._clear_previous_reduced_grads()
        zero.overlap_comm = False
        try:
            usual()
        finally:
            zero.overlap_comm = True

    zero.independent_gradient_partition_epilogue = epilogue


def _end_backward_on_device_zero3(zero: Any) -> None:
    """As `_end_backward_on_device_zero12`, for gradients that stay on the device.

    Buckets are empty when upstream's own end of backward comes to its stream, which it then does
    nothing with but stop the host (`independent_gradient_partition_epilogue` of zero/stage3.py).
    """
    usual, accelerator = zero.independent_gradient_partition_epilogue, get_accelerator()
    if zero.offload_optimizer or zero.zenflow or accelerator.resolves_data_dependency():
        return
    reduce = zero._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads

    def epilogue() -> None:
        for dtype in sort_dtypes(zero.ipg_buckets.keys()):
            reduce(dtype)
        stream = zero.reduce_and_partition_stream
        accelerator.current_stream().wait_stream(stream)
        zero.reduce_and_partition_stream = _NothingToWaitFor()
        try:
            usual()
        finally:
            zero.reduce_and_partition_stream = stream

    zero.independent_gradient_partition_epilogue = epilogue


class _NothingToWaitFor:
    """Stands for a stream that the device waits for already."""

    def synchronize(self) -> None:
        """Lets the host go on."""


def _whole_group(zero: Any, group: int, dtype: torch.dtype) -> tuple[Any, dict[int, Tensor]]:
    """Returns room for a group's gradients, as ZeRO builds it, and what of it holds nothing yet.

    All of the group is in the one partition there is (`_build_compact_grad_partition_buffer`).
    """
    flat = torch.empty(int(zero.partition_size[group]), dtype=dtype, device=zero.device)
    views, unwritten, end = [], {}, 0
    for parameter in zero.params_in_partition[group]:
        number = zero.get_param_id(parameter)
        assert end == int(zero.grad_partition_insertion_offset[group][0][number])
        views.append(flat.narrow(0, end, parameter.numel()).view(parameter.shape))
        unwritten[number] = views[-1]
        end += parameter.numel()
    if end < len(flat):
        views.append(flat[end:].zero_())
        setattr(views[-1], "_zero_padding", True)  # noqa: B010
    return GradPartitionBufferGroup(views, flat), unwritten


def _alone_zero2(zero: Any, parameter: nn.Parameter, group: int) -> bool:
    if zero._coalesce_grad_reduction or not getattr(parameter, "ds_grad_is_ready", True):
        return False
    if zero.use_grad_accum_attribute or zero.zenflow or parameter.grad is None:
        return False
    if dist.get_world_size(zero.real_dp_process_group[group]) > 1:
        return False
    return bool(zero._use_compact_grad_partition_buffer(group)) and parameter.numel() > 0


def _accumulate(
    target: Tensor, parameter: nn.Parameter, share: float, first: bool, stream: Any
) -> None:
    """Adds `share` of a gradient to `target` beside what is computed, and lets the gradient go.

    Args:
        first: `target` holds nothing of this step yet.
        stream: ZeRO's, which it waits for at the end of backward.
    """
    gradient, accelerator = parameter.grad, get_accelerator()
    assert gradient is not None
    if not accelerator.resolves_data_dependency():
        stream.wait_stream(accelerator.current_stream())
    with torch.no_grad(), accelerator.stream(stream):
        add_share_(target, gradient, share, first=first)
        if not accelerator.is_synchronized_device():
            gradient.record_stream(accelerator.current_stream())
    parameter.grad = None


# --- norm and clipping ------------------------------------------------------------------------


def _check_finite_by_norm(zero: Any) -> None:
    """Has ZeRO-1 and 2 skip a step for its gradient norm alone, as ZeRO-3 does.

    They read every gradient twice more beforehand to look for inf and NaN, and wait for the answer
    of all ranks; the norm, taken next, is not finite for the same gradients, and then the step is
    skipped all the same (zero/stage_1_and_2.py, `step`).
    """
    if zero.dtype != torch.float16:
        assert zero.compute_grad_norm
        zero.check_overflow = lambda partition_gradients=True: None


def _norm_at_once_zero3(zero: Any) -> None:
    """Has ZeRO-3 take one norm, of all gradients, instead of one a sub-group.

    Each of those is a pass that first widens to float64, and an exchange that the next waits for.
    Every element is in one partition of one rank, so one sum over all ranks is the whole
    (`_get_norm_groups` of zero/stage3.py). The device takes it as soon as a step begins, while the
    host puts Parameters away (`step`).
    """
    if zero.offload_optimizer:
        return
    begin_step, begun = zero._pre_step, list[Tensor]()

    def pre_step() -> None:
        begin_step()
        gradients = [zero.grad_partitions_flat_buffer]
        begun[:] = [_norm_over_ranks(gradients, zero.dp_process_group)]

    assert zero.model_parallel_group is None
    zero._pre_step = pre_step
    zero._get_norm_groups = lambda: [begun.pop()]


def _norm_at_once_zero12(zero: Any) -> None:
    """Has ZeRO-1 and 2 take one norm of all gradients; see `_norm_at_once_zero3`.

    Padding is zero there (`scaled_global_norm` of zero/stage_1_and_2.py).
    """

    def global_norm(norm_type: int = 2) -> Tensor:
        assert norm_type == 2, norm_type
        gradients: list[Tensor] = []
        for index in range(len(zero.bit16_groups)):
            of_group = zero.averaged_gradients[index]
            flat = getattr(of_group, "flat_partition", None)
            gradients.extend(of_group if flat is None else [flat])
        norm = _norm_over_ranks(gradients, zero.dp_process_group)
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, torch.inf))

    if not zero.cpu_offload:
        assert zero.model_parallel_group is None
        zero.scaled_global_norm = global_norm


def _norm_over_ranks(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Returns the float32 norm of what all ranks of `group` hold; added up in float64."""
    norms = torch.cat([_row_norms(gradient) for gradient in gradients])
    total = norms.double().square().sum()
    dist.all_reduce(total, group=group)
    return total.sqrt().float()


def _row_norms(gradient: Tensor) -> Tensor:
    """Returns a float32 vector that has the norm of `gradient`, read once."""
    flat = gradient.detach().reshape(-1)
    num_whole = flat.numel() // NORM_ROW * NORM_ROW
    rows = flat[:num_whole].view(-1, NORM_ROW)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return torch.cat([norms, flat[num_whole:].float()])


def _clip_in_optimizer(zero: Any, divide_gradients_by: Callable[[Tensor | None], None]) -> None:
    """Has ZeRO tell the client optimizer what to divide gradients by, for clipping and unscaling.

    It would multiply every gradient in a pass of its own, by one as well, and wait for the norm
    once a group (`unscale_and_clip_grads` of zero/stage_1_and_2.py and zero/stage3.py).
    """
    told: list[Tensor | None] = [None]  # the norm of the step under way: one for all groups

    def tell(_: Any, total_norm: Tensor | None) -> None:
        if total_norm is not None and told[0] is total_norm:
            return
        told[0] = total_norm
        scale, most = float(zero.loss_scale), float(zero.clip_grad)
        if total_norm is not None and most > 0.0:
            clip = ((total_norm.float() / scale + 1e-6) / most).clamp(min=1.0)
            divide_gradients_by(clip * scale)
        else:
            divide_gradients_by(None if scale == 1.0 else torch.tensor(scale, dtype=torch.float32))

    zero.unscale_and_clip_grads = tell


# --- gradients where the step reads them ------------------------------------------------------


def _step_in_place_zero3(zero: Any) -> None:
    """Has ZeRO-3's step read gradients where they lie, not a copy of each sub-group.

    Partitions lie end to end in one buffer, in the order of the sub-groups
    (`_prepare_fp32_grad_for_sub_group` of zero/stage3.py).
    """
    usual = zero._prepare_fp32_grad_for_sub_group

    def prepare(index: int) -> None:
        master = zero.fp32_partitioned_groups_flat[index]
        whole = _end_to_end(zero.averaged_gradients[index], zero.grad_partitions_flat_buffer)
        if whole is None or whole.dtype != master.dtype or whole.numel() != master.numel():
            usual(index)
            return
        master.grad = whole
        zero.averaged_gradients[index] = None

    zero._prepare_fp32_grad_for_sub_group = prepare


def _end_to_end(parts: Sequence[Tensor], buffer: Tensor) -> Tensor | None:
    """Returns the part of a flat `buffer` that `parts` are in their order, or None."""
    size = buffer.element_size()
    begin = end = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != buffer.dtype:
            return None
        end += part.numel() * size
    first, last = (begin - buffer.data_ptr()) // size, (end - buffer.data_ptr()) // size
    if first < 0 or last > buffer.numel():
        return None
    return buffer[first:last]
