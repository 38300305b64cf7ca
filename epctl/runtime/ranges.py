"""Named ranges of a training step: the one owner of their names, for traces and for NVTX.

In a trace of torch's profiler a range is `epctl.NAME`; for NVTX tools (Nsight Systems) it is NAME
in the domain `epctl`. Nobody looking, a range is one shared object that does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

DOMAIN = "epctl"
RangeName = Literal["router", "dispatch", "experts", "combine", "optimizer", "steps"]
RANGE_NAMES: tuple[RangeName, ...] = get_args(RangeName)
# Set by Nsight Systems and Nsight Compute in what they start; NVTX itself loads the first.
TOOL_VARIABLES = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")
# As the CUDA 13 and CUDA 12 wheels of `nvidia-nvtx` call it, and the toolkit before.
LIBRARIES = ("libnvtx3interop.so.1", "libnvToolsExt.so.1")

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class Nvtx(Protocol):
    """What a range needs of NVTX; `domain` is made once."""

    def push(self, name: str) -> None:
        """Opens a range on this thread."""

    def pop(self) -> None:
        """Closes the one that was opened last."""


def trace_name(name: RangeName) -> str:
    """Returns how a trace calls a range."""
    return f"{DOMAIN}.{name}"


_recorded = False  # by torch's profiler, now
_nvtx: Nvtx | None = None


def annotate(name: RangeName) -> AbstractContextManager[None]:
    """Names a stretch of work for whoever looks; free when nobody does."""
    if not _recorded and _nvtx is None:
        return _NOTHING
    return _range(name)


@contextlib.contextmanager
def _range(name: RangeName) -> Iterator[None]:
    nvtx = _nvtx
    if nvtx is not None:
        nvtx.push(name)
    try:
        with _record(name):
            yield
    finally:
        if nvtx is not None:
            nvtx.pop()


def _record(name: RangeName) -> AbstractContextManager[Any]:
    if not _recorded:
        return _NOTHING
    import torch

    return torch.profiler.record_function(trace_name(name))


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Puts the ranges of its block into the trace of torch's profiler."""
    global _recorded
    _recorded = True
    try:
        yield
    finally:
        _recorded = False


def watch_with_nvtx(environment: Mapping[str, str] = os.environ) -> bool:
    """Sends ranges to NVTX from now on if a tool has started this process; returns whether.

    Decided once, when a rank starts: NVTX tools attach then and at no other time.
    """
    global _nvtx
    looks = any(environment.get(name) for name in TOOL_VARIABLES)
    _nvtx = open_nvtx() if looks else None
    return _nvtx is not None


@functools.cache
def open_nvtx() -> Nvtx | None:
    """Returns NVTX with the domain, torch's own (which knows no domains) without the library."""
    library = _load_library()
    if library is not None:
        return DomainNvtx(library)
    import torch

    return _TorchNvtx() if torch.cuda.is_available() else None


def _load_library() -> Any:
    """Returns NVTX's library from the wheel beside torch or from the system, None without one."""
    import torch

    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = [str(path) for name in LIBRARIES for path in sorted(packages.glob(f"*/lib/{name}"))]
    for name in (*found, *LIBRARIES):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


class _Message(ctypes.Union):
    _fields_ = (("ascii", ctypes.c_char_p), ("unicode", ctypes.c_wchar_p))


class _Attributes(ctypes.Structure):
    """nvtxEventAttributes_v2 of nvToolsExt.h: 48 bytes."""

    _fields_ = (
        ("version", ctypes.c_uint16),
        ("size", ctypes.c_uint16),
        ("category", ctypes.c_uint32),
        ("color_type", ctypes.c_int32),
        ("color", ctypes.c_uint32),
        ("payload_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("payload", ctypes.c_uint64),
        ("message_type", ctypes.c_int32),
        ("message", _Message),
    )


NVTX_VERSION, MESSAGE_IS_ASCII = 3, 1


class DomainNvtx:
    """NVTX by its C interface, in the domain `epctl`."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.nvtxDomainCreateA.restype = ctypes.c_void_p
        self._domain = ctypes.c_void_p(library.nvtxDomainCreateA(DOMAIN.encode()))
        # Made once: the tool copies what it is shown.
        self._attributes: dict[str, _Attributes] = {n: _attributes(n) for n in RANGE_NAMES}

    def push(self, name: str) -> None:
        attributes = self._attributes.get(name) or _attributes(name)
        self._library.nvtxDomainRangePushEx(self._domain, ctypes.byref(attributes))

    def pop(self) -> None:
        self._library.nvtxDomainRangePop(self._domain)


def _attributes(name: str) -> _Attributes:
    return _Attributes(
        version=NVTX_VERSION,
        size=ctypes.sizeof(_Attributes),
        message_type=MESSAGE_IS_ASCII,
        message=_Message(ascii=name.encode()),
    )


class _TorchNvtx:
    """torch's binding, for a machine without the library: the default domain, names in full."""

    def push(self, name: str) -> None:
        import torch

        torch.cuda.nvtx.range_push(f"{DOMAIN}.{name}")  # type: ignore[no-untyped-call]

    def pop(self) -> None:
        import torch

        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
