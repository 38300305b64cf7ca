"""What a run must obey before it starts: the one owner, asked by `train` and by the planner."""

from __future__ import annotations

from dataclasses import dataclass

from epctl.config import RunConfig
from epctl.errors import ConfigError, EpctlError
from epctl.launch.ds_config import deepspeed_config
from epctl.layout.model import ModelLayout
from epctl.runtime.mesh import validate_expert_parallel, validate_sequence_parallel


@dataclass(frozen=True)
class ModelLimits:
    """What of a model decides which sizes are legal; None experts for a dense one.

    Sequences may be cut over any divisor of the ranks: heads that do not divide are shared out
    unevenly (runtime/sequence/heads.py).
    """

    num_experts: int | None
    packs_patches: bool = True


def model_limits(layout: ModelLayout) -> ModelLimits:
    """Returns the limits that a layout sets."""
    packs_patches = layout.vision is None or layout.vision.temporal_patch_size is not None
    return ModelLimits(layout.moe.num_experts if layout.moe else None, packs_patches)


def require_legal(config: RunConfig, num_ranks: int, device: str, limits: ModelLimits) -> None:
    """Raises ConfigError, with the numbers, for a combination that no run can have."""
    if limits.num_experts is None and config.parallel.ep > 1:
        raise ConfigError(
            f"expert parallel size {config.parallel.ep} for a model without routed experts",
            hint="use `--ep 1`",
        )
    if config.parallel.share_images and not limits.packs_patches:
        raise ConfigError(
            "`parallel.share_images` deals out packed patches, and the tower of this model takes "
            "whole images or tiles",
            hint="leave it out: the ranks of a sample share its images all the same (`--sp N`)",
        )
    validate_expert_parallel(config.parallel.ep, num_ranks, limits.num_experts)
    validate_sequence_parallel(config.parallel.sp, num_ranks)
    bfloat16 = config.train.uses_bfloat16(device)
    deepspeed_config(config, bfloat16=bfloat16, on_cpu=device == "cpu")


def why_illegal(config: RunConfig, num_ranks: int, device: str, limits: ModelLimits) -> str | None:
    """Returns why a combination is illegal, None when it is legal."""
    try:
        require_legal(config, num_ranks, device, limits)
    except EpctlError as error:
        return error.message
    return None
