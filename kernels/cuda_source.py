"""Kernels written in CUDA C++: compiled by NVRTC when first used, started through the driver.

NVRTC comes with every CUDA build of torch and needs neither a compiler nor headers, so the sources
include none. A kernel takes seconds to compile, once a process.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import itertools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SWITCH = "EPCTL_CUDA_SOURCE"
# cuda.h: CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion, CUfunction_attribute.
_MAP_DTYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128_BYTES = 3
_PROMOTE_TO_256_BYTES = 3
_NUM_REGISTERS, _MOST_SHARED_BYTES = 4, 8
_EARLY_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# Encoded maps kept, 128 bytes each; a training step comes back to a few dozen addresses.
MOST_MAPS = 1024


class CudaSourceError(RuntimeError):
    """There is no runtime compiler or driver, or one of them refused."""


def is_enabled() -> bool:
    """False where `EPCTL_CUDA_SOURCE=0` asks for Triton instead."""
    return os.environ.get(SWITCH, "1") != "0"


def compile_source(source: Path, defines: dict[str, str], architecture: str) -> bytes:
    """Returns the machine code of a source file; needs no GPU.

    Args:
        architecture: such as `sm_90a`.

    Raises:
        CudaSourceError: NVRTC was not found, or its words about what it could not compile, or
            compiled so that one product waits for another.
    """
    nvrtc = _runtime_compiler()
    options = [f"--gpu-architecture={architecture}", "-std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    program = ctypes.c_void_p()
    name = source.name.encode()
    code = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), name, 0, None, None
    ) or nvrtc.nvrtcCompileProgram(program, len(options), texts)
    try:
        log = _text_of(nvrtc, "nvrtcGetProgramLog", program).decode(errors="replace")
        if code or "serialized" in log:
            raise CudaSourceError(f"NVRTC refused {source.name} ({code}): {log[:2000]}")
        return _text_of(nvrtc, "nvrtcGetCUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text_of(nvrtc: Any, name: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"{name}Size")(program, ctypes.byref(size)):
        return b""
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, name)(program, text)
    return text.raw


def _runtime_compiler() -> Any:
    """Raises CudaSourceError where NVRTC is not installed."""
    # First that of torch's CUDA: a newer one makes what the driver may refuse.
    majors = ("12", "13") if (torch.version.cuda or "").startswith("12") else ("13", "12")
    for name in (f"libnvrtc.so.{major}" for major in majors):
        installed = (glob.glob(os.path.join(x, "nvidia", "*", "lib", name)) for x in sys.path)
        for path in (name, *itertools.chain.from_iterable(installed)):
            with contextlib.suppress(OSError):
                return ctypes.CDLL(path)
    raise CudaSourceError("NVRTC was not found; it comes with torch's CUDA builds")


class Driver:
    """The CUDA driver; every call that fails raises CudaSourceError."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaSourceError(str(error)) from error

    def __call__(self, name: str, *arguments: Any) -> None:
        function = getattr(self.library, name, None)
        if function is None:
            raise CudaSourceError(f"this driver has no {name}")
        if code := function(*arguments):
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise CudaSourceError(f"{name}: {(text.value or b'').decode()} ({code})")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with an integer in its union."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),  # blocks, threads, bytes of shared memory
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class TensorMap(NamedTuple):
    """What TMA reads of a tensor; the driver asks for an address that is a multiple of 64."""

    memory: Any
    address: int


class StreamState(NamedTuple):
    """Where a launch would go now: torch's current device, its current stream, and whether that
    is being captured into a CUDA graph."""

    device_index: int
    stream: int
    is_captured: bool

    @classmethod
    def current(cls) -> StreamState:
        """Raises what torch raises without a GPU."""
        index = torch.cuda.current_device()
        stream: int = torch._C._cuda_getCurrentRawStream(index)  # without building an object
        return cls(index, stream, torch.cuda.is_current_stream_capturing())


class Launch:
    """A kernel with its arguments, on one stream. May be started again and again, by any thread,
    while its tensors lie where they did."""

    def __init__(
        self, kernel: CudaKernel, config: _Config, addresses: Any, arguments: tuple[Any, ...]
    ) -> None:
        self.kernel = kernel
        self._held = config, arguments  # the driver reads both by address, and changes neither
        self._values = ctypes.byref(config), kernel.function, addresses, None

    def __call__(self) -> None:
        """Raises CudaSourceError."""
        self.kernel.driver("cuCtxSetCurrent", self.kernel.context)
        self.kernel.driver("cuLaunchKernelEx", *self._values)


class CudaKernel:
    """A kernel of one device; its arguments are maps, pointers, integers and floats."""

    starts_early = True

    def __init__(
        self, binary: bytes, name: str, shared_bytes: int, num_registers: int, device_index: int
    ) -> None:
        """Raises CudaSourceError when the driver does not take it.

        Args:
            num_registers: of a thread, as its source counts on.
        """
        self.driver = Driver()
        self.shared_bytes = shared_bytes
        # That of the device, which a thread that has not used it yet lacks.
        self.context = ctypes.c_void_p()
        self.driver("cuInit", 0)
        self.driver("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device_index)
        self.driver("cuCtxSetCurrent", self.context)
        module, found = ctypes.c_void_p(), ctypes.c_int()
        self.driver("cuModuleLoadData", ctypes.byref(module), binary)
        self.function = ctypes.c_void_p()
        self.driver("cuModuleGetFunction", ctypes.byref(self.function), module, name.encode())
        self.driver("cuFuncGetAttribute", ctypes.byref(found), _NUM_REGISTERS, self.function)
        if found.value != num_registers:
            raise CudaSourceError(f"{name} has {found.value} registers, not {num_registers}")
        self.driver("cuFuncSetAttribute", self.function, _MOST_SHARED_BYTES, shared_bytes)
        self._attribute = ctypes.pointer(_Attribute(_EARLY_LAUNCH, 0, (1,)))
        self._maps: dict[tuple[Any, ...], TensorMap] = {}

    def prepare(self, place: StreamState, sizes: tuple[int, int], *arguments: Any) -> Launch:
        """Returns it ready to start, where it waits itself for what is before it on the stream.

        With `starts_early` it is set up while the kernel before it still runs: the source must say
        `griddepcontrol.wait` before it reads or writes anything. Not in a CUDA graph: what a replay
        makes of it was not checked on a GPU.

        Args:
            place: where it will be started.
            sizes: blocks, and threads of each.
            arguments: TensorMap, or ctypes values.
        """
        addresses = (ctypes.c_void_p * len(arguments))(
            *(a.address if type(a) is TensorMap else ctypes.addressof(a) for a in arguments)
        )
        num_blocks, num_threads = sizes
        config = _Config(
            (num_blocks, 1, 1, num_threads, 1, 1, self.shared_bytes),
            place.stream,
            self._attribute,
            int(self.starts_early and not place.is_captured),
        )
        return Launch(self, config, addresses, arguments)

    def tensor_map(self, x_BRC: Tensor, box: tuple[int, int]) -> TensorMap:
        """Returns the map of boxes of one matrix, their columns swizzled by 128 bytes.

        What a box reads beyond a matrix is zero, what it writes there is dropped. Columns lie next
        to each other; the address and both other strides are multiples of 16 bytes.

        Args:
            box: rows and columns.
        """
        key = (x_BRC.data_ptr(), x_BRC.shape, x_BRC.stride(), x_BRC.dtype, box)
        known = self._maps.get(key)
        if known is None:
            if len(self._maps) >= MOST_MAPS:
                self._maps.clear()
            known = self._maps[key] = self._encode(x_BRC, box)
        return known

    def _encode(self, x_BRC: Tensor, box: tuple[int, int]) -> TensorMap:
        num_matrices, num_rows, num_columns = x_BRC.shape
        size = x_BRC.element_size()
        # Of one matrix alone it may be anything, and the driver looks at it all the same.
        matrix_stride = x_BRC.stride(0) if num_matrices > 1 else num_rows * x_BRC.stride(1)
        memory = ctypes.create_string_buffer(128 + 64)
        address = (ctypes.addressof(memory) + 63) & ~63
        self.driver(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(address),
            _MAP_DTYPES[x_BRC.dtype],
            3,
            ctypes.c_void_p(x_BRC.data_ptr()),
            (ctypes.c_uint64 * 3)(num_columns, num_rows, num_matrices),
            (ctypes.c_uint64 * 2)(x_BRC.stride(1) * size, matrix_stride * size),
            (ctypes.c_uint32 * 3)(box[1], box[0], 1),
            (ctypes.c_uint32 * 3)(1, 1, 1),
            0,
            _SWIZZLE_128_BYTES,
            _PROMOTE_TO_256_BYTES,
            0,
        )
        return TensorMap(memory, address)
