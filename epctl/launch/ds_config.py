"""The DeepSpeed JSON of a run, and why each key has its value. Pure: no torch, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from epctl.config import WHOLE_LAYERS, RunConfig
from epctl.errors import ConfigError


def deepspeed_config(
    config: RunConfig, *, bfloat16: bool, on_cpu: bool, num_experts: int | None = None
) -> dict[str, Any]:
    """Returns the config dict for `deepspeed.initialize`; `REASONS` explains the keys.

    Expert parallelism of epctl's layer stays out of it: the layer exists before the engine does.
    Sequence parallelism too: to the engine its ranks are data-parallel ones.

    Raises ConfigError for offload at ZeRO-0, which has nothing to offload, and for settings that
    need whole sequences on a rank.
    """
    _require_sequence_settings(config)
    stage = config.parallel.zero
    zero: dict[str, Any] = {"stage": stage, "reduce_scatter": True, "overlap_comm": not on_cpu}
    if on_cpu:
        zero |= {"reduce_bucket_size": 2**24, "allgather_bucket_size": 2**24}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 10_000}
        if config.train.activation_checkpointing in WHOLE_LAYERS:
            zero |= {"memory_efficient_linear": False}
        if on_cpu:
            zero |= {"stage3_prefetch_bucket_size": 2**22}
    if config.optim.offload:
        if stage == 0:
            raise ConfigError("optim.offload needs ZeRO 1, 2 or 3, not 0", hint="use `--zero 2`")
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.optim.gradient_clipping if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
    }
    if bfloat16 and _accumulates_in_float32(config):
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.optim.name == "deepspeed-muon":
        _use_deepspeed_muon(result, config, on_cpu)
    if config.moe.implementation == "autoep":
        result["expert_parallel"] = {
            "enabled": True,
            "autoep_size": config.parallel.ep,
            "preset_model": "deepseek_v3",
        }
    return result


def _require_sequence_settings(config: RunConfig) -> None:
    """Raises ConfigError for what cannot be done while a sample lies on several ranks."""
    sp, optim = config.parallel.sp, config.optim
    if sp == 1:
        return
    if optim.qk_clip is not None or optim.attention_logit_interval:
        key = "qk_clip" if optim.qk_clip is not None else "attention_logit_interval"
        raise ConfigError(
            f"`optim.{key}` looks at the queries and keys of whole sequences; with `--sp {sp}` a "
            "rank holds a part",
            hint=f"leave `optim.{key}` out, or use `--sp 1`",
        )
    if config.moe.implementation == "autoep":
        raise ConfigError(
            f"`--moe autoep` with `--sp {sp}`: DeepSpeed's own layer is for comparison at `--sp 1`",
            hint="use epctl's layer, `--moe epctl`",
        )
    if config.train.sequence_length < sp:
        raise ConfigError(
            f"`train.sequence_length` = {config.train.sequence_length} tokens cannot be cut for "
            f"{sp} ranks"
        )


def _use_deepspeed_muon(result: dict[str, Any], config: RunConfig, on_cpu: bool) -> None:
    """Lets the engine build its own Muon, and steers around what its stages get wrong with it.

    It clips the update by the update's own norm, so clipping is off; ZeRO-3 refuses it together
    with reduce_scatter; `torch_adam` saves a build with a compiler on CPU.
    """
    optim = config.optim
    result["gradient_clipping"] = 0.0
    result["zero_optimization"]["reduce_scatter"] = config.parallel.zero < 3
    result["optimizer"] = {
        "type": "Muon",
        "params": {
            "lr": optim.lr,
            "muon_lr": optim.lr,
            "adam_lr": optim.adamw_lr or optim.lr,
            "momentum": optim.momentum,
            "weight_decay": optim.weight_decay,
            "betas": [optim.beta1, optim.beta2],
            "eps": optim.eps,
            "ns_method": "standard" if optim.newton_schulz == "standard" else "gram",
            "per_head_muon": optim.per_head,
            "torch_adam": on_cpu,
        },
    }


def _accumulates_in_float32(config: RunConfig) -> bool:
    """ZeRO-0 refuses it; ZeRO-1 pays a float32 gradient of everything, so only for a sum.

    There it means another optimizer class, which takes neither offload nor DeepSpeed's Muon with
    experts.
    """
    if config.parallel.zero == 1:
        several = config.train.gradient_accumulation_steps > 1
        return several and not config.optim.offload and config.optim.name != "deepspeed-muon"
    return config.parallel.zero >= 2


# Why a value is what it is, for every key that `deepspeed_config` can write.
REASONS: dict[str, str] = {
    "train_micro_batch_size_per_gpu": "sequences a rank and micro-step",
    "gradient_accumulation_steps": "micro-steps a step",
    "gradient_clipping": (
        "acts on the raw gradient before the optimizer; stated because an absent key means 1.0; "
        "0 at ZeRO-0, where the engine averages expert norms over ranks and epctl clips itself, "
        "and 0 with DeepSpeed's Muon, whose update it would divide by the update's own norm"
    ),
    "zero_allow_untested_optimizer": "epctl hands its own optimizer to the engine",
    "zero_force_ds_cpu_optimizer": "the same, when `optim.offload` puts masters and state on CPU",
    "zero_optimization.stage": "what is partitioned: 1 optimizer state, 2 gradients, 3 parameters",
    "zero_optimization.reduce_scatter": (
        "ZeRO-1/2 with experts needs it; epctl's Muon allows it; DeepSpeed's own at ZeRO-3 does not"
    ),
    "zero_optimization.overlap_comm": "on GPUs only: gloo gains nothing from it",
    "zero_optimization.reduce_bucket_size": "on CPU: small buckets, a host's memory is shared",
    "zero_optimization.allgather_bucket_size": "on CPU: small buckets, a host's memory is shared",
    "zero_optimization.stage3_param_persistence_threshold": (
        "elements below which a parameter stays whole: norms and biases do, router weights do not"
    ),
    "zero_optimization.stage3_prefetch_bucket_size": "on CPU: no copy runs ahead of its use",
    "zero_optimization.offload_optimizer.device": "`optim.offload`: state in host memory",
    "zero_optimization.memory_efficient_linear": (
        "torch's own linear: the engine's keeps weights from living between forward and backward, "
        "which recomputed layers (all but the last) do not do, and takes its time in Python"
    ),
    "zero_optimization.offload_optimizer.pin_memory": "pinned for copies from a GPU",
    "bf16.enabled": "`train.precision`: auto is bfloat16 on GPUs, float32 on CPU",
    "data_types.grad_accum_dtype": (
        "micro-steps add up in float32; at ZeRO-1 only if there is more than one, at ZeRO-0 never: "
        "the engine refuses it"
    ),
    "steps_per_print": "epctl reports instead",
    "wall_clock_breakdown": "epctl reports instead; it would synchronise at every timer",
    "timers.throughput.enabled": "epctl reports instead; it stops the host twice a step",
    "optimizer.type": "`optim.name` deepspeed-muon: the engine builds its own, for comparison",
    "optimizer.params.lr": "the rate of groups that neither of the next two names",
    "optimizer.params.muon_lr": "rate of the matrices",
    "optimizer.params.adam_lr": "rate of everything else; default: the same",
    "optimizer.params.momentum": "Muon momentum",
    "optimizer.params.weight_decay": "decoupled",
    "optimizer.params.betas": "AdamW",
    "optimizer.params.eps": "AdamW",
    "optimizer.params.ns_method": "the Gram form unless the standard one is asked for",
    "optimizer.params.per_head_muon": "each attention head orthogonalised apart",
    "optimizer.params.torch_adam": "on CPU: torch's Adam, because the fused one needs a compiler",
    "expert_parallel.enabled": "`moe.implementation` autoep: the engine replaces the MoE blocks",
    "expert_parallel.autoep_size": "ranks that share one set of experts",
    "expert_parallel.preset_model": "stated, so that an unknown model type cannot train without EP",
}
# The setting a value is taken from; its source says who chose it.
SETTINGS: dict[str, str] = {
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "optim.gradient_clipping",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "optim.offload",
    "bf16.enabled": "train.precision",
    "optimizer.type": "optim.name",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.muon_lr": "optim.lr",
    "optimizer.params.adam_lr": "optim.adamw_lr",
    "optimizer.params.momentum": "optim.momentum",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.ns_method": "optim.newton_schulz",
    "optimizer.params.per_head_muon": "optim.per_head",
    "expert_parallel.enabled": "moe.implementation",
    "expert_parallel.autoep_size": "parallel.ep",
}


def flat_keys(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value of the DeepSpeed JSON by its dotted key."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from flat_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
