"""Starts the symmetric product written for Hopper in CUDA C++ (symmetric_hopper.cu).

Shape suffixes: see symmetric.py; C columns as they are stored.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epctl.kernels.cuda_source import (
    CudaKernel,
    CudaSourceError,
    Launch,
    StreamState,
    compile_source,
    is_enabled,
)
from epctl.kernels.symmetric_schedule import num_parts, parts_of
from epctl.kernels.tiles import device_capability

SOURCE = Path(__file__).with_name("symmetric_hopper.cu")
KERNEL = "symmetric_product"
ARCHITECTURE = "sm_90a"
CAPABILITY = (9, 0)
ELEMENTS = {torch.float16: "f16", torch.bfloat16: "bf16"}
PANEL_ROWS = 128
STEP = 64  # summed columns of a stage
BOX = (64, 64)
NUM_THREADS = 384
NUM_REGISTERS = 168  # what the warps divide among themselves
# Measured above; below, tiles of Triton's waste less or fill a GPU better.
LEAST_ROWS = 512
LEAST_SUMMED = 512
LEAST_FILLED = 0.75
# Prepared launches kept, some 2 KB each; a step of Moonlight's experts comes back to a few hundred.
MOST_LAUNCHES = 4096
# Three stages of three panels, results of 128 x 256, two mirrored squares; room to align, barriers.
SHARED_BYTES = 3 * 3 * 128 * 64 * 2 + 128 * 256 * 2 + 2 * 64 * 64 * 2 + 1024 + 128


def defines(dtype: torch.dtype, transposed: bool, has_added: bool) -> dict[str, str]:
    """Returns what the source is compiled with."""
    flags = {"TRANSPOSED": transposed, "ADDED": has_added}
    return {"ELEMENT": ELEMENTS[dtype]} | {name: str(int(flag)) for name, flag in flags.items()}


def fits(left_BRK: Tensor, right_BRK: Tensor, added_BRR: Tensor | None, out_BRR: Tensor) -> bool:
    """True where the kernel runs and reads these operands right. Compiles it the first time."""
    device, dtype = left_BRK.device, left_BRK.dtype
    if device.type != "cuda" or dtype not in ELEMENTS or not is_enabled():
        return False
    if device_capability(device) != CAPABILITY or torch.version.hip is not None:
        return False
    transposed = is_transposed(left_BRK)
    operands = (_stored(left_BRK, transposed), _stored(right_BRK, transposed), out_BRR)
    tensors = operands if added_BRR is None else (*operands, added_BRR)
    if not all(x.dtype == dtype and x.device == device and _has_map(x) for x in tensors):
        return False
    if device.index != torch.cuda.current_device():
        return False
    # What is not there yet is copied from the host, which a capture refuses.
    if _places(left_BRK) not in _PARTS and torch.cuda.is_current_stream_capturing():
        return False
    return _kernel(dtype, transposed, added_BRR is not None, device.index) is not None


def is_transposed(x_BRK: Tensor) -> bool:
    """True where rows lie next to each other, and not what is summed."""
    return x_BRK.stride(2) != 1


def is_faster(left_BRK: Tensor) -> bool:
    """True where it beats Triton's: figures in benchmarks/muon_h200_202611.md."""
    _, num_rows, num_summed = left_BRK.shape
    if not left_BRK.is_cuda or num_rows < LEAST_ROWS or num_summed < LEAST_SUMMED:
        return False
    return _filled(left_BRK) >= LEAST_FILLED


def _filled(left_BRK: Tensor) -> float:
    """Returns the share of multiprocessors that work, over the time in which one of them does."""
    num_panels, num_matrices, device = _places(left_BRK)
    total, at_once = num_parts(num_panels) * num_matrices, _num_multiprocessors(device)
    return total / (-(-total // at_once) * at_once)


def _places(left_BRK: Tensor) -> tuple[int, int, torch.device]:
    """Returns what decides which parts there are: panels of a matrix, matrices, and the device."""
    return -(-left_BRK.shape[1] // PANEL_ROWS), len(left_BRK), left_BRK.device


class _Known(NamedTuple):
    launch: Launch
    is_faster: bool


# By what decides everything about a launch: an optimizer comes back to the same addresses.
_LAUNCHES: dict[tuple[Any, ...], _Known] = {}


def _key(
    left_BRK: Tensor,
    right_BRK: Tensor,
    added_BRR: Tensor | None,
    out_BRR: Tensor,
    alpha: float,
    beta: float,
) -> tuple[Any, ...]:
    tensors = (left_BRK, right_BRK, out_BRR, *(() if added_BRR is None else (added_BRR,)))
    facts = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors]
    early = CudaKernel.starts_early
    return (StreamState.current(), left_BRK.device, early, alpha, beta, *facts)


def start_again(
    left_BRK: Tensor,
    right_BRK: Tensor,
    added_BRR: Tensor | None,
    out_BRR: Tensor,
    alpha: float,
    beta: float,
) -> bool:
    """Starts `symmetric_product` as it was started before, with tensors of the same places.

    False where it never was, or where Triton is to be preferred. Spares the host what asking
    `is_faster` and `fits` takes, longer than a product of a few matrices on a slow one.
    """
    # Products that are always Triton's are not held up by a key.
    if not _LAUNCHES or not left_BRK.is_cuda or left_BRK.shape[1] < LEAST_ROWS:
        return False
    if not is_enabled():
        return False
    known = _LAUNCHES.get(_key(left_BRK, right_BRK, added_BRR, out_BRR, alpha, beta))
    if known is None or not known.is_faster:
        return False
    known.launch()
    return True


def symmetric_product(
    left_BRK: Tensor,
    right_BRK: Tensor,
    added_BRR: Tensor | None,
    out_BRR: Tensor,
    alpha: float,
    beta: float,
) -> None:
    """Does what `symmetric_matmul` says, for operands that `fits` accepts."""
    key = _key(left_BRK, right_BRK, added_BRR, out_BRR, alpha, beta)
    known = _LAUNCHES.get(key)  # once: another thread may clear it
    if known is None:
        if len(_LAUNCHES) >= MOST_LAUNCHES:
            _LAUNCHES.clear()
        launch = _prepare(key[0], left_BRK, right_BRK, added_BRR, out_BRR, alpha, beta)
        known = _LAUNCHES[key] = _Known(launch, is_faster(left_BRK))
    known.launch()


def _prepare(
    place: StreamState,
    left_BRK: Tensor,
    right_BRK: Tensor,
    added_BRR: Tensor | None,
    out_BRR: Tensor,
    alpha: float,
    beta: float,
) -> Launch:
    transposed = is_transposed(left_BRK)
    device, num_summed = left_BRK.device, left_BRK.shape[2]
    kernel = _kernel(left_BRK.dtype, transposed, added_BRR is not None, device.index)
    assert kernel is not None
    parts = _parts(_places(left_BRK))
    stored = (_stored(left_BRK, transposed), _stored(right_BRK, transposed))
    added = out_BRR if added_BRR is None else added_BRR
    return kernel.prepare(
        place,
        (min(len(parts), _num_multiprocessors(device)), NUM_THREADS),
        *(kernel.tensor_map(x, BOX) for x in (*stored, added, out_BRR)),
        ctypes.c_void_p(parts.data_ptr()),
        ctypes.c_int(len(parts)),
        ctypes.c_int(-(-num_summed // STEP)),
        ctypes.c_float(alpha),
        ctypes.c_float(beta),
    )


def _stored(x_BRK: Tensor, transposed: bool) -> Tensor:
    return x_BRK.mT if transposed else x_BRK


def _has_map(x_BRC: Tensor) -> bool:
    num_matrices, num_rows, num_columns = x_BRC.shape
    matrix, row, column = x_BRC.stride()
    inside = row >= num_columns and (num_matrices == 1 or matrix >= num_rows * row)
    places = (row, matrix if num_matrices > 1 else 0, x_BRC.data_ptr() // x_BRC.element_size())
    aligned = all(place * x_BRC.element_size() % 16 == 0 for place in places)
    return column == 1 and inside and aligned and x_BRC.numel() > 0


@functools.cache
def _kernel(
    dtype: torch.dtype, transposed: bool, has_added: bool, device_index: int
) -> CudaKernel | None:
    """Compiles for two seconds the first time; warns and returns None where that fails."""
    try:
        binary = compile_source(SOURCE, defines(dtype, transposed, has_added), ARCHITECTURE)
        return CudaKernel(binary, KERNEL, SHARED_BYTES, NUM_REGISTERS, device_index)
    except CudaSourceError as error:
        warnings.warn(f"symmetric products run in Triton, slower: {error}", stacklevel=2)
        return None


# Kept for good: a captured graph goes on reading them.
_PARTS: dict[tuple[int, int, torch.device], Tensor] = {}


def _parts(places: tuple[int, int, torch.device]) -> Tensor:
    """Returns [parts, 4] integers as the kernel reads them: matrix, s, o1, o2."""
    if places not in _PARTS:
        num_panels, num_matrices, device = places
        one = torch.tensor(parts_of(num_panels), dtype=torch.int32)
        matrix = torch.arange(num_matrices, dtype=torch.int32).repeat_interleave(len(one))
        table = torch.cat([matrix[:, None], one.repeat(num_matrices, 1)], dim=1)
        _PARTS[places] = table.to(device)
    return _PARTS[places]


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
