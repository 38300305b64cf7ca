"""QK-clip: where a head's largest attention logit passes the bound, its weights are scaled down.

Kimi K2 (arXiv 2507.20534): after the optimizer step, so that the same input would give the bound.
Shape suffixes: H query heads, J key heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from epctl.errors import ConfigError


def clip_factors(model: nn.Module, maxima: Mapping[str, Tensor], bound: float) -> dict[int, Tensor]:
    """Returns a float32 factor a row of every query and key Parameter to scale, by id.

    Args:
        maxima: the largest logit of each head [H] by the attention module's name.
        bound: logits above it are scaled to it.

    Raises:
        ConfigError: a layer passes the bound and scaling its projections could not lower it.
    """
    factors: dict[int, Tensor] = {}
    for name, maxima_H in maxima.items():
        if bool((maxima_H > bound).any()):
            shrink_H = (bound / maxima_H.clamp_min(bound)).float()
            shrink_H = torch.where(shrink_H > 0, shrink_H, 1.0)  # an overflow is no logit to bound
            factors |= _layer_factors(name, model.get_submodule(name), shrink_H)
    return factors


def _layer_factors(name: str, attention: Any, shrink_H: Tensor) -> dict[int, Tensor]:
    if hasattr(attention, "kv_b_proj") and hasattr(attention, "qk_rope_head_dim"):
        return _latent_attention(attention, shrink_H)
    normed = hasattr(attention, "q_norm") or hasattr(attention, "k_norm")
    if hasattr(attention, "q_proj") and hasattr(attention, "k_proj") and not normed:
        return _grouped_attention(attention, shrink_H)
    reason = "normalises queries or keys after them" if normed else "has no q_proj and k_proj"
    raise ConfigError(
        f"optim.qk_clip cannot bound the logits of {name}: {type(attention).__name__} {reason}",
        hint="run without `optim.qk_clip`",
    )


def _latent_attention(attention: Any, shrink_H: Tensor) -> dict[int, Tensor]:
    """MLA: the rotary key is shared by all heads, so its part is scaled in the query alone."""
    nope, rope = attention.qk_nope_head_dim, attention.qk_rope_head_dim
    root_H, ones_H = shrink_H.sqrt(), torch.ones_like(shrink_H)
    query = _rows([(root_H, nope), (shrink_H, rope)])
    key = _rows([(root_H, nope), (ones_H, attention.v_head_dim)])
    q_proj = attention.q_proj if getattr(attention, "q_lora_rank", None) is None else None
    factors = _of_linear(q_proj or attention.q_b_proj, query)
    return factors | _of_linear(attention.kv_b_proj, key)


def _grouped_attention(attention: Any, shrink_H: Tensor) -> dict[int, Tensor]:
    """GQA: a key head takes the root of its group's smallest factor, each query head the rest."""
    head_dim = attention.head_dim
    num_key_heads = attention.k_proj.out_features // head_dim
    shrink_JG = shrink_H.view(num_key_heads, -1)
    key_J = shrink_JG.amin(dim=1).sqrt()
    query_H = (shrink_JG / key_J[:, None]).reshape(-1)
    factors = _of_linear(attention.q_proj, _rows([(query_H, head_dim)]))
    return factors | _of_linear(attention.k_proj, _rows([(key_J, head_dim)]))


def _rows(parts: list[tuple[Tensor, int]]) -> Tensor:
    """Returns head after head the factor of each of its rows."""
    by_head = [factor_H[:, None].expand(-1, width) for factor_H, width in parts]
    return torch.cat(by_head, dim=1).reshape(-1)


def _of_linear(linear: nn.Linear, rows: Tensor) -> dict[int, Tensor]:
    parameters = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    return {id(parameter): rows for parameter in parameters}
