"""What measure.py needs of torch: the chosen device, its clock, its memory, its matmul rate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epctl.bench.measure import Clock, Run, sample_interleaved, spread, wall_clock
from epctl.errors import ConfigError, ResourceError

MEBIBYTE = 2**20

# What a laptop's CPU finishes in seconds; a larger call is refused there.
LARGEST_CPU_FLOPS = 2e12


def choose_device(name: str | None, flops: float, *, small: str) -> torch.device:
    """Returns the device `name` (`cuda` or `cpu`); None takes the GPU when there is one.

    Args:
        flops: the arithmetic of one call, too much for a CPU above `LARGEST_CPU_FLOPS`.
        small: a command of the same benchmark that a CPU can run, for the hint.

    Raises:
        ConfigError: another name.
        ResourceError: no GPU where one is needed.
    """
    if name not in (None, "cuda", "cpu"):
        raise ConfigError(f"device {name!r} is unknown; known: cuda, cpu")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ResourceError("device cuda is asked for, but torch sees no CUDA GPU")
    if name == "cuda" or (name is None and has_gpu):
        return torch.device("cuda")
    if flops > LARGEST_CPU_FLOPS:
        raise ResourceError(
            f"no CUDA GPU here, and {flops / 1e12:.1f} TFLOP a call is too much for a CPU"
            f" ({LARGEST_CPU_FLOPS / 1e12:.0f} is the most)",
            hint=f"a small one runs anywhere: `{small}`",
        )
    return torch.device("cpu")


def gpu_name(device: torch.device) -> str | None:
    """Returns the GPU's name, None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def clock_of(device: torch.device) -> Clock:
    """Returns the device's clock: events on a GPU, which leave the host's gaps out."""
    return _event_clock if device.type == "cuda" else wall_clock


def _event_clock(run: Run) -> float:
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def peak_memory(
    forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], object]
) -> tuple[float, float]:
    """Returns MiB held between forward and backward, and the peak of both, above what was there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = forward()
    saved = torch.cuda.memory_allocated() - before
    backward(result)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return saved / MEBIBYTE, peak / MEBIBYTE


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns FLOP/s of one large square product on `device`, the ceiling of this process."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    samples = sample_interleaved(
        {"matmul": lambda: left @ right}, warm_up=3, rounds=15, clock=clock_of(device)
    )
    return 2 * size**3 / spread(samples["matmul"]).median
