"""Host memory that a checkpoint is copied to in one short pause, and written from afterwards.

Memory comes in chunks and is kept from save to save: pinning is slow, and CUDA's allocator of
pinned memory rounds every request up to a power of two, which a chunk already is.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20


class HostCopy:
    """Chunks of host memory, pinned if tensors come from a GPU, filled from the beginning."""

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._chunks: list[Tensor] = []
        self._used = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in use; memory is held in whole chunks."""
        return self._used

    def clear(self) -> None:
        """Makes all memory free again; what was copied before is overwritten by what follows."""
        self._used = 0

    def add(self, tensor: Tensor) -> list[memoryview]:
        """Copies a tensor; returns its bytes in order, whole after `synchronize`."""
        source = tensor.detach().contiguous().view(-1).view(torch.uint8)
        pieces = []
        done = 0
        while done < source.numel():
            chunk, begin = divmod(self._used, self._chunk_bytes)
            if chunk == len(self._chunks):
                self._chunks.append(self._new_chunk())
            length = min(source.numel() - done, self._chunk_bytes - begin)
            target = self._chunks[chunk].narrow(0, begin, length)
            target.copy_(source.narrow(0, done, length), non_blocking=True)
            pieces.append(memoryview(target.numpy()))  # type: ignore[arg-type]
            self._used += length
            done += length
        return pieces

    def _new_chunk(self) -> Tensor:
        pinned = self._device.type == "cuda"
        return torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=pinned)

    def synchronize(self) -> None:
        """Waits until every copy has arrived."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def bytes_on_host(tensor: Tensor) -> memoryview:
    """Returns the bytes of one tensor, copied to the host if they are not there."""
    raw = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return memoryview(raw.numpy())  # type: ignore[arg-type]
