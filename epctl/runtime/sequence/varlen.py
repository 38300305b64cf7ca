"""Attention of many documents in one call, where torch has flash attention of ragged batches.

A window of 64 patches is a document: a tower layer of one video has a thousand, and a call for each
is a thousand launches and, in backward, a thousand copies of the whole input.
Shape suffixes: B batch, H query heads, J key/value heads, Q queries, K keys, D head size, P rows of
all pieces.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from epctl.kernels.dispatch import OLDEST_CAPABILITY
from epctl.kernels.tiles import device_capability

LARGEST_HEAD = 256


class Span(NamedTuple):
    """Rows of a tensor flattened over its batch: `[start, start + length)`."""

    start: int
    length: int


class Ragged(NamedTuple):
    """Rows of all pieces end to end: which they are (None is all of them), and where pieces begin.

    Attributes:
        offsets: int32 [pieces + 1].
    """

    index_P: Tensor | None
    offsets: Tensor
    longest: int


Attend = Callable[..., Tensor]


@functools.cache
def flash_varlen() -> Attend | None:
    """Returns `torch.nn.attention.varlen.varlen_attn`, None where torch lacks it or its window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"window_size", "scale"}
    known = needed <= inspect.signature(varlen_attn).parameters.keys()
    return cast(Attend, varlen_attn) if known else None


def can_attend(q_BHQD: Tensor, k_BJKD: Tensor, v_BJKD: Tensor, dropout: float) -> bool:
    """True where the flash kernels take these tensors: half precision on a GPU, equal widths."""
    width = q_BHQD.shape[-1]
    fits = width == k_BJKD.shape[-1] == v_BJKD.shape[-1] and width % 8 == 0
    half = q_BHQD.dtype in (torch.float16, torch.bfloat16) and q_BHQD.is_cuda
    if not (half and fits and width <= LARGEST_HEAD) or dropout or flash_varlen() is None:
        return False
    return device_capability(q_BHQD.device) >= OLDEST_CAPABILITY


def attend_spans(
    q_BHQD: Tensor,
    k_BJKD: Tensor,
    v_BJKD: Tensor,
    queries: tuple[Span, ...],
    keys: tuple[Span, ...],
    *,
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Returns [B, H, Q, D]: piece i of the queries over piece i of the keys; other rows are zero.

    Causal queries are the last of their keys.

    Args:
        window: keys that a query sees, itself included; causal only.
    """
    attend = flash_varlen()
    assert attend is not None
    batch, num_heads, num_queries, _ = q_BHQD.shape
    of_queries = _ragged(queries, batch * num_queries, q_BHQD.device)
    of_keys = _ragged(keys, batch * k_BJKD.shape[2], k_BJKD.device)
    num_kv_heads = k_BJKD.shape[1]
    # Left and right of a query's own place; the flash kernels align both ends of a piece.
    reach = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    out_PHD = attend(
        _rows(q_BHQD, of_queries),
        _rows(k_BJKD, of_keys),
        _rows(v_BJKD, of_keys),
        of_queries.offsets,
        of_keys.offsets,
        of_queries.longest,
        of_keys.longest,
        scale=scaling,
        window_size=reach,
        **_grouped(attend, num_heads != num_kv_heads),
    )
    if of_queries.index_P is not None:
        flat = out_PHD.new_zeros(batch * num_queries, num_heads, out_PHD.shape[-1])
        out_PHD = flat.index_copy(0, of_queries.index_P, out_PHD)
    return out_PHD.view(batch, num_queries, num_heads, -1).transpose(1, 2)


def _rows(x_BHRD: Tensor, ragged: Ragged) -> Tensor:
    x_PHD = x_BHRD.transpose(1, 2).flatten(0, 1)
    return x_PHD if ragged.index_P is None else x_PHD.index_select(0, ragged.index_P)


def _grouped(attend: Attend, grouped: bool) -> dict[str, Any]:
    """Versions of torch that know the flag refuse fewer key heads without it."""
    known = "enable_gqa" in inspect.signature(attend).parameters
    return {"enable_gqa": True} if grouped and known else {}


# Layers of one kind have the same pieces; without this each would copy its offsets to the GPU. Few:
# packed documents differ from batch to batch, and these tensors stay.
@functools.lru_cache(maxsize=8)
def _ragged(spans: tuple[Span, ...], num_rows: int, device: torch.device) -> Ragged:
    lengths = [span.length for span in spans]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    follow = all(a.start + a.length == b.start for a, b in pairwise(spans))
    whole = follow and spans[0].start == 0 and sum(lengths) == num_rows
    index_P = None
    if not whole:
        index_P = torch.cat([torch.arange(s.start, s.start + s.length) for s in spans]).to(device)
    return Ragged(index_P, offsets, max(lengths))
