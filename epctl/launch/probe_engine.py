"""Small engines for probes: a model whose gradient is its input, and a tiny AutoEP model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

NUM_EXPERTS = 4


class Dial(nn.Module):
    """One matrix; the gradient of `forward(gradient)` is exactly `gradient`."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size))

    def forward(self, gradient: Tensor) -> Tensor:
        result: Tensor = (self.weight * gradient.to(self.weight.dtype)).sum()
        return result


class CountingSGD(torch.optim.SGD):
    """SGD that knows how often `step` was called."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        return super().step(closure)


def engine_config(stage: int, **changes: Any) -> dict[str, Any]:
    """Returns a DeepSpeed JSON for a probe: no clipping, small buckets, changes on top."""
    zero = {"stage": stage, "reduce_bucket_size": 2**16, "allgather_bucket_size": 2**16}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        **changes,
        "zero_optimization": zero | changes.get("zero_optimization", {}),
    }


def muon_config(stage: int, **changes: Any) -> dict[str, Any]:
    """Returns a DeepSpeed JSON that names the engine's own Muon, rate 1, no decay, no momentum."""
    rates = {"lr": 1.0, "muon_lr": 1.0, "adam_lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}
    params = rates | {"ns_method": "standard", "torch_adam": True}
    return engine_config(stage, optimizer={"type": "Muon", "params": params}, **changes)


@contextlib.contextmanager
def engine_of(model: nn.Module, config: dict[str, Any], optimizer: Any = None) -> Iterator[Any]:
    """Yields an engine over `model` and destroys it afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=trained,
        config=config,
        dist_init_required=False,
    )
    try:
        yield engine
    finally:
        engine.destroy()


def sgd(parameters: Any) -> CountingSGD:
    """Returns SGD at rate 1: a step subtracts the gradient."""
    return CountingSGD(list(parameters), lr=1.0)


def step_with(engine: Any, gradients: list[Tensor]) -> None:
    """Runs one optimizer step with these gradients, one a micro-step."""
    for gradient in gradients:
        engine.backward(engine(gradient))
        engine.step()


def whole_weight(engine: Any) -> Tensor:
    """Returns the Dial's matrix, whole at every stage, in float32."""
    weight = engine.module.weight
    with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        copy: Tensor = weight.detach().float().clone()
    return copy


def spread_matrix() -> Tensor:
    """Returns a gradient with singular values from 0.001 to 0.01; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q for _ in range(2))
    product: Tensor = left @ torch.diag(torch.linspace(1e-3, 1e-2, 8)) @ right
    return product


def tiny_moe(**changes: Any) -> Any:
    """Returns a two-layer DeepSeek-V3 of transformers, the same on every rank."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    values: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_shared_experts": 1,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(values | changes)))


def autoep_config(stage: int, ep: int, **changes: Any) -> dict[str, Any]:
    """Returns a DeepSpeed JSON with AutoEP and torch's AdamW."""
    return engine_config(
        stage,
        **{
            "expert_parallel": {
                "enabled": True,
                "autoep_size": ep,
                "preset_model": "deepseek_v3",
                "use_grouped_mm": False,
            },
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            **changes,
        },
    )


def tokens() -> Tensor:
    """Returns token ids that differ between ranks."""
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    return torch.randint(0, 32, (2, 12), generator=generator)


def train_moe_step(engine: Any) -> None:
    """Runs one step of the language-model loss on this rank's tokens."""
    ids = tokens()
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()


def expert_parameters(engine: Any) -> list[nn.Parameter]:
    """Returns this rank's expert Parameters."""
    return [p for p in engine.module.parameters() if getattr(p, "allreduce", True) is False]
