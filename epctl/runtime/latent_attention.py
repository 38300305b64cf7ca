"""Multi-head latent attention of transformers with its heads made by epctl's kernels.

Between projections and attention their forward takes some twenty passes over the heads a layer
(kernels/latent_heads.py). What a class is, is found by running it small, never by its name: one
that computes anything else stays as it is. Projections, norms and attention are the model's own.
Shape suffixes: B sequences, S tokens, D hidden size; of heads as in kernels/latent_heads.py.
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from epctl.kernels import choose_implementation
from epctl.kernels.latent_heads import Rotation, expand_keys, rotate_queries

# What the forward below reads of a module.
NEEDED = (
    "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj", "expand_kv", "num_heads",
    "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim", "kv_lora_rank",
    "q_lora_rank", "scaling",
)  # fmt: skip
SMALL = {
    "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 10,
    "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "num_hidden_layers": 1, "attention_dropout": 0.0, "index_topk": 2, "sliding_window": 2,
}  # fmt: skip
TOLERANCE = 1e-5


class FusedLatentAttention(nn.Module):
    """Base of a model's own attention class, put before it."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **named: Any,
    ) -> Any:
        """Returns what the class does; its own forward runs with a cache and without the kernels.

        Args:
            hidden_states: [B, S, D].
            position_embeddings: cosines and sines, [1 or B, S, R].
        """
        choice = choose_implementation(hidden_states.device, hidden_states.dtype)
        if past_key_values is not None or choice.implementation != "triton":
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **named,
            )
        return attend(self, hidden_states, position_embeddings, attention_mask, **named)


def attend(
    module: Any,
    hidden_BSD: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """Returns latent attention's output [B, S, D] and what attention says of its weights."""
    batch, length = hidden_BSD.shape[:2]
    rotation = Rotation(
        *position_embeddings, bool(getattr(module.config, "rope_interleave", False))
    )
    if module.q_lora_rank is None:
        q_BSE = module.q_proj(hidden_BSD)
    else:
        q_BSE = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_BSD)))
    q_BSHQ = q_BSE.view(batch, length, -1, module.qk_head_dim)
    both_BSE = module.kv_a_proj_with_mqa(hidden_BSD)
    latent_BSE, k_BSR = both_BSE.split((module.kv_lora_rank, module.qk_rope_head_dim), dim=-1)
    kv_BSE = module.kv_b_proj(module.kv_a_layernorm(latent_BSE))
    kv_BSHC = kv_BSE.view(batch, length, -1, module.qk_nope_head_dim + module.v_head_dim)
    query = rotate_queries(q_BSHQ, rotation)
    key, value = expand_keys(kv_BSHC, k_BSR, rotation, module.v_head_dim)
    out_BSHV, weights = _attention(module)(
        module, query, key, value, attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling, **named,
    )  # fmt: skip
    return module.o_proj(out_BSHV.reshape(batch, length, -1).contiguous()), weights


def _attention(module: Any) -> Any:
    """Returns the attention that the model's config names, as its own forward finds it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)


def fuse_latent_attention(model: nn.Module) -> int:
    """Makes the latent attention of `model` run epctl's kernels, in place; returns how many do.

    Modules, Parameters, names and state dict stay; a class becomes a subclass of its own.
    """
    count = 0
    for module in model.modules():
        if all(hasattr(module, name) for name in NEEDED) and _is_latent(module):
            module.__class__ = _fused_class(cast(Any, type(module)))
            count += 1
    return count


@functools.cache
def _fused_class(attention_class: Any) -> Any:
    """The name and the module stay the class's own: its eager attention is looked up there."""
    own = {"__module__": attention_class.__module__}
    return type(f"Fused{attention_class.__name__}", (FusedLatentAttention, attention_class), own)


def _is_latent(module: Any) -> bool:
    """True if a small module of its class gives, both ways, what `attend` does with its weights."""
    if isinstance(module, FusedLatentAttention) or "forward" in vars(module):
        return False
    try:
        config = copy.deepcopy(module.config)
        for name, size in SMALL.items():
            if getattr(config, name, None) is not None:
                setattr(config, name, size)
        config._attn_implementation = "sdpa"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                small = type(module)(config, layer_idx=getattr(module, "layer_idx", 0)).float()
                return _agrees(small)
    except Exception:  # whatever it wants, it is not what `attend` gives it
        return False


def _agrees(small: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    for parameter in small.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    angles = torch.randn(1, 5, small.qk_rope_head_dim // 2, generator=generator)
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1) for f in (torch.cos, torch.sin))
    # A mask of its own, or classes that choose keys would refuse it and never be told apart.
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    results = []
    for forward in (type(small).forward, attend):
        x_BSD = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
        x_BSD.requires_grad_()
        y_BSD = forward(small, x_BSD, (cos, sin), causal)[0]
        (dx_BSD,) = torch.autograd.grad(y_BSD.square().sum(), x_BSD)
        results.append((y_BSD.detach(), dx_BSD))
    return all(
        torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max()))
        for a, b in zip(*results, strict=True)
    )
