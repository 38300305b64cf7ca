"""The settings of checkpoints and guards, and what every section of a RunConfig is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from epctl.interval import checked_interval, interval_text


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values are never coerced from odd types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False
    )


# `500steps`, `30min`, `off`; a bare number counts steps.
IntervalText = Annotated[str, BeforeValidator(interval_text), AfterValidator(checked_interval)]


class CheckpointSection(Section):
    every: IntervalText = Field(
        "off", description="time between checkpoints: 500steps, 30min, 2h, or off"
    )
    keep: int = Field(2, ge=2, description="newest checkpoints that are kept")
    asynchronous: bool = Field(
        True, description="train on while a copy in host memory is written to the disk"
    )
    on_full_disk: Literal["continue", "stop"] = Field(
        "continue", description="what a run does when a checkpoint does not fit the disk"
    )
    grace_seconds: float = Field(
        100.0, ge=0, description="longest wait for the last checkpoint after SIGTERM; 0 writes none"
    )


class GuardsSection(Section):
    non_finite: Literal["stop", "off"] = Field(
        "stop", description="on a loss or gradient that is not finite, before the update"
    )
    spike: Literal["off", "warn", "skip", "stop"] = Field(
        "warn", description="on a loss far above the recent ones, before the update"
    )
    spike_factor: float = Field(
        2.0, gt=1, description="times the median of recent losses that is far above"
    )
    spike_window: int = Field(50, ge=8, description="steps that the median is taken over")
    stall_minutes: float = Field(
        20.0, ge=0, description="time without progress after which a rank counts as stalled; 0: off"
    )
