"""Kernels started by facts of our own: as fine as Triton's, and the very call that Triton makes.

No GPU is needed: Triton's binder and compiler run anywhere, and a driver that writes down what it
is asked to launch stands in for the real one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter compiles nothing"
)

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import (  # noqa: E402
    JITFunction,
    compute_cache_key,
    create_function_from_signature,
)

from epctl.kernels import launch as launching  # noqa: E402
from epctl.kernels.launch import Window, describe, launch  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8)
# Around every border that Triton draws: 1, multiples of 16, 32 bits, 64 bits.
INTEGERS = (
    *range(-33, 34),
    *(2**power + step for power in (30, 31, 32, 62, 63) for step in (-16, -1, 0, 1, 16)),
    *(-(2**power) + step for power in (31, 32) for step in (-16, -1, 0, 1, 16)),
)


@triton.jit
def _one_kernel(argument, CONSTANT: tl.constexpr):
    pass


@triton.jit
def _scale_kernel(
    values_ptr,
    maybe_ptr,
    window,
    other,
    count,
    factor,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
):
    lane = tl.arange(0, WIDTH)
    values = tl.load(values_ptr + lane, mask=lane < count, other=0.0) * factor
    if maybe_ptr is not None:
        values += tl.load(maybe_ptr + lane, mask=lane < count, other=0.0)
    values += tl.sum(window.load([FIRST, 0])) - tl.sum(other.load([FIRST, 0]))
    tl.store(values_ptr + lane, values, mask=lane < count)


def arguments_of_every_kind() -> list[Any]:
    storage = torch.zeros(512, dtype=torch.uint8)
    start = -storage.data_ptr() % 16
    tensors = [
        storage[start + offset : start + offset + 64].view(dtype)
        for dtype in DTYPES
        for offset in range(0, 40, dtype.itemsize)
    ]
    windows = [
        Window(torch.zeros(2, 64, 128, dtype=dtype), rows, columns)
        for dtype in DTYPES[:3]
        for rows in (16, 32)
        for columns in (32, 64)
    ]
    parameter = torch.nn.Parameter(torch.zeros(16))
    return [None, *INTEGERS, 0.0, 1.0, 16.0, -2.5, parameter, *tensors, *windows]


@pytest.fixture
def binder() -> Callable[..., str]:
    """What Triton looks a compiled kernel up by, for one argument."""
    bind = create_function_from_signature(
        _one_kernel.signature, _one_kernel.params, make_backend(HOPPER)
    )

    def key(argument: Any, **constants: Any) -> str:
        _, specialization, options = bind(argument, **constants)
        found: str = compute_cache_key({}, specialization, options)
        return found

    return key


def test_facts_are_as_fine_as_tritons(
    binder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    keys: dict[Any, set[str]] = {}
    for argument in arguments_of_every_kind():
        described = describe((argument,))
        if described is not None:
            keys.setdefault(described[0], set()).add(binder(argument, CONSTANT=1))
    assert {facts: found for facts, found in keys.items() if len(found) > 1} == {}
    # None, three of integers, floats, two of each dtype but int64's and up, twelve of windows.
    assert len(keys) >= 1 + 3 + 1 + 2 * len(DTYPES) + 12


@pytest.mark.parametrize(
    "argument",
    [
        2**31,
        -(2**31) - 1,
        2**63,
        True,
        "text",
        torch.zeros(2).as_subclass(type("T", (Tensor,), {})),
    ],
    ids=["i64", "low i64", "u64", "bool", "text", "subclass"],
)
def test_what_is_not_known_is_left_to_triton(
    argument: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert describe((argument,)) is None
    assert describe((1, argument, None)) is None


def test_tensors_elsewhere_are_left_to_triton() -> None:
    tensor = torch.zeros(2, 16)
    assert describe((tensor,)) is None
    assert describe((Window(tensor, 2, 16),)) is None


def test_helpers_agree_with_tritons() -> None:
    for number in range(1, 300):
        assert launching.next_power_of_2(number) == triton.next_power_of_2(number)
        for size in (1, 7, 128):
            assert launching.ceil_div(number, size) == triton.cdiv(number, size)
    assert launching.ceil_div(0, 8) == 0


class RecordingDriver:
    """Stands in for a Hopper GPU: loads nothing, and writes down every launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.device = 0
        self.num_loaded = 0
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            unload_module=lambda module: None,
        )

    def _load(self, *_: Any) -> tuple[Any, ...]:
        self.num_loaded += 1
        return self, 100 + self.num_loaded, 0, 0, 1024

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 70 + device

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(self, source)


class Launcher:
    """Triton 3.6's CudaLauncher, where what is written in C writes down what it is given."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, recording: RecordingDriver, source: Any) -> None:
        kinds = list(source.signature.values())
        self.launch = wrap_handle_tensordesc(InC(recording), kinds)

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        self.launch(x, y, z, stream, function, False, False, None, None, *rest)


class InC:
    def __init__(self, recording: RecordingDriver) -> None:
        self.recording = recording

    def __call__(self, *arguments: Any) -> None:
        # Hooks and their record, the last three before the kernel's own, may differ.
        plain = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments[13:])
        self.recording.launches.append((*arguments[:10], *plain))


def make_tensordesc_arg(window: Any, metadata: Any) -> list[Any]:
    encoded = window.base.data_ptr(), *window.shape, *window.strides, *window.block_shape
    ENCODED.append(encoded)
    return [(encoded, window.padding, metadata), *window.shape, *window.strides]


ENCODED: list[tuple[int, ...]] = []


def wrap_handle_tensordesc(launcher: Any, kinds: list[str]) -> Any:
    tensordesc_indices = {i for i, kind in enumerate(kinds) if kind.startswith("tensordesc")}
    tensordesc_meta = [{"block_size": i} for i in sorted(tensordesc_indices)]

    def inner(*args: Any) -> None:
        metas = iter(tensordesc_meta)
        final = list(args[:13])
        for i, arg in enumerate(args[13:]):
            of_window = i in tensordesc_indices
            final.extend(make_tensordesc_arg(arg, next(metas)) if of_window else [arg])
        launcher(*final)

    return inner if tensordesc_indices else launcher


@pytest.fixture
def gpu_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDriver]:
    recording = RecordingDriver()
    monkeypatch.setattr(driver, "_active", recording)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(launching, "enabled", True)
    monkeypatch.setattr(launching, "_started", {})
    _scale_kernel.device_caches.clear()
    yield recording
    _scale_kernel.device_caches.clear()


@pytest.fixture
def tritons_way(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that went through Triton's own launch."""
    names: list[str] = []
    run = JITFunction.run

    def counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        names.append(kernel.fn.__name__)
        return run(kernel, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", counted)
    return names


def scale_arguments(offset: int = 0, count: int = 20) -> tuple[Any, ...]:
    windows = Window(torch.zeros(2, 32, 64), 16, 32), Window(torch.zeros(96, 128), 32, 64)
    return torch.zeros(64)[offset:], torch.zeros(32), *windows, count, 2.0


CONSTANTS = {"WIDTH": 32, "FIRST": 0, "num_warps": 2}


def test_a_second_launch_is_the_call_that_triton_makes(
    gpu_stand_in: RecordingDriver, tritons_way: list[str]
) -> None:
    launch(_scale_kernel, (3, 2), *scale_arguments(), **CONSTANTS)
    assert tritons_way == ["_scale_kernel"]
    arguments = scale_arguments(count=24)
    launch(_scale_kernel, (5,), *arguments, **CONSTANTS)
    assert tritons_way == ["_scale_kernel"]
    _scale_kernel[(5,)](*arguments, **CONSTANTS)
    first, ours, tritons = gpu_stand_in.launches
    assert ours == tritons
    assert first != ours
    assert ours[:4] == (5, 1, 1, 70)
    assert gpu_stand_in.num_loaded == 1


@pytest.mark.parametrize(
    ("arguments", "constants"),
    [
        (scale_arguments(offset=1), {}),
        (scale_arguments(count=32), {}),
        (scale_arguments(count=1), {}),
        ((torch.zeros(64), None, *scale_arguments()[2:]), {}),
        ((torch.zeros(64).bfloat16(), *scale_arguments()[1:]), {}),
        ((*scale_arguments()[:2], Window(torch.zeros(32, 64), 16, 16), *scale_arguments()[3:]), {}),
        (scale_arguments(), {"FIRST": 16}),
        (scale_arguments(), {"num_warps": 4}),
        (scale_arguments(), {"maxnreg": 64}),
    ],
    ids=["alignment", "16", "1", "none", "dtype", "box", "constant", "warps", "option"],
)
def test_other_facts_are_another_kernel(
    gpu_stand_in: RecordingDriver, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    for _ in range(2):
        launch(_scale_kernel, (1,), *scale_arguments(), **CONSTANTS)
        launch(_scale_kernel, (1,), *arguments, **{**CONSTANTS, **constants})
    functions = [started[4] for started in gpu_stand_in.launches]
    assert functions[0] != functions[1]
    assert functions[:2] == functions[2:]
    _scale_kernel[(1,)](*arguments, **{**CONSTANTS, **constants})
    assert gpu_stand_in.launches[-1] == gpu_stand_in.launches[-2]


def test_windows_are_encoded_once(
    gpu_stand_in: RecordingDriver, tritons_way: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "MOST_ENCODED", 3)
    here, there = scale_arguments(), scale_arguments()
    launch(_scale_kernel, (1,), *here, **CONSTANTS)
    ENCODED.clear()
    for arguments in (here, here, there, here, here):
        launch(_scale_kernel, (1,), *arguments, **CONSTANTS)
    addresses = [encoded[0] for encoded in ENCODED]
    first, second = ([a.base.data_ptr() for a in each[3:1:-1]] for each in (here, there))
    # Two of here, one of there; the fourth makes room, and here's are encoded anew.
    assert addresses == [*first, *second, *first]
    assert tritons_way == ["_scale_kernel"]
    assert gpu_stand_in.launches[1] == gpu_stand_in.launches[-1] != gpu_stand_in.launches[3]


@pytest.mark.parametrize("strange", ["scratch", "no such attribute", "taken apart", "wrapped"])
def test_launchers_of_another_build_are_left_to_triton(
    gpu_stand_in: RecordingDriver,
    tritons_way: list[str],
    monkeypatch: pytest.MonkeyPatch,
    strange: str,
) -> None:
    class Strange(Launcher):
        global_scratch_size = 64 if strange == "scratch" else 0

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            inner = self.launch
            if strange == "taken apart":
                inner.__closure__[2].cell_contents[0] = None
            elif strange == "wrapped":
                self.launch = lambda *args: inner(*args)
            elif strange == "no such attribute":
                self.begin = self.__dict__.pop("launch")

        def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            begin = getattr(self, "begin", None) or self.launch
            begin(x, y, z, stream, rest[0], False, False, None, None, *rest[1:])

    monkeypatch.setattr(
        gpu_stand_in, "launcher_cls", lambda source, metadata: Strange(gpu_stand_in, source)
    )
    for _ in range(2):
        launch(_scale_kernel, (1,), *scale_arguments(), **CONSTANTS)
    assert len(tritons_way) == len(gpu_stand_in.launches) == 2


def test_each_device_has_its_own(gpu_stand_in: RecordingDriver) -> None:
    for device in (0, 1, 0, 1):
        gpu_stand_in.device = device
        launch(_scale_kernel, (1,), *scale_arguments(), **CONSTANTS)
    places = [started[3:5] for started in gpu_stand_in.launches]
    assert places == [(70, 101), (71, 102), (70, 101), (71, 102)]


def _switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "enabled", False)


def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])


def _debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "debug", True)


def _pre_run_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scale_kernel, "pre_run_hooks", [lambda *args, **kwargs: None])


@pytest.mark.parametrize("watch", [_switch_off, _hook, _debug, _pre_run_hook])
def test_who_watches_sees_every_launch(
    gpu_stand_in: RecordingDriver,
    tritons_way: list[str],
    monkeypatch: pytest.MonkeyPatch,
    watch: Callable[[pytest.MonkeyPatch], None],
) -> None:
    launch(_scale_kernel, (1,), *scale_arguments(), **CONSTANTS)
    watch(monkeypatch)
    launch(_scale_kernel, (1,), *scale_arguments(), **CONSTANTS)
    assert len(tritons_way) == 2


def test_only_known_versions_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, known in (("3.6.0", True), ("3.6.1+git", True), ("3.60.0", False), ("4.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert launching._is_known() is known
