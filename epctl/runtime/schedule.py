"""Learning-rate schedules: one factor on every group's own rate, experts included. Pure."""

from __future__ import annotations

import math

from epctl.config import OptimSection


def rate_factor(step: int, num_steps: int, optim: OptimSection) -> float:
    """Returns the factor for step `step` (from 0): linear warm-up, then the chosen shape.

    `wsd` stays at one and decays linearly over the last `decay_ratio` of the steps.
    """
    if step < optim.warmup_steps:
        return (step + 1) / (optim.warmup_steps + 1)
    span = max(1, num_steps - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    low = optim.min_lr_ratio
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "linear":
        return 1.0 - (1.0 - low) * progress
    if optim.schedule == "cosine":
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    into_decay = max(0.0, progress - (1.0 - optim.decay_ratio)) / optim.decay_ratio
    return 1.0 - (1.0 - low) * into_decay
