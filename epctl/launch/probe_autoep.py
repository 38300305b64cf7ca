"""Probes of DeepSpeed's AutoEP: what it keeps, loses and overlooks when it replaces a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epctl.launch.probe import Finding, probe_of
from epctl.launch.probe_engine import autoep_config, engine_of, tiny_moe, tokens


def _replaced_difference(model: Any) -> float:
    """Returns the largest change of a logit when AutoEP replaces the model's MoE blocks."""
    with torch.no_grad():
        reference = model(input_ids=tokens(), use_cache=False).logits
        with engine_of(model, autoep_config(0, 1)) as engine:
            replaced = engine(input_ids=tokens(), use_cache=False).logits
    return float((replaced - reference).abs().max())


@probe_of("correction_bias_lost")
def correction_bias(work: Path) -> Finding:
    """A selection bias that decides for experts of lower score."""
    model = tiny_moe()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.copy_(torch.tensor([-9.0, 9.0, -9.0, 9.0]))
    difference = _replaced_difference(model)
    return Finding(difference > 1e-4, f"logits change by {difference:.1e}")


@probe_of("route_scale_lost")
def route_scale(work: Path) -> Finding:
    """A routed scaling factor of 2.446."""
    difference = _replaced_difference(tiny_moe(routed_scaling_factor=2.446))
    return Finding(difference > 1e-4, f"logits change by {difference:.1e}")


@probe_of("router_in_bfloat16")
def router_dtype(work: Path) -> Finding:
    """Experts chosen by a bfloat16 router against the same weights projected in float32."""
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    torch.manual_seed(0)
    router = TokenChoiceTopKRouter(
        dim=512,
        num_experts=64,
        num_expert_groups=None,
        num_limited_groups=None,
        top_k=6,
        score_func="sigmoid",
        route_norm=True,
        route_scale=1.0,
        gate_bias=False,
    ).to(torch.bfloat16)
    x = torch.randn(1024, 512).to(torch.bfloat16)
    weight = router.gate.weight.detach().clone()
    chosen = next(t for t in router(x) if not t.is_floating_point() and t.shape == (1024, 6))
    expected = (x.float() @ weight.float().T).topk(6).indices
    differs = (chosen.sort().values != expected.sort().values).any(dim=1)
    share = float(differs.double().mean())
    return Finding(share > 1e-3, f"{share:.1%} of tokens choose other experts than in float32")


@probe_of("autoep_misspelt_key")
def misspelt(work: Path) -> Finding:
    """A key that does not exist inside `expert_parallel`."""
    from deepspeed.module_inject import auto_ep_config

    try:
        parsed = auto_ep_config.parse_autoep_config({"enabled": True, "autoepsize": 2})
    except Exception as error:
        return Finding(False, f"refused: {type(error).__name__}")
    return Finding(True, f"`autoepsize` is ignored, autoep_size stays {parsed.autoep_size}")


class _VisionLanguage(nn.Module):
    """A language model one level down and of a type nobody knows, as in multimodal classes."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = tiny_moe()
        self.config = self.language_model.config
        self.config.model_type = "never_heard_of_vl"


@probe_of("autoep_unknown_model")
def unknown_model(work: Path) -> Finding:
    """A multimodal model of unknown type, with experts that could be sharded."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    asked = parse_autoep_config({"enabled": True, "autoep_size": 2})
    try:
        found = AutoEP(_VisionLanguage(), asked).ep_parser()
    except Exception as error:
        return Finding(False, f"refused: {type(error).__name__}")
    return Finding(not found, f"{len(found)} of 1 MoE layers found, no error")


@probe_of("autoep_transformers_recorders")
def recorders(work: Path) -> Finding:
    """Replacing the MoE blocks of Mixtral and Qwen3-MoE under the installed transformers."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    models: dict[str, Callable[[], Any]] = {
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=8, head_dim=8)
        ),
    }
    failures = []
    for preset, build in models.items():
        config = autoep_config(0, 1)
        config["expert_parallel"]["preset_model"] = preset
        try:
            with engine_of(build(), config):
                pass
        except (TypeError, AttributeError, ValueError) as error:
            failures.append(f"{preset}: {type(error).__name__}: {str(error)[:60]}")
    return Finding(bool(failures), "; ".join(failures) or "both families start")
