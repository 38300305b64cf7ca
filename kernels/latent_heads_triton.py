"""The kernels of latent_heads.py: a program a token and some of its heads; see there for suffixes.

Read once, computed in float32, written once. Heads of a token are a block of rows.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epctl.kernels.launch import ceil_div, launch, next_power_of_2

MOST_HEADS = 16  # of one program


def rotate_queries(q_BSHQ: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See `latent_heads_reference.rotate_queries`."""
    return _queries(q_BSHQ, cos, sin, interleaved, back=False)


def rotate_queries_back(dq_BSHQ: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See `latent_heads_reference.rotate_queries_back`."""
    return _queries(dq_BSHQ, cos, sin, interleaved, back=True)


def _queries(x_BSHQ: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    num_sequences, num_tokens, num_heads, width = x_BSHQ.shape
    out_BSHQ = x_BSHQ.new_empty(x_BSHQ.shape)
    half = cos.shape[-1] // 2
    plain = width - 2 * half
    heads = min(MOST_HEADS, next_power_of_2(num_heads))
    grid = num_sequences * num_tokens, ceil_div(num_heads, heads)
    if out_BSHQ.numel():
        launch(
            _queries_kernel, grid,
            x_BSHQ, out_BSHQ, cos, sin, num_tokens, num_heads,
            *x_BSHQ.stride()[:3], *_angle_strides(cos),
            PLAIN=plain, HALF=half, BLOCK_H=heads,
            BLOCK_P=next_power_of_2(max(plain, 1)), BLOCK_R=next_power_of_2(half),
            INTERLEAVED=interleaved, BACK=back, num_warps=4,
        )  # fmt: skip
    return out_BSHQ


def expand_keys(
    kv_BSHC: Tensor, k_BSR: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int
) -> Tensor:
    """See `latent_heads_reference.expand_keys`."""
    num_sequences, num_tokens, num_heads, width = kv_BSHC.shape
    half = cos.shape[-1] // 2
    key_BSHQ = kv_BSHC.new_empty(num_sequences, num_tokens, num_heads, size + 2 * half)
    heads = min(MOST_HEADS, next_power_of_2(num_heads))
    grid = num_sequences * num_tokens, ceil_div(num_heads, heads)
    assert k_BSR.stride(-1) == 1
    if key_BSHQ.numel():
        launch(
            _keys_kernel, grid,
            kv_BSHC, k_BSR, key_BSHQ, cos, sin, num_tokens, num_heads, width,
            *k_BSR.stride()[:2], *_angle_strides(cos),
            PLAIN=size, HALF=half, BLOCK_H=heads,
            BLOCK_P=next_power_of_2(max(size, 1)), BLOCK_R=next_power_of_2(half),
            INTERLEAVED=interleaved, num_warps=4,
        )  # fmt: skip
    return key_BSHQ


def expand_keys_back(
    dkey_BSHQ: Tensor, dvalue_BSHV: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `latent_heads_reference.expand_keys_back`."""
    num_sequences, num_tokens, num_heads, width = dkey_BSHQ.shape
    half, value_size = cos.shape[-1] // 2, dvalue_BSHV.shape[-1]
    size = width - 2 * half
    dkv_BSHC = dkey_BSHQ.new_empty(num_sequences, num_tokens, num_heads, size + value_size)
    dk_BSR = dkey_BSHQ.new_empty(num_sequences, num_tokens, 2 * half)
    if dkv_BSHC.numel():
        launch(
            _keys_back_kernel, (num_sequences * num_tokens,),
            dkey_BSHQ, dvalue_BSHV, dkv_BSHC, dk_BSR, cos, sin, num_tokens, num_heads,
            *dkey_BSHQ.stride()[:3], *dvalue_BSHV.stride()[:3], *_angle_strides(cos),
            PLAIN=size, HALF=half, VALUE=value_size,
            BLOCK_H=min(MOST_HEADS, next_power_of_2(num_heads)),
            BLOCK_P=next_power_of_2(max(size, 1)), BLOCK_R=next_power_of_2(half),
            BLOCK_V=next_power_of_2(value_size), INTERLEAVED=interleaved, num_warps=4,
        )  # fmt: skip
    return dkv_BSHC, dk_BSR


def _angle_strides(cos: Tensor) -> tuple[int, int]:
    """Strides of sequences and tokens; one sequence's angles may be those of all."""
    assert cos.stride(-1) == 1
    return (0 if cos.shape[0] == 1 else cos.stride(0)), cos.stride(1)


@triton.jit
def _angles(cos_ptr, sin_ptr, at, HALF: tl.constexpr, BLOCK_R: tl.constexpr):
    pair = tl.arange(0, BLOCK_R)
    inside = pair < HALF
    cos = tl.load(cos_ptr + at + pair, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at + pair, mask=inside, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _pair_columns(pair, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the first and the second of a pair are among R columns."""
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + HALF
    return first, second


@triton.jit
def _queries_kernel(
    x_ptr, out_ptr, cos_ptr, sin_ptr, num_tokens, num_heads,
    stride_b, stride_s, stride_h, angle_b, angle_s,
    PLAIN: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sequence, token = row // num_tokens, row % num_tokens
    head = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    x_ptr += sequence * stride_b + token * stride_s + head[:, None] * stride_h
    out_ptr += (row * num_heads + head[:, None]) * (PLAIN + 2 * HALF)
    is_head = head[:, None] < num_heads
    column = tl.arange(0, BLOCK_P)[None, :]
    plain = is_head & (column < PLAIN)
    tl.store(out_ptr + column, tl.load(x_ptr + column, mask=plain), mask=plain)

    cos, sin = _angles(cos_ptr, sin_ptr, sequence * angle_b + token * angle_s, HALF, BLOCK_R)
    pair = tl.arange(0, BLOCK_R)
    inside = is_head & (pair[None, :] < HALF)
    first, second = _pair_columns(pair, HALF, INTERLEAVED and not BACK)
    a = tl.load(x_ptr + PLAIN + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + PLAIN + second[None, :], mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    first, second = _pair_columns(pair, HALF, INTERLEAVED and BACK)
    kind = out_ptr.dtype.element_ty
    rotated = (a * cos[None, :] - b * sin[None, :]).to(kind)
    tl.store(out_ptr + PLAIN + first[None, :], rotated, mask=inside)
    rotated = (b * cos[None, :] + a * sin[None, :]).to(kind)
    tl.store(out_ptr + PLAIN + second[None, :], rotated, mask=inside)


@triton.jit
def _keys_kernel(
    kv_ptr, k_ptr, key_ptr, cos_ptr, sin_ptr, num_tokens, num_heads, width,
    stride_b, stride_s, angle_b, angle_s,
    PLAIN: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sequence, token = row // num_tokens, row % num_tokens
    head = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    kv_ptr += (row * num_heads + head[:, None]) * width
    key_ptr += (row * num_heads + head[:, None]) * (PLAIN + 2 * HALF)
    is_head = head[:, None] < num_heads
    column = tl.arange(0, BLOCK_P)[None, :]
    plain = is_head & (column < PLAIN)
    tl.store(key_ptr + column, tl.load(kv_ptr + column, mask=plain), mask=plain)

    cos, sin = _angles(cos_ptr, sin_ptr, sequence * angle_b + token * angle_s, HALF, BLOCK_R)
    pair = tl.arange(0, BLOCK_R)
    first, second = _pair_columns(pair, HALF, INTERLEAVED)
    k_ptr += sequence * stride_b + token * stride_s
    a = tl.load(k_ptr + first, mask=pair < HALF, other=0.0).to(tl.float32)
    b = tl.load(k_ptr + second, mask=pair < HALF, other=0.0).to(tl.float32)
    kind = key_ptr.dtype.element_ty
    at = key_ptr + PLAIN + pair[None, :]
    inside = is_head & (pair[None, :] < HALF)
    rotated = (a * cos - b * sin).to(kind)[None, :]
    tl.store(at, tl.broadcast_to(rotated, (BLOCK_H, BLOCK_R)), mask=inside)
    rotated = (b * cos + a * sin).to(kind)[None, :]
    tl.store(at + HALF, tl.broadcast_to(rotated, (BLOCK_H, BLOCK_R)), mask=inside)


@triton.jit
def _keys_back_kernel(
    dkey_ptr, dvalue_ptr, dkv_ptr, dk_ptr, cos_ptr, sin_ptr, num_tokens, num_heads,
    key_b, key_s, key_h, value_b, value_s, value_h, angle_b, angle_s,
    PLAIN: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One token: the shared part's gradient is summed over all its heads, in their order."""
    row = tl.program_id(0).to(tl.int64)
    sequence, token = row // num_tokens, row % num_tokens
    dkey_ptr += sequence * key_b + token * key_s
    dvalue_ptr += sequence * value_b + token * value_s
    pair = tl.arange(0, BLOCK_R)
    a = tl.zeros((BLOCK_R,), tl.float32)
    b = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_heads, BLOCK_H):
        head = (start + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        of_head = dkv_ptr + (row * num_heads + head) * (PLAIN + VALUE)
        column = tl.arange(0, BLOCK_P)[None, :]
        plain = (head < num_heads) & (column < PLAIN)
        key = tl.load(dkey_ptr + head * key_h + column, mask=plain)
        tl.store(of_head + column, key, mask=plain)
        column = tl.arange(0, BLOCK_V)[None, :]
        inside = (head < num_heads) & (column < VALUE)
        value = tl.load(dvalue_ptr + head * value_h + column, mask=inside)
        tl.store(of_head + PLAIN + column, value, mask=inside)
        at = dkey_ptr + head * key_h + PLAIN + pair[None, :]
        inside = (head < num_heads) & (pair[None, :] < HALF)
        a += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), axis=0)
        b += tl.sum(tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32), axis=0)
    cos, sin = _angles(cos_ptr, sin_ptr, sequence * angle_b + token * angle_s, HALF, BLOCK_R)
    first, second = _pair_columns(pair, HALF, INTERLEAVED)
    dk_ptr += row * (2 * HALF)
    kind = dk_ptr.dtype.element_ty
    tl.store(dk_ptr + first, (a * cos + b * sin).to(kind), mask=pair < HALF)
    tl.store(dk_ptr + second, (b * cos - a * sin).to(kind), mask=pair < HALF)
