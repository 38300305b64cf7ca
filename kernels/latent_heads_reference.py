"""The float32 reference of latent_heads.py, in torch; see there for the suffixes."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_queries(q_BSHQ: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Returns [B, S, H, Q] with the last R columns rotated."""
    size = q_BSHQ.shape[-1] - cos.shape[-1]
    rotated = _rotate(q_BSHQ[..., size:].float(), cos, sin, interleaved)
    return torch.cat((q_BSHQ[..., :size], rotated.to(q_BSHQ.dtype)), dim=-1)


def rotate_queries_back(dq_BSHQ: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Returns the gradient of `rotate_queries`'s input."""
    size = dq_BSHQ.shape[-1] - cos.shape[-1]
    back = _rotate_back(dq_BSHQ[..., size:].float(), cos, sin, interleaved)
    return torch.cat((dq_BSHQ[..., :size], back.to(dq_BSHQ.dtype)), dim=-1)


def expand_keys(
    kv_BSHC: Tensor, k_BSR: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int
) -> Tensor:
    """Returns keys [B, S, H, size + R]: each head's first `size` columns, then the shared part."""
    rotated = _rotate(k_BSR.float().unsqueeze(2), cos, sin, interleaved).to(k_BSR.dtype)
    shared = rotated.expand(-1, -1, kv_BSHC.shape[2], -1)
    return torch.cat((kv_BSHC[..., :size], shared), dim=-1)


def expand_keys_back(
    dkey_BSHQ: Tensor, dvalue_BSHV: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `kv` and of the shared part, which is summed over heads."""
    size = dkey_BSHQ.shape[-1] - cos.shape[-1]
    dkv_BSHC = torch.cat((dkey_BSHQ[..., :size], dvalue_BSHV), dim=-1)
    summed = dkey_BSHQ[..., size:].float().sum(dim=2, keepdim=True)
    back = _rotate_back(summed, cos, sin, interleaved).squeeze(2)
    return dkv_BSHC, back.to(dkey_BSHQ.dtype)


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = cos.shape[-1] // 2
    return cos[..., None, :half].float(), sin[..., None, :half].float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs and lays them out as halves, whatever they were before."""
    cos, sin = _angles(cos, sin)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _rotate_back(gradient: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = _angles(cos, sin)
    first, second = gradient.chunk(2, dim=-1)
    pairs = (first * cos + second * sin, second * cos - first * sin)
    return torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
