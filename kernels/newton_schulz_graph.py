"""Newton-Schulz chains as CUDA graphs: one launch replays the thirty of a chunk.

Chains of all shapes share one block of memory a device, so it is as large as the largest needs.
Replays on one stream follow each other, which is what makes the sharing safe.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from epctl.kernels.newton_schulz_chain import (
    NUM_SQUARES,
    Chain,
    Workspace,
    create_workspace,
    run_chain_,
    workspace_bytes,
)
from epctl.kernels.newton_schulz_cost import Iteration

# What a view of the shared block starts at: the copy engine's windows need 16 bytes.
ALIGNMENT = 512


class GraphKey(NamedTuple):
    """What a captured chain is for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chain: Chain


class Captured(NamedTuple):
    """A graph, and the place where its matrices enter and leave."""

    graph: torch.cuda.CUDAGraph
    x_BMN: Tensor


class GraphCache:
    """The graphs of one device and the memory they share.

    A chain that needs more memory than there is takes a larger block; graphs of the old one are
    dropped and captured again when they are next used.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.block = torch.empty(0, dtype=torch.uint8, device=device)
        self.captured: dict[GraphKey, Captured] = {}
        self.refused: str | None = None
        self._stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )

    def get(self, key: GraphKey) -> Captured | None:
        """Returns the captured chain, None after a capture failed once on this device."""
        if self.refused is not None:
            return None
        if key not in self.captured:
            try:
                self._capture(key)
            except RuntimeError as error:
                self.refused = str(error).splitlines()[0]
                self.captured.clear()
                warnings.warn(
                    f"Newton-Schulz runs without CUDA graphs: {self.refused}", stacklevel=2
                )
                return None
        return self.captured[key]

    def _capture(self, key: GraphKey) -> None:
        x_BMN, workspace = self._place(key)
        x_BMN.zero_()
        with self._on_own_stream():
            # Kernels compile and libraries set themselves up outside the capture.
            run_chain_(x_BMN, key.chain, workspace)
        graph = self._record(lambda: run_chain_(x_BMN, key.chain, workspace))
        self.captured[key] = Captured(graph, x_BMN)

    def _record(self, run) -> torch.cuda.CUDAGraph:  # type: ignore[no-untyped-def]
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, prefetching) may call CUDA meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        assert self._stream is not None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _place(self, key: GraphKey) -> tuple[Tensor, Workspace]:
        num_matrices, num_rows, num_columns = key.shape
        num_squares = NUM_SQUARES[key.chain.method]
        short = min(num_rows, num_columns)
        shapes = [key.shape, key.shape, *[(num_matrices, short, short)] * num_squares]
        sizes = [_aligned(math.prod(shape) * key.dtype.itemsize) for shape in shapes]
        if sum(sizes) > self.block.numel():
            self.captured.clear()
            self.block = torch.empty(0, dtype=torch.uint8, device=self.device)  # give back first
            self.block = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        views, begin = [], 0
        for shape, size in zip(shapes, sizes, strict=True):
            used = math.prod(shape) * key.dtype.itemsize
            views.append(self.block[begin : begin + used].view(key.dtype).view(shape))
            begin += size
        x_BMN, spare_BMN, *squares = views
        return x_BMN, Workspace((spare_BMN,), tuple(squares))


def block_bytes(
    shape: tuple[int, int], num_matrices: int, method: Iteration, dtype: torch.dtype
) -> int:
    """Returns an upper bound of the shared block for chains of one shape."""
    needed = workspace_bytes(shape, num_matrices, method, dtype, use_graphs=True)
    return needed + ALIGNMENT * (2 + NUM_SQUARES[method])


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


_CACHES: dict[torch.device, GraphCache] = {}


def shared_bytes() -> int:
    """Returns the bytes that graphs of all devices of this process hold between calls."""
    return sum(cache.block.nbytes for cache in _CACHES.values())


def replay_(x_BMN: Tensor, chain: Chain, size: int, cache: GraphCache | None = None) -> None:
    """Runs a chain over a batch in place, `size` matrices a replay; a rest has its own graph.

    If capturing fails, once and with a warning, the same chain runs launch by launch.
    """
    if cache is None:
        if x_BMN.device not in _CACHES:
            _CACHES[x_BMN.device] = GraphCache(x_BMN.device)
        cache = _CACHES[x_BMN.device]
    for part_BMN in torch.split(x_BMN, size):
        key = GraphKey(tuple(part_BMN.shape), part_BMN.dtype, chain)
        captured = cache.get(key)
        if captured is None:
            run_chain_(part_BMN, chain, create_workspace(part_BMN, chain.method))
            continue
        captured.x_BMN.copy_(part_BMN)
        captured.graph.replay()
        part_BMN.copy_(captured.x_BMN)
