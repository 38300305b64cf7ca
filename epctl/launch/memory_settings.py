"""The settings that decide a rank's memory: a run's config reduced to them, and engine buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epctl.config import WHOLE_LAYERS, Recompute, RunConfig
from epctl.launch.ds_config import deepspeed_config

# Elements; what DeepSpeed 0.19.8 takes where the JSON is silent (runtime/zero/config.py).
DEEPSPEED_DEFAULTS: Mapping[str, int] = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True, slots=True)
class EngineBuffers:
    """Sizes, in elements, of what the engine allocates by its config and not by the model."""

    reduce_bucket: int
    num_buckets: int
    prefetch: int
    persistence_threshold: int
    reuse_distance: int
    sub_group: int
    gradient_bytes: int

    @classmethod
    def of(cls, deepspeed: Mapping[str, Any], *, bfloat16: bool) -> EngineBuffers:
        """Reads a DeepSpeed JSON, its own defaults where a key is absent."""
        zero = deepspeed["zero_optimization"]
        values = {key: int(zero.get(key, value)) for key, value in DEEPSPEED_DEFAULTS.items()}
        accumulates = deepspeed.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            reduce_bucket=values["reduce_bucket_size"],
            num_buckets=2 if zero.get("overlap_comm") else 1,
            prefetch=values["stage3_prefetch_bucket_size"],
            persistence_threshold=values["stage3_param_persistence_threshold"],
            reuse_distance=values["stage3_max_reuse_distance"],
            sub_group=values["sub_group_size"],
            gradient_bytes=2 if bfloat16 and accumulates != "fp32" else 4,
        )


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One way to run a model on `num_ranks` ranks."""

    num_ranks: int
    ep: int
    zero: int
    micro_batch: int
    sequence_length: int
    engine: EngineBuffers
    accumulation: int = 1
    checkpointing: Recompute = "none"
    recomputes_experts: bool = False
    offload: bool = False
    optimizer: str = "muon"
    own_optimizer: bool = True
    momentum_bytes: int = 4
    sp: int = 1
    bfloat16: bool = True
    on_cpu: bool = False
    is_packed: bool = True
    logits_bytes: float = math.inf
    imbalance: float = 1.0
    patches: int = 0

    @property
    def recomputes_layers(self) -> bool:
        """Whole decoder layers, with or without what attention computed."""
        return self.checkpointing in WHOLE_LAYERS

    @property
    def recomputed(self) -> str:
        """What backward makes again, in a word."""
        if not self.recomputes_experts:
            return self.checkpointing
        return "experts" if self.checkpointing == "none" else f"{self.checkpointing}+experts"

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.num_ranks // self.ep

    @property
    def num_tokens(self) -> float:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch * self.sequence_length / self.sp

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks."""
        rows = self.micro_batch * self.accumulation * (self.num_ranks // self.sp)
        return rows * self.sequence_length

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bfloat16 else 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an accumulated gradient."""
        return self.engine.gradient_bytes

    def kept_gradient_bytes(self, part: str) -> int:
        """Bytes of a gradient that waits for the step at ZeRO-2.

        One micro-step's stays in the model's dtype where no other rank adds to it and its share of
        the mean is exact there (runtime/deepspeed_gradients.py).
        """
        alone = self.num_ranks == 1 or (part == "experts" and self.edp == 1)
        is_exact = self.num_ranks & (self.num_ranks - 1) == 0
        if self.accumulation > 1 or not (alone and is_exact and self.own_optimizer):
            return self.gradient_bytes
        return min(self.width, self.gradient_bytes)

    @property
    def uses_bf16_optimizer(self) -> bool:
        """ZeRO-1 with float32 accumulation: DeepSpeed's BF16_Optimizer, gradients unpartitioned."""
        return self.zero == 1 and self.bfloat16 and self.gradient_bytes == 4


def rank_plan(
    config: RunConfig,
    num_ranks: int,
    device: str,
    *,
    deepspeed: Mapping[str, Any] | None = None,
    imbalance: float = 1.0,
    patches: int = 0,
) -> RankPlan:
    """Returns the plan of a config; `deepspeed` is its JSON where that is known already.

    Raises ConfigError for what `deepspeed_config` refuses.
    """
    train, optim = config.train, config.optim
    bfloat16, on_cpu = train.uses_bfloat16(device), device == "cpu"
    document = deepspeed or deepspeed_config(config, bfloat16=bfloat16, on_cpu=on_cpu)
    return RankPlan(
        num_ranks=num_ranks,
        ep=config.parallel.ep,
        zero=config.parallel.zero,
        micro_batch=train.micro_batch_size,
        sequence_length=train.sequence_length,
        engine=EngineBuffers.of(document, bfloat16=bfloat16),
        accumulation=train.gradient_accumulation_steps,
        checkpointing=train.activation_checkpointing,
        recomputes_experts=config.moe.recompute == "activation",
        offload=optim.offload,
        optimizer="adamw" if optim.name == "adamw" else "muon",
        own_optimizer=optim.name != "deepspeed-muon",
        momentum_bytes=2 if optim.momentum_dtype == "bfloat16" else 4,
        sp=config.parallel.sp,
        bfloat16=bfloat16,
        on_cpu=on_cpu,
        is_packed=config.data.packing and bool(config.data.train or config.model.reference),
        logits_bytes=train.logits_mib * 2**20,
        imbalance=imbalance,
        patches=patches,
    )
