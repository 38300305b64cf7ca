"""Where epctl relies on an internal of DeepSpeed 0.19.8: gradients in host memory.

A part of deepspeed_seams.py, with its rules.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def complete_offloaded(engine: Any) -> None:
    """Has an offloading ZeRO step with the gradients of this step's micro-steps, all of them.

    It copies a gradient to the host in the last backward, if that reaches the Parameter: of one
    that only earlier micro-steps reached the sum is lost, and in both cases the step takes what
    the step before had left there. Its end of a step by hand looks through all micro-steps
    (`_finalize_offload_gradient_accumulation` of zero/stage3.py,
    `_finalize_cpu_offload_gradient_accumulation` of zero/stage_1_and_2.py); whom that does not
    find has a gradient of zero.
    """
    zero = engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3) and zero.offload_optimizer:
        begin_step = zero._pre_step

        def pre_step() -> None:
            _complete_zero3(zero)
            begin_step()

        zero._pre_step = pre_step
    elif isinstance(zero, DeepSpeedZeroOptimizer) and zero.cpu_offload:
        step = zero.step

        def complete_and_step(*inputs: Any, **named: Any) -> Any:
            _complete_zero12(zero)
            return step(*inputs, **named)

        zero.step = complete_and_step


def _complete_zero3(zero: Any) -> None:
    norms, number_of = zero.norm_for_param_grads, zero.get_param_id
    parameters = [parameter for group in zero.fp16_groups for parameter in group]
    copied = {parameter.ds_id for parameter in parameters if number_of(parameter) in norms}
    zero._offload_boundary_param_ids -= copied
    zero._finalize_offload_gradient_accumulation()
    for parameter in parameters:
        if number_of(parameter) not in norms:
            group, offset, _ = zero.grad_position[number_of(parameter)]
            host = zero.fp32_partitioned_groups_flat[group].grad
            host.narrow(0, offset, parameter.partition_numel()).zero_()


def _complete_zero12(zero: Any) -> None:
    norms, number_of = zero.norm_for_param_grads, zero.get_param_id
    zero._offload_accumulated_param_ids -= set(norms)
    zero._finalize_cpu_offload_gradient_accumulation()
    for group, parameters in enumerate(zero.params_in_partition):
        for number in map(number_of, parameters):
            if number not in norms:
                _, _, offset, num_elements = zero.grad_position[number]
                host = zero.single_partition_of_fp32_groups[group].grad
                host.view(-1).narrow(0, offset, num_elements).zero_()
