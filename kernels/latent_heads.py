"""Queries and keys of multi-head latent attention, rotated and put together in one pass each way.

transformers slices, multiplies, concatenates and copies; backward undoes each on its own (some
twenty passes over the heads a layer and direction, DeepSeek-V2, arXiv 2405.04434, 2.1). Here one
kernel makes queries, one makes keys, and one each takes gradients back.

Shape suffixes: B sequences, S tokens, H heads, N part of a head without a position, R rotated part,
V of a value, Q = N + R. All are laid out B, S, H in memory, as the products before and after want
them, and are given out as views [B, H, S, ...], as attention wants them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epctl.kernels import latent_heads_reference
from epctl.kernels.dispatch import choose_implementation


class Rotation(NamedTuple):
    """Angles as transformers has them, [1 or B, S, R], and how a head's pairs lie in memory."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def rotate_queries(q_BSHQ: Tensor, rotation: Rotation) -> Tensor:
    """Returns queries with their last R columns rotated, a [B, H, S, Q] view; computed in float32.

    Interleaved pairs (x0, x1), (x2, x3) come out as halves, as transformers has them.
    """
    return cast(Tensor, _RotateQueries.apply(q_BSHQ, *rotation))  # type: ignore[no-untyped-call]


def expand_keys(
    kv_BSHC: Tensor, k_BSR: Tensor, rotation: Rotation, value_size: int
) -> tuple[Tensor, Tensor]:
    """Returns keys [B, H, S, N+R] and values [B, H, S, V], views in the layout of the products.

    Args:
        kv_BSHC: of each head the N columns of its key and the V of its value, C = N + V.
        k_BSR: the part of the key that all heads share, before rotation; rows may be strided.
        value_size: V.
    """
    inputs = kv_BSHC, k_BSR, *rotation, value_size
    return cast(tuple[Tensor, Tensor], _ExpandKeys.apply(*inputs))  # type: ignore[no-untyped-call]


class _RotateQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHQ: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        run = _implementation(q_BSHQ).rotate_queries
        return cast(Tensor, run(q_BSHQ.contiguous(), cos, sin, interleaved)).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHSQ: Tensor) -> tuple[Tensor | None, ...]:
        run = _implementation(gradient_BHSQ).rotate_queries_back
        rows_BSHQ = _rows(gradient_BHSQ)
        return run(rows_BSHQ, *ctx.saved_tensors, ctx.interleaved), None, None, None


class _ExpandKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kv_BSHC: Tensor,
        k_BSR: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        value_size: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        kv_BSHC, run = kv_BSHC.contiguous(), _implementation(kv_BSHC).expand_keys
        size = kv_BSHC.shape[-1] - value_size
        key_BSHQ = cast(Tensor, run(kv_BSHC, k_BSR, cos, sin, interleaved, size))
        # Of its own version counter: nothing writes to what a product made.
        value_BSHV = kv_BSHC.detach()[..., size:]
        return key_BSHQ.transpose(1, 2), value_BSHV.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkey_BHSQ: Tensor, dvalue_BHSV: Tensor) -> tuple[Tensor | None, ...]:
        run = _implementation(dkey_BHSQ).expand_keys_back
        rows = _rows(dkey_BHSQ), _rows(dvalue_BHSV)
        dkv_BSHC, dk_BSR = run(*rows, *ctx.saved_tensors, ctx.interleaved)
        return dkv_BSHC, dk_BSR, None, None, None, None


def _rows(gradient_BHSD: Tensor) -> Tensor:
    """Returns [B, S, H, D] whose columns are neighbours in memory; the rest may be strided."""
    rows_BSHD = gradient_BHSD.transpose(1, 2)
    return rows_BSHD if rows_BSHD.stride(-1) == 1 else rows_BSHD.contiguous()


def _implementation(x: Tensor) -> ModuleType:
    if choose_implementation(x.device, x.dtype).implementation == "triton":
        from epctl.kernels import latent_heads_triton  # late: Triton takes a second to load

        return latent_heads_triton
    return latent_heads_reference
