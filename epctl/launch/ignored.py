"""Says which given settings a run will not use; silence would look like consent."""

from __future__ import annotations

from collections.abc import Iterator

from epctl.config import ResolvedConfig
from epctl.interval import parse_interval
from epctl.launch.dataset_reference import is_dataset
from epctl.output import Output

MUON_ONLY = (
    "momentum",
    "nesterov",
    "update_scale",
    "momentum_dtype",
    "per_head",
    "newton_schulz",
    "coefficients",
    "newton_schulz_steps",
    "kernels",
    "router",
)
# What the engine's own Muon has no setting for, or epctl's own code around it would do.
NOT_IN_DEEPSPEED_MUON = (
    "nesterov",
    "update_scale",
    "newton_schulz_steps",
    "kernels",
    "router",
    "momentum_dtype",
    "coefficients",
    "gradient_clipping",
    "qk_clip",
    "attention_logit_interval",
)


def warn_of_ignored_settings(resolved: ResolvedConfig, output: Output) -> None:
    """Writes one warning a setting that was given and has no effect."""
    for key, reason in ignored_settings(resolved):
        if resolved.is_given(key):
            output.warning(f"`{key}` is ignored: {reason}")


def warn_of_check_settings(resolved: ResolvedConfig, output: Output) -> None:
    """Writes a warning for each `check` setting of a run that is no check."""
    for key in ("check.num_layers", "check.steps"):
        if resolved.is_given(key):
            output.warning(f"`{key}` is ignored: this is a run, not a `--check`")


def ignored_settings(resolved: ResolvedConfig) -> Iterator[tuple[str, str]]:
    """Yields (key, reason) of every setting without effect in this configuration."""
    config = resolved.config
    if config.optim.name == "adamw":
        yield from ((f"optim.{name}", "the optimizer is adamw") for name in MUON_ONLY)
    if config.optim.name == "deepspeed-muon":
        reason = "DeepSpeed's own Muon has no such setting"
        yield from ((f"optim.{name}", reason) for name in NOT_IN_DEEPSPEED_MUON)
    if config.optim.qk_clip is not None:
        yield "optim.attention_logit_interval", "`optim.qk_clip` measures every step"
    if config.optim.schedule != "wsd":
        yield "optim.decay_ratio", f"the schedule is {config.optim.schedule}"
    if config.model.reference is None:
        yield "model.tokenizer", "without MODEL the embedded tokenizer belongs to the model"
        yield "model.trust_remote_code", "without MODEL nothing remote is read"
    if config.model.reference is None and not config.data.train:
        reason = "without MODEL and `--data` the embedded text is used"
        for name in ("eval", "format", "packing", "held_out_share", "shuffle"):
            yield f"data.{name}", reason
    if not any(is_dataset(pattern) for pattern in (*config.data.train, *config.data.eval)):
        for name in ("split", "eval_split", "streaming"):
            yield f"data.{name}", "the data is no hub dataset"
    if not any(is_dataset(pattern) for pattern in config.data.train):
        yield "data.shuffle_window", "local data is shuffled whole"
    elif not config.data.shuffle:
        yield "data.shuffle_window", "`data.shuffle` is false"
    if config.data.eval:
        yield "data.held_out_share", "`--eval-data` is given"
    if parse_interval(config.checkpoint.every) is None:
        yield "checkpoint.keep", "`checkpoint.every` is off"
    if config.guards.spike == "skip" and config.optim.name == "deepspeed-muon":
        yield "guards.spike", "DeepSpeed's own Muon makes every update; a spike only warns"
    if config.guards.spike == "off":
        yield "guards.spike_factor", "`guards.spike` is off"
        yield "guards.spike_window", "`guards.spike` is off"
