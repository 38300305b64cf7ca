"""Where epctl relies on an internal of DeepSpeed 0.19.8: Parameters that ZeRO-3 need not gather.

A part of deepspeed_seams.py, with its rules. What a group of one rank holds is never cut:
experts where EP is all ranks, everything on one rank. ZeRO-3 fetches it all the same, layer by
layer: it counts against the bucket of what is fetched ahead, so that nothing of the next layer is,
and the host waits for the stream of gathers (zero/partition_parameters.py,
`NoGatherCoalescedHandle.wait`) with no work left for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor


def show_whole(engine: Any) -> None:
    """Has ZeRO-3 leave a Parameter that its rank holds whole where it is, from forward to step.

    Shown, it is a view of its partition, as after DeepSpeed's own fetch. Marked persistent, no
    layer releases it (zero/partitioned_param_coordinator.py, `__params_to_release`); it is not on
    the list of those that are gathered after a step. Whoever takes all Parameters away finds it
    gone as ever (`partition_all_parameters`), and the next forward shows it again. Nothing is done
    at other stages or where partitions lie in host memory.
    """
    zero = engine.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return
    whole: list[Any] = [p for p in engine.module.parameters() if _is_whole(p, engine.device)]
    if not whole:
        return
    offload = zero.parameter_offload
    coordinator = offload.get_param_coordinator()
    begin_forward, take_away = coordinator.reset_step, offload.partition_all_parameters
    nothing = {p.dtype: torch.empty(0, dtype=p.dtype, device=engine.device) for p in whole}

    def show() -> None:
        begin_forward()  # forgets how much is available
        for parameter in whole:
            if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE:
                parameter.data = parameter.ds_tensor.data.view(parameter.ds_shape)
                parameter.ds_status = ZeroParamStatus.AVAILABLE

    def hide() -> None:
        for parameter in whole:
            if parameter.ds_status is ZeroParamStatus.AVAILABLE:
                parameter.ds_active_sub_modules.clear()
                parameter.data = nothing[parameter.dtype]
                parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        take_away()

    for parameter in whole:
        parameter.ds_persist = True
    # Before the first module of a forward fetches ahead, or these would be what it fetches.
    coordinator.reset_step = show
    offload.partition_all_parameters = hide


def _is_whole(parameter: Any, device: torch.device) -> bool:
    partition: Tensor = parameter.ds_tensor
    if dist.get_world_size(parameter.ds_process_group) > 1 or partition.device != device:
        return False
    return partition.dtype == parameter.dtype and partition.numel() == int(parameter.ds_numel)
