"""Arithmetic on raw weights in numpy: bfloat16, FP8 with block scales, MXFP4. No torch.

numpy has no bfloat16; such values travel as uint16. Matrices are worked on in bands of rows, so
that a float32 copy of a whole matrix never exists.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from epctl.errors import LayoutError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BAND_ELEMENTS = 1 << 21
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
# Storage of each dtype in numpy; bfloat16 and FP8 as raw bits.
RAW: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
    **dict.fromkeys(FLOAT8, "u1"),
}
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_GROUP = 32


def raw_dtype(dtype: str) -> np.dtype[Any]:
    """Returns the numpy dtype that holds `dtype`'s bits. Raises LayoutError for sub-byte ones."""
    if dtype not in RAW:
        raise LayoutError(f"tensors of dtype {dtype} can be copied but not computed on")
    return np.dtype(RAW[dtype])


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Returns float32 values rounded to bfloat16, ties to even, as uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    result = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = np.uint16(0x7FC0)
    return result


def from_float64(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Returns float64 values in bfloat16 with one rounding.

    Going through float32 would round twice; the float32 next to an inexact one on its odd side
    keeps the information that the second rounding needs.
    """
    with np.errstate(over="ignore"):  # to infinity, as the rounding has it
        near = values.astype(np.float32)
    bits = near.view(np.uint32).copy()
    inexact = np.isfinite(values) & np.isfinite(near) & (near.astype(np.float64) != values)
    away = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = np.where(inexact & away, bits - np.uint32(1), bits)
    bits = np.where(inexact, bits | np.uint32(1), bits)
    return to_bfloat16(bits.view(np.float32))


def to_float32(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Returns the values of raw bits as float32; exact for everything narrower."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in FLOAT8:
        values: NDArray[np.float32] = _float8_table(dtype)[raw]
        return values
    if dtype in ("F16", "F32", "F64"):
        return raw.astype(np.float32)
    raise LayoutError(f"{dtype} is no floating-point dtype")


def cast_to_bfloat16(raw: NDArray[Any], dtype: str) -> NDArray[np.uint16]:
    """Returns raw values of `dtype` in bfloat16."""
    if dtype == "BF16":
        return raw
    return from_float64(raw) if dtype == "F64" else to_bfloat16(to_float32(raw, dtype))


@functools.cache
def _float8_table(dtype: str) -> NDArray[np.float32]:
    """Returns the value of each of the 256 bytes."""
    codes = np.arange(256)
    if dtype == "F8_E8M0":
        table = np.ldexp(np.float64(1), codes - 127)
        table[255] = np.nan
        return table.astype(np.float32)
    mantissa_bits = 3 if "E4M3" in dtype else 2
    unsigned_zero = dtype.endswith("FNUZ")
    bias = (7 if mantissa_bits == 3 else 15) + unsigned_zero
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.where(
        exponent == 0,
        np.ldexp(mantissa, 1 - bias),
        np.ldexp(1 + mantissa, exponent - bias),
    )
    value = np.where(codes & 0x80, -value, value)
    if unsigned_zero:
        value[0x80] = np.nan
    elif mantissa_bits == 3:
        value[[0x7F, 0xFF]] = np.nan
    else:
        value[[0x7C, 0xFC]] = np.inf, -np.inf
        value[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return value.astype(np.float32)


def dequantize_fp8(
    weight: NDArray[np.uint8],
    dtype: str,
    scale: NDArray[np.float32],
    block: tuple[int, int],
) -> NDArray[np.uint16]:
    """Returns weight x scale in bfloat16, [rows, columns].

    Args:
        weight: raw FP8 bytes, [rows, columns].
        scale: [ceil(rows / block[0]), ceil(columns / block[1])]; the last block of a dim may be
            cut by the matrix's edge.
    """
    rows, columns = weight.shape
    wide = np.repeat(scale, block[1], axis=1)[:, :columns]
    result = np.empty(weight.shape, np.uint16)
    band = max(1, BAND_ELEMENTS // max(1, columns))
    for start in range(0, rows, band):
        end = min(rows, start + band)
        values = to_float32(weight[start:end], dtype)
        values *= wide[np.arange(start, end) // block[0]]
        result[start:end] = to_bfloat16(values)
    return result


def dequantize_mxfp4(blocks: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Returns the values of packed FP4 in bfloat16, [rows, columns].

    Args:
        blocks: [rows, columns / 2], the low nibble first.
        exponents: [rows, columns / 32], each a power of two plus 127.
    """
    rows, half = blocks.shape
    pairs = _fp4_pairs()
    result = np.empty((rows, 2 * half), np.uint16)
    band = max(1, BAND_ELEMENTS // max(1, 2 * half))
    for start in range(0, rows, band):
        end = min(rows, start + band)
        values = pairs[blocks[start:end]].reshape(end - start, -1, MXFP4_GROUP)
        powers = exponents[start:end].astype(np.int32) - 127
        # An FP4 value has two significant bits, so bfloat16 holds every product exactly.
        with np.errstate(over="ignore"):
            values = np.ldexp(values, powers[:, :, None])
        result[start:end] = to_bfloat16(values.reshape(end - start, -1))
    return result


@functools.cache
def _fp4_pairs() -> NDArray[np.float32]:
    """Returns the two values of each byte, [256, 2]."""
    values = np.array([*FP4_VALUES, *(-value for value in FP4_VALUES)], np.float32)
    codes = np.arange(256)
    return np.stack([values[codes & 0xF], values[codes >> 4]], axis=1)
