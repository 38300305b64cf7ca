"""Starts a Triton kernel that was started before with the same facts, without Triton's own search.

`kernel[grid](...)` binds arguments by name, works out what each of them specialises the kernel on,
turns that into a text, looks the compiled kernel up by it, compares the module's constants with
what they were, and builds a record for hooks: more host time than many a kernel of a small batch
runs. Here the facts make a key of their own, at least as fine as Triton's
(tests/kernels/test_launch.py holds it against Triton's binder), and what it finds, Triton's
launcher in C, is called as Triton would call it, with addresses in place of tensors and
windows encoded once an address.

Whatever is not known here goes Triton's way: another version of Triton, its interpreter, hooks,
debugging, tensors that are not on a GPU, arguments of another type. `EPCTL_FAST_LAUNCH=0` sends
every launch that way.

Sources: triton 3.6.0, runtime/jit.py (`JITFunction.run`), compiler/compiler.py (`CompiledKernel`),
backends/nvidia/driver.py (`CudaLauncher`, `wrap_handle_tensordesc`, and `make_launcher`: an
integer is taken as an address).
"""

from __future__ import annotations

import contextlib
from types import FunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from epctl.kernels import eager

# Whose launch was read, and run on a GPU. Another may take arguments in another form.
KNOWN_VERSIONS = ("3.6",)

# Triton passes integers beyond these as 64 bits, another kernel.
LOWEST_INT32, HIGHEST_INT32 = -(2**31), 2**31 - 1


# Encoded windows kept of one kernel, 128 bytes each; a loop comes back to a few dozen addresses.
MOST_ENCODED = 1024


def _is_known() -> bool:
    version = ".".join(triton.__version__.split(".")[:2])
    return version in KNOWN_VERSIONS and torch.version.hip is None


enabled = eager.enabled and _is_known()


class Window(TensorDescriptor):  # type: ignore[misc]
    """A [rows, columns] box over a contiguous tensor with its leading dimensions flattened.

    A `TensorDescriptor` without the checks of its constructor, which cost as much as a launch:
    the tensor must be aligned to 16 bytes, not empty, and its rows a multiple of 16 bytes.
    """

    def __init__(self, tensor: Tensor, rows: int, columns: int) -> None:
        width = tensor.shape[-1]
        self.base = tensor
        self.shape = [tensor.numel() // width, width]
        self.strides = [width, 1]
        self.block_shape = [rows, columns]
        self.padding = "zero"
        self.round_f32_to_tf32 = False


class _Started:
    """A kernel that was started: Triton's launcher in C, and what it takes beside the arguments.

    It holds the kernel, so that no other can come to have its id.
    """

    def __init__(self, kernel: Any, compiled: Any, constants: tuple[Any, ...]) -> None:
        """Raises AttributeError, KeyError or TypeError for a launcher of another build."""
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise TypeError("scratch memory is allocated anew for every launch")
        self.kernel, self.constants = kernel, constants
        self.call, self.windows, self.encode = _in_c(launcher.launch)
        cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
        no_scratch = no_hooks = (None, None)
        record = None
        self.beside = (
            *(compiled.function, cooperative, dependent, *no_scratch),
            *(compiled.packed_metadata, record, *no_hooks),
        )
        self.encoded: dict[tuple[int, ...], list[Any]] = {}

    def __call__(self, grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        # From the last on, so that places before it stay what they are.
        for place, metadata in self.windows:
            values[place : place + 1] = self._encoded(place, values[place], metadata)
        x, y, z = (*grid, 1, 1)[:3]
        self.call(x, y, z, stream, *self.beside, *values, *self.constants)

    def _encoded(self, place: int, window: Window, metadata: Any) -> list[Any]:
        """A window as the GPU reads it: it depends on the address and sizes, and on nothing else.

        The caching allocator hands out the same addresses step after step.
        """
        key = (place, window.base.data_ptr(), *window.shape)
        encoded = self.encoded.get(key)
        if encoded is None:
            if len(self.encoded) >= MOST_ENCODED:
                self.encoded.clear()
            encoded = self.encoded[key] = self.encode(window, metadata)
        return encoded


def _in_c(launch: Any) -> tuple[Any, tuple[tuple[int, Any], ...], Any]:
    """Returns the launcher in C, places and metadata of windows from the last on, their encoder.

    Triton puts a function named `inner` around it where a kernel takes windows.
    """
    if not isinstance(launch, FunctionType):
        return launch, (), None
    inner = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
    places = sorted(inner["tensordesc_indices"].cell_contents)
    metadata = inner["tensordesc_meta"].cell_contents
    if None in metadata:
        raise TypeError("this kernel takes its windows apart")
    windows = tuple(zip(places, metadata, strict=True))[::-1]
    return (
        inner["launcher"].cell_contents,
        windows,
        launch.__globals__["make_tensordesc_arg"],
    )


_started: dict[tuple[Any, ...], _Started] = {}


def ceil_div(count: int, size: int) -> int:
    """Returns how many blocks of `size` cover `count`; `triton.cdiv` takes microseconds to."""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """Returns the lowest power of two that is no less than `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()


def describe(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]] | None:
    """Returns the facts that Triton specialises a kernel on, and the arguments as it takes them.

    None when one of them has a type, a place or a size that is not known here. Facts: of a tensor
    its dtype and whether its address is a multiple of 16; of a window its dtype and box; of an
    integer whether it is 1, or else a multiple of 16; of a float that it is one; None itself.
    """
    facts: list[Any] = []
    values: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        value = argument
        if kind is Tensor or kind is Parameter:
            if not argument.is_cuda:
                return None
            value = argument.data_ptr()
            facts.append((argument.dtype, value % 16 == 0))
        elif argument is None:
            facts.append(None)
        elif kind is int:
            if not LOWEST_INT32 <= argument <= HIGHEST_INT32:
                return None
            facts.append(1 if argument == 1 else 0 if argument % 16 else 16)
        elif kind is Window:
            if not argument.base.is_cuda:
                return None
            facts.append((argument.base.dtype, *argument.block_shape))
        elif kind is float:
            facts.append(float)
        else:
            return None
        values.append(value)
    return tuple(facts), values


def _is_watched(kernel: Any) -> bool:
    """True when something wants to see launches, or to change what is compiled."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )


def launch(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **constants: Any) -> None:
    """Does what `kernel[grid](*arguments, **constants)` does, on the current device and stream.

    Args:
        kernel: a function under `triton.jit`, whose module constants never change.
        grid: one to three integers.
        arguments: its first parameters, none of them a compile-time constant.
        constants: every other parameter by name, and launch options such as `num_warps`.
    """
    known = enabled and type(kernel) is JITFunction and not _is_watched(kernel)
    described = describe(arguments) if known else None
    if described is None:
        kernel[grid](*arguments, **constants)
        return
    facts, values = described
    device = driver.active.get_current_device()
    # By id, since the hash of a kernel is that of its source, made under a lock.
    key = (id(kernel), device, facts, tuple(constants.items()))
    started = _started.get(key)
    if started is None:
        compiled = kernel[grid](*arguments, **constants)
        _remember(key, kernel, compiled, len(arguments), constants)
        return
    started(grid, driver.active.get_current_stream(device), values)


def _remember(
    key: tuple[Any, ...], kernel: Any, compiled: Any, num_given: int, constants: dict[str, Any]
) -> None:
    rest = kernel.arg_names[num_given:]
    # A default is Triton's to fill in, and so is a kernel that is still being compiled.
    if isinstance(compiled, CompiledKernel) and all(name in constants for name in rest):
        values = tuple(constants[name] for name in rest)
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            _started[key] = _Started(kernel, compiled, values)
