"""What a run must obey before it starts: the one owner, asked by `train` and by the planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from epctl.config import RunConfig
from epctl.errors import ConfigError, EpctlError
from epctl.launch.ds_config import deepspeed_config
from epctl.layout.model import ModelLayout
from epctl.runtime.mesh import validate_expert_parallel


@dataclass(frozen=True)
class ModelLimits:
    """What of a model decides which sizes are legal; sequence sizes carry their reasons."""

    num_experts: int | None
    refused_sequence_sizes: Mapping[int, str]


def model_limits(layout: ModelLayout) -> ModelLimits:
    """Returns the limits that a layout sets."""
    refused = {entry.size: entry.reason for entry in layout.sequence_parallel if not entry.legal}
    return ModelLimits(layout.moe.num_experts if layout.moe else None, refused)


def require_legal(config: RunConfig, num_ranks: int, device: str, limits: ModelLimits) -> None:
    """Raises ConfigError, with the numbers, for a combination that no run can have."""
    if limits.num_experts is None and config.parallel.ep > 1:
        raise ConfigError(
            f"expert parallel size {config.parallel.ep} for a model without routed experts",
            hint="use `--ep 1`",
        )
    validate_expert_parallel(config.parallel.ep, num_ranks, limits.num_experts)
    require_sequence_parallel(getattr(config.parallel, "sp", 1), num_ranks, limits)
    bfloat16 = config.train.uses_bfloat16(device)
    deepspeed_config(config, bfloat16=bfloat16, on_cpu=device == "cpu")


def require_sequence_parallel(sp: int, num_ranks: int, limits: ModelLimits) -> None:
    """Raises ConfigError if a sequence cannot be cut over `sp` ranks."""
    if num_ranks % sp:
        raise ConfigError(
            f"sequence parallel size {sp} does not divide the {num_ranks} ranks",
            hint=f"use a divisor of {num_ranks}",
        )
    if sp in limits.refused_sequence_sizes:
        raise ConfigError(
            f"sequence parallel size {sp}: {limits.refused_sequence_sizes[sp]}",
            hint="`epctl inspect` lists the legal sizes",
        )


def why_illegal(config: RunConfig, num_ranks: int, device: str, limits: ModelLimits) -> str | None:
    """Returns why a combination is illegal, None when it is legal."""
    try:
        require_legal(config, num_ranks, device, limits)
    except EpctlError as error:
        return error.message
    return None
