"""Where epctl relies on an internal of DeepSpeed 0.19.8: groups, layers, partitions.

What happens to gradients is in deepspeed_gradients.py, to those in host memory in
deepspeed_offload.py, the step to the model's weights in deepspeed_step.py, what ZeRO-3 need not
gather in deepspeed_whole.py; nothing else may.

Each function names the upstream file it leans on. `tests/distributed/test_seams.py` holds one test
a seam and fails loudly when an upgrade moves it.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.autoep_affine import (
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from epctl.runtime.decoder import decoder_layers
from epctl.runtime.flat_partition import FlatPartition, Fragment, end_to_end
from epctl.runtime.mesh import Mesh, validate_expert_parallel, validate_sequence_parallel

__all__ = [
    "AutoEPMoELayer",
    "FlatPartition",
    "Fragment",
    "client_optimizer",
    "create_mesh",
    "flat_partitions",
    "frozen_experts",
    "full_parameters",
    "gather_by_layer",
    "initialize_distributed",
    "mark_expert_layer",
    "partition_module",
    "release_engine",
    "replica_group",
    "split_expert_groups",
]

# --- process groups ---------------------------------------------------------------------------


def initialize_distributed(device_type: str, timeout: datetime.timedelta) -> None:
    """Starts torch.distributed under DeepSpeed: NCCL on CUDA, gloo on CPU.

    On CPU DeepSpeed would JIT-build a shared-memory op for a minute (comm/torch.py, build_shm_op);
    declaring it incompatible skips the build, and no compiler is needed.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device_type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def create_mesh(ep_size: int, sp_size: int = 1) -> Mesh:
    """Creates DeepSpeed's ep and edp groups, which the engine then reuses (utils/groups.py).

    The engine is not told of `sp_size`: to it every rank is a data-parallel one, and it averages
    gradients over all of them.

    Raises ConfigError if one of the sizes does not divide the number of ranks.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    validate_expert_parallel(ep_size, num_ranks)
    validate_sequence_parallel(sp_size, num_ranks)
    name = group_name(ep_size)
    if name not in deepspeed_groups._get_expert_parallel_group_dict():
        deepspeed_groups._create_expert_and_data_parallel(ep_size)
    ep_group = deepspeed_groups._get_expert_parallel_group(name)
    edp_group = deepspeed_groups._get_expert_data_parallel_group(name)
    return Mesh(rank, num_ranks, ep_size, dist.get_rank(ep_group), ep_group, edp_group, sp_size)


def group_name(ep_size: int) -> str:
    """Returns DeepSpeed's name for the groups of an expert parallel size."""
    return f"ep_size_{ep_size}"


# --- expert layers ----------------------------------------------------------------------------


def mark_expert_layer(layer: AutoEPMoELayer, mesh: Mesh, num_experts: int) -> None:
    """Gives a layer built without a source module what the engine looks for.

    runtime/engine.py finds it by isinstance, wants `ep_size`, `ep_rank`, `num_experts`,
    `num_local_experts`, `ep_group_name` and `ep_group`, and a child `experts` with Parameters
    `w1`, `w2`, `w3`; DeepSpeed's own save wants the placement descriptor and a dict a Parameter.
    """
    num_local_experts = mesh.num_local_experts(num_experts)
    layer.ep_size, layer.ep_rank = mesh.ep_size, mesh.ep_rank
    layer.num_experts, layer.num_local_experts = num_experts, num_local_experts
    layer.ep_group_name, layer.ep_group = group_name(mesh.ep_size), mesh.ep_group
    assert layer.ep_group is None or isinstance(layer.ep_group, dist.ProcessGroup)
    layer.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
        num_experts, num_local_experts, mesh.ep_size
    )
    for parameter in layer.experts.parameters():
        mark_expert_parameter(parameter, layer, mesh.local_experts(num_experts))


def mark_expert_parameter(parameter: nn.Parameter, layer: Any, local_experts: range) -> None:
    """Marks one expert Parameter for reduction over its edp group and for DeepSpeed's save."""
    logical_shape = [layer.num_experts, *parameter.shape[1:]]
    placement = layer.expert_placement_descriptor
    attributes = {
        "allreduce": False,
        "group_name": layer.ep_group_name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": layer.ep_group_name,
        DS_AUTOEP_UC_META: {
            AUTOEP_EXPERT_PLACEMENT: placement,
            AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
            AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
            AUTOEP_PARAM_EP_RANK: layer.ep_rank,
            AUTOEP_PARAM_LOCAL_EXPERTS: list(local_experts),
        },
    }
    for name, value in attributes.items():
        setattr(parameter, name, value)


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """True for a Parameter that lives on one ep rank only (moe/utils.py, is_moe_param)."""
    return not getattr(parameter, "allreduce", True)


def split_expert_groups(parameter_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Splits client parameter groups into expert and dense ones, dropping empty ones.

    The engine does not do it for a client optimizer; expert groups carry `moe: True` and the name
    of their process group, extra keys survive (moe/utils.py). ZeRO steps groups in this order:
    experts first, whose step is long on the GPU and short on the host, so that the host is ahead
    when it comes to the many small pieces of dense matrices.
    """
    split = split_params_into_different_moe_groups_for_optimizer(parameter_groups)
    groups = [group for group in split if group["params"]]
    return sorted(groups, key=lambda group: not group.get("moe", False))


@contextlib.contextmanager
def frozen_experts() -> Iterator[None]:
    """Lets ZeRO-1/2 start with expert layers none of whose Parameters is trained.

    Its constructor asserts a group marked as MoE whenever the model has such layers
    (zero/stage_1_and_2.py, _configure_moe_settings); with frozen experts there is nothing to mark.
    """

    def mark_none(self: Any) -> None:
        self.is_moe_param_group = [False] * len(self.optimizer.param_groups)

    original = DeepSpeedZeroOptimizer._configure_moe_settings
    DeepSpeedZeroOptimizer._configure_moe_settings = mark_none
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer._configure_moe_settings = original


# --- ZeRO-3 partitioning ----------------------------------------------------------------------


def partition_module(module: nn.Module, group: Any, deepspeed_config: dict[str, Any]) -> None:
    """Partitions a module's Parameters over `group` now, so no rank keeps them whole.

    Experts must use their edp group (engine.py checks it), everything else the default group;
    Parameters already partitioned are skipped (zero/partition_parameters.py).
    """
    deepspeed.zero.Init(
        module=module, data_parallel_group=group, config_dict_or_path=deepspeed_config
    )


def gather_by_layer(model: Any, stage: int) -> None:
    """Has ZeRO-3 gather a decoder layer's Parameters together, with one pair of hooks a layer.

    By default every small module has hooks of its own, in Python, forward, in recomputation and
    backward: on two H200 they took longer than the work between them (utils/z3_leaf_module.py).

    DeepSpeed reduces what is in such a layer when the gradient of its input is known
    (zero/stage3.py, `_leaf_module_hooks`). Where the input needs none, that is before the layer's
    own gradients are: so never the first layer that is trained behind frozen ones, nor towers,
    which take pixels, may be called twice, or with names alone.
    """
    layers = decoder_layers(model)
    if stage < 3 or not layers:
        return
    if len({id(layer) for layer in layers}) < len(layers):
        return  # one that is called twice would be reduced twice
    input_trains = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    for layer in layers:
        if input_trains:
            set_z3_leaf_module(layer, True)
        input_trains |= any(p.requires_grad for p in layer.parameters())


@contextlib.contextmanager
def full_parameters(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Shows whole Parameters at ZeRO-3; does nothing at other stages. A collective."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield


def full_shape(parameter: Tensor) -> torch.Size:
    """Returns the shape of a Parameter or buffer, also where ZeRO-3 holds only a slice of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


# --- what a client optimizer receives ---------------------------------------------------------


def flat_partitions(engine: Any) -> list[FlatPartition]:
    """Returns the layout of every tensor that `step()` of a client optimizer will see.

    Order is the same on all ranks of a group. Covers ZeRO-0 (float32 and bf16), 1, 2 and 3, and
    ZeRO-1 in bf16 with float32 accumulation, which DeepSpeed gives to another class.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _partitions_zero3(optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _partitions_zero12(optimizer)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return _partitions_bf16_optimizer(optimizer)
    if hasattr(optimizer, "fp16_groups"):  # ZeRO-0 bf16: float32 copies, one a Parameter
        pairs = zip(
            [p for group in optimizer.fp16_groups for p in group],
            [p for group in optimizer.fp32_groups for p in group],
            strict=True,
        )
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        pairs = zip(parameters, parameters, strict=True)
    return [
        FlatPartition(master, None, 0, ((Fragment(p, 0, p.numel(), 0),),)) for p, master in pairs
    ]


def _partitions_zero3(optimizer: Any) -> list[FlatPartition]:
    """runtime/zero/stage3.py: rank k holds `[k*c, (k+1)*c)` of each Parameter, padded to c."""
    result = []
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        group = optimizer._get_sub_group_process_group(index)
        by_rank = tuple(
            tuple(
                _slice_of(
                    parameter,
                    rank * parameter.partition_numel(),
                    parameter.partition_numel(),
                    optimizer.grad_position[optimizer.get_param_id(parameter)][1],
                )
                for parameter in optimizer.fp16_groups[index]
            )
            for rank in range(dist.get_world_size(group))
        )
        result.append(FlatPartition(flat, group, dist.get_rank(group), by_rank))
    return result


def _slice_of(parameter: nn.Parameter, start: int, length: int, offset: int) -> Fragment:
    num_elements = full_shape(parameter).numel()
    start = min(start, num_elements)
    return Fragment(parameter, start, min(length, num_elements - start), offset)


def _partitions_zero12(optimizer: Any) -> list[FlatPartition]:
    """runtime/zero/stage_1_and_2.py: Parameters laid end to end, cut into equal pieces."""
    result = []
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        parameters = optimizer.round_robin_bit16_groups[index]
        offsets = optimizer.round_robin_bit16_offsets[index]
        placed = list(zip(parameters, offsets, strict=True))
        length = int(optimizer.partition_size[index])
        group = optimizer.real_dp_process_group[index]
        result.append(end_to_end(flat, group, placed, length))
    return result


def _partitions_bf16_optimizer(optimizer: Any) -> list[FlatPartition]:
    """runtime/bf16_optimizer.py: as at ZeRO-1, under other names and without an offset table."""
    result = []
    for index, flat in enumerate(optimizer.fp32_groups_flat_partition):
        parameters = optimizer.bf16_groups[index]
        ends = list(itertools.accumulate(p.numel() for p in parameters))
        placed = [(p, end - p.numel()) for p, end in zip(parameters, ends, strict=True)]
        group = optimizer.real_dp_process_group[index]
        result.append(end_to_end(flat, group, placed, flat.numel()))
    return result


def replica_group(parameter: nn.Parameter) -> dist.ProcessGroup | None:
    """Returns the ranks that hold the same whole Parameter at ZeRO-0; None without a job.

    The edp group of an expert (utils/groups.py), all ranks for everything else.
    """
    if not dist.is_initialized():
        return None
    if not is_expert_parameter(parameter):
        return dist.group.WORLD
    name = getattr(parameter, "group_name")  # noqa: B009  (an attribute DeepSpeed adds)
    group: dist.ProcessGroup = deepspeed_groups._get_expert_data_parallel_group(name)
    return group


def client_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Returns the optimizer inside the engine's ZeRO wrapper (engine.py, `basic_optimizer`)."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    return optimizer


def release_engine(engine: Any) -> None:
    """Destroys an engine so that its memory is free once nothing else refers to it.

    ZeRO-3 keeps the model of the last forward on a module-level stack
    (zero/parameter_offload.py, FWD_MODULE_STACK), and from the second step on the whole optimizer
    as the key of a class's cache (zero/partitioned_param_coordinator.py, `__params_to_release`).
    """
    engine.destroy()
    FWD_MODULE_STACK.clear()
    release = vars(PartitionedParameterCoordinator)[
        "_PartitionedParameterCoordinator__params_to_release"
    ]
    inspect.getclosurevars(release).nonlocals["func"].cache_clear()  # under `instrument_w_nvtx`


def gradient_norm(engine: Any) -> float:
    """Returns the norm of the raw averaged gradient of the last step, before clipping."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else float("nan")


def clip_gradients_zero0(engine: Any, mesh: Mesh, max_norm: float) -> float:
    """Clips at ZeRO-0, where the engine would average expert norms over ranks; returns the norm.

    Gradients are already averaged at an accumulation boundary. Experts of the ep group's other
    ranks count once each (runtime/utils.py, clip_grad_norm_; upstream #8469).
    """
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for parameter in parameters:
        index = int(is_expert_parameter(parameter))
        squares[index] += parameter.grad.double().square().sum()
    dist.all_reduce(squares[1:], group=mesh.ep_group)
    norm = float(squares.sum().sqrt())
    if 0 < max_norm < norm:
        for parameter in parameters:
            parameter.grad.mul_(max_norm / (norm + 1e-6))
    return norm
