"""Probes that need no engine: kernels, builds, the old gate, this machine."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from epctl.launch.probe import Finding, NotProbed, probe_of
from epctl.output import format_bytes

SHARED_MEMORY = Path("/dev/shm")
# NCCL takes about 10 MiB a pair of ranks, a data loader some batches a worker; Docker gives 64 MiB.
SHARED_MEMORY_NEEDED = 1 << 30


@probe_of("capacity_by_logits")
def capacity(work: Path) -> Finding:
    """One place at an expert, two tokens: the surer one must get it, whatever its logit."""
    from deepspeed.moe.sharded_moe import topkgating

    logits = torch.tensor([[5.0, 0.0], [10.0, 9.9]])
    _, _, dispatched, _ = topkgating(logits, 1, capacity_factor=0.5, min_capacity=1)
    kept = [token for token in range(2) if bool(dispatched[token, 0].any())]
    return Finding(kept != [0], f"tokens kept {kept}, should be [0]")


@probe_of("grouped_mm_row_stride")
def grouped_mm(work: Path) -> Finding:
    """`torch._grouped_mm` with rows of 20 bfloat16 values, 40 bytes."""
    x = torch.randn(16, 20, dtype=torch.bfloat16)
    weights = torch.randn(2, 20, 32, dtype=torch.bfloat16)
    try:
        torch._grouped_mm(x, weights, offs=torch.tensor([8, 16], dtype=torch.int32))
    except RuntimeError as error:
        return Finding(True, f"RuntimeError: {str(error).splitlines()[0][:80]}")
    return Finding(False, "rows of 40 bytes are accepted")


@probe_of("stale_build_lock")
def stale_lock(work: Path) -> Finding:
    """A build that finds the lock of one that was killed."""
    from torch.utils.file_baton import FileBaton

    lock = work / f"lock-{os.getpid()}"
    lock.touch()
    waiting = threading.Thread(target=FileBaton(str(lock)).wait, daemon=True)
    waiting.start()
    waiting.join(1.0)
    hangs = waiting.is_alive()
    lock.unlink(missing_ok=True)
    waiting.join(5.0)
    return Finding(hangs, "waits for ever, silently" if hangs else "a stale lock is overcome")


@probe_of("arch_list_suffix")
def arch_list(work: Path) -> Finding:
    """DeepSpeed's JIT builder with `TORCH_CUDA_ARCH_LIST=9.0a`."""
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    # Only its parsing of the list is wanted, so it is neither named nor given sources.
    nothing = {"absolute_name": str, "sources": list}
    builder: Any = object.__new__(type("ProbeBuilder", (CUDAOpBuilder,), nothing))
    builder.jit_mode, builder.name = True, "probe"
    previous = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0a"
    try:
        builder.compute_capability_args()
    except ValueError as error:
        return Finding(True, f"ValueError: {error}")
    finally:
        _restore("TORCH_CUDA_ARCH_LIST", previous)
    return Finding(False, "9.0a is understood")


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@probe_of("cpu_adam_subgroup_drift")
def cpu_adam(work: Path) -> Finding:
    """Two equal parameters, stepped one after the other as ZeRO steps its sub-groups."""
    from deepspeed.ops.adam.cpu_adam import DeepSpeedCPUAdam

    if not cpu_adam_is_built():
        raise NotProbed("needs the compiled cpu_adam op, whose build takes minutes")
    parameters = [torch.nn.Parameter(torch.ones(16)) for _ in range(2)]
    optimizer = DeepSpeedCPUAdam(parameters, lr=0.1)
    for step in range(3):
        for parameter in parameters:
            optimizer.param_groups[0]["params"] = [parameter]
            parameter.grad = torch.full((16,), 1.0 - 0.4 * step)
            optimizer.step()
    drift = float((parameters[0] - parameters[1]).abs().max())
    return Finding(drift > 1e-6, f"equal sub-groups differ by {drift:.1e} after 3 steps")


def cpu_adam_is_built() -> bool:
    """True if the compiled op lies in the extension cache, so that loading it is quick."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    return any(root.glob("**/cpu_adam.so"))


@probe_of("small_shared_memory")
def shared_memory(work: Path) -> Finding:
    """Free bytes of /dev/shm."""
    if not SHARED_MEMORY.is_dir():
        raise NotProbed(f"no {SHARED_MEMORY} on this system")
    free = shutil.disk_usage(SHARED_MEMORY).free
    needed = format_bytes(SHARED_MEMORY_NEEDED)
    return Finding(free < SHARED_MEMORY_NEEDED, f"{format_bytes(free)} free, {needed} wanted")
